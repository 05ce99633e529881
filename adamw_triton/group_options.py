"""What AdamW adds to the options of a param group, kept beside the groups: these have torch's keys, and no more.

So every tool that reads, saves and loads the groups of `torch.optim.AdamW` does so with ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .validation import check_option_values


class GroupOptions(NamedTuple):
    """The options of one group that torch.optim.AdamW does not have."""

    exp_avg_dtype: torch.dtype | None = None
    exp_avg_sq_dtype: torch.dtype | None = None
    master_weight_bits: int | None = None
    stochastic_rounding: bool | None = None
    seed: int = 0
    cautious: bool = False
    decouple_lr: bool = False
    decay_lr: float | None = None  # which `decouple_lr` divides by, made when that is set

    def changed(self, given: Mapping[str, Any]) -> GroupOptions:
        """Return options with what a group or the arguments of a constructor have of them; dtypes also by name."""
        changes = {name: _dtype(given[name]) if name in _DTYPES else given[name] for name in OURS if name in given}
        return self._replace(**changes)

    def with_decay_lr(self, lr: Any) -> GroupOptions:
        """Return options with what `decouple_lr` divides by: the learning rate now, if it is above 0."""
        if not self.decouple_lr or self.decay_lr is not None or not float(lr) > 0:
            return self
        # Not under the name of learning rate schedulers, some of which change it.
        return self._replace(decay_lr=float(lr))

    def resolved(self) -> dict[str, Any]:
        """Return what a step goes by."""
        options = self._asdict()
        if self.stochastic_rounding is None:
            options["stochastic_rounding"] = any(dtype in (torch.int8, torch.uint8) for dtype in self[:2])
        return options

    def to_json(self) -> dict[str, Any]:
        """Return what json.dumps takes: the names of dtypes."""
        return {
            name: str(v).removeprefix("torch.") if name in _DTYPES and v else v for name, v in self._asdict().items()
        }


OURS = GroupOptions._fields
_DTYPES = ("exp_avg_dtype", "exp_avg_sq_dtype")


def _dtype(value: Any) -> Any:
    """Return the dtype of a name like "int8"; what is none is refused with the other options."""
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else None
    return dtype if isinstance(dtype, torch.dtype) else value


class OptionsOfGroups:
    """The options of each of an optimizer's groups.

    They are found again by the group's place and address (a reference would keep the parameters of a removed group
    alive), or by a parameter. An option that is written to a group, by its user or a tool, is taken from there, and
    counts from then on.

    Args:
        defaults: of groups that have none of their own.
    """

    def __init__(self, defaults: GroupOptions) -> None:
        self.defaults = defaults
        self._ids: list[int] = []
        self._options: list[GroupOptions] = []
        self._resolved: list[dict[str, Any]] = []
        self._of_param = WeakTensorKeyDictionary()

    def of(self, groups: Sequence[dict[str, Any]]) -> list[GroupOptions]:
        """Return the options of all groups, in order.

        Raises:
            ValueError: an option was written that cannot be; it stays where it is, and the old one counts.
        """
        if list(map(id, groups)) != self._ids:
            known = dict(zip(enumerate(self._ids), self._options, strict=True))
            self.set(groups, [known.get((i, id(group))) or self.find(group) for i, group in enumerate(groups)])
        for i, group in enumerate(groups):
            is_written = not _OUR_NAMES.isdisjoint(group)
            if is_written or (self._options[i].decouple_lr and self._options[i].decay_lr is None):
                options = self._options[i].changed(group).with_decay_lr(group["lr"])
                check_option_values(options.resolved())
                self._options[i], self._resolved[i] = options, options.resolved()
                self._note(group, options)
                for name in OURS:
                    group.pop(name, None)
        return self._options

    def merged(self, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return each group together with its options; parameters are the group's list."""
        self.of(groups)
        return [{**group, **resolved} for group, resolved in zip(groups, self._resolved, strict=True)]

    def merged_with(self, groups: Sequence[dict[str, Any]], index: int, params: list[Any]) -> dict[str, Any]:
        """Return one group together with its options, and with these parameters instead of its own."""
        self.of(groups)
        return {**groups[index], **self._resolved[index], "params": params}

    def find(self, group: dict[str, Any]) -> GroupOptions:
        """Return the options that the parameters of a group had when they were seen last."""
        of_params = (self._of_param.get(param) for param in group["params"])
        return next((options for options in of_params if options is not None), self.defaults)

    def set(self, groups: Sequence[dict[str, Any]], options: Sequence[GroupOptions]) -> None:
        """Give these groups these options."""
        self._ids, self._options, self._resolved = [], [], []
        for group, its_options in zip(groups, options, strict=True):
            self.add(group, its_options)

    def add(self, group: dict[str, Any], options: GroupOptions) -> None:
        """Give a group these options, which comes after all others."""
        self._ids.append(id(group))
        self._options.append(options)
        self._resolved.append(options.resolved())
        self._note(group, options)

    def _note(self, group: dict[str, Any], options: GroupOptions) -> None:
        for param in group["params"]:
            self._of_param[param] = options


_OUR_NAMES = frozenset(OURS)


def decay_to_save(options: GroupOptions) -> bool | str:
    """Return what a saved group has as `decoupled_weight_decay`.

    torch.optim.AdamW sets it to True when it loads, so that what changes how a weight decays has room in it.
    """
    changes: dict[str, Any] = {"cautious": True} if options.cautious else {}
    if options.decouple_lr:
        changes["decay_lr"] = options.decay_lr
    return json.dumps(changes) if changes else True


def decay_of_saved(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a saved group says of cautious, decouple_lr and decay_lr, in its own keys or as `decay_to_save`.

    Groups of other implementations, and of ours without either, say nothing.

    Raises:
        ValueError: something else is saved there.
    """
    saved = group.get("decoupled_weight_decay")
    if not isinstance(saved, str):
        return {name: group[name] for name in ("cautious", "decouple_lr", "decay_lr") if name in group}
    try:
        changes = json.loads(saved)
        if not changes.keys() <= {"cautious", "decay_lr"}:
            raise ValueError
    except (ValueError, AttributeError):
        raise ValueError(
            f"loaded state dict has decoupled_weight_decay={saved!r}; it must be True, or what AdamW.state_dict saves"
        ) from None
    return {"cautious": False, "decouple_lr": "decay_lr" in changes, **changes}
