"""What AdamW adds to the options of a param group, kept beside the groups: these have torch's keys, and no more.

So every tool that reads, saves and loads the groups of `torch.optim.AdamW` does so with ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch


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
        """Return options with what `decouple_lr` divides by: the learning rate now, unless there is one already.

        Raises:
            ValueError: decouple_lr with a learning rate of 0.
        """
        if not self.decouple_lr or self.decay_lr is not None:
            return self
        if not float(lr) > 0:
            raise ValueError(
                f"decouple_lr=True decays by weight_decay * lr / initial lr; the initial lr must be above 0, got {lr}"
            )
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
    dtype = getattr(torch, value, None) if isinstance(value, str) else None
    return dtype if isinstance(dtype, torch.dtype) else value


class OptionsOfGroups:
    """The options of each of an optimizer's groups.

    An option that is written to a group, by its user or a tool, is taken from there, and counts from then on.

    Args:
        defaults: of groups that have none of their own.
    """

    def __init__(self, defaults: GroupOptions) -> None:
        self.defaults = defaults
        self._ids: list[int] = []
        self._options: list[GroupOptions] = []
        self._resolved: list[dict[str, Any]] = []

    def of(self, groups: Sequence[dict[str, Any]]) -> list[GroupOptions]:
        """Return the options of all groups, in order.

        Raises:
            ValueError: decouple_lr with a learning rate of 0; nothing has changed then.
        """
        if list(map(id, groups)) != self._ids:
            self._follow(groups)
        for i, group in enumerate(groups):
            if not _OUR_NAMES.isdisjoint(group):
                self._options[i] = self._options[i].changed(group).with_decay_lr(group["lr"])
                self._resolved[i] = self._options[i].resolved()
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

    def set(self, groups: Sequence[dict[str, Any]], options: Sequence[GroupOptions]) -> None:
        """Give these groups these options."""
        self._ids, self._options = list(map(id, groups)), list(options)
        self._resolved = [each.resolved() for each in options]

    def adopt(self, groups: Sequence[dict[str, Any]]) -> None:
        """Give copies of all groups, in their order, the options of these."""
        same_number = len(groups) == len(self._options)
        self.set(groups, self._options if same_number else [self.defaults] * len(groups))

    def _follow(self, groups: Sequence[dict[str, Any]]) -> None:
        """Find the options of groups that were removed, reordered, or replaced one by one by copies."""
        known = dict(zip(self._ids, self._options, strict=True))
        in_place = self._options if len(groups) == len(self._options) else [self.defaults] * len(groups)
        self.set(groups, [known.get(id(group), old) for group, old in zip(groups, in_place, strict=True)])


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
    """
    found = {name: group[name] for name in ("cautious", "decouple_lr", "decay_lr") if name in group}
    saved = group.get("decoupled_weight_decay")
    if isinstance(saved, str):
        changes = json.loads(saved)
        found = {"cautious": changes.get("cautious", False), "decouple_lr": "decay_lr" in changes, **changes}
    return found
