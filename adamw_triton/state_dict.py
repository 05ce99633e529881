"""State dicts: the same keys as torch.optim.AdamW's, and loading them without changing a bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from .group_options import OURS, GroupOptions, decay_of_saved, decay_to_save
from .storage import CODED, MASTER_ENTRIES, StorageOptions, moment, remainder_entry
from .validation import LIKE_PARAM, check_entries, check_group, check_memory, shape_of_entry

# How a step is carried out and stored belongs to the optimizer that does it; what it computes, to the checkpoint.
_NOT_LOADED_KEYS = ("foreach", "fused", "capturable", "differentiable")


class _UncastTensor:
    """Hides a tensor from Optimizer.load_state_dict, which would cast it to the parameter's dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def with_decay(options: Sequence[GroupOptions], packed: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict, of torch's making, with all that changes how its weights decay."""
    for group, its_options in zip(packed.get("param_groups", ()), options, strict=False):
        group["decoupled_weight_decay"] = decay_to_save(its_options)
    return packed


def pack(
    groups: Sequence[Mapping[str, Any]], options: Sequence[GroupOptions], state_dict: Mapping[str, Any]
) -> dict[str, Any]:
    """A state dict to hand to Optimizer.load_state_dict, after which `restore` must follow.

    Args:
        groups: the optimizer's own param groups; options: of each.
        state_dict: of this optimizer or of any implementation of torch.optim.AdamW; not modified.

    Raises:
        ValueError: groups or shapes that do not match, or an amsgrad that the storage cannot have. Nothing has been
            changed then.
    """
    saved_groups = [dict(group) for group in state_dict["param_groups"]]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved_groups]:
        raise ValueError(
            f"loaded state dict has parameter groups of sizes {[len(g['params']) for g in saved_groups]}, "
            f"the optimizer of {[len(g['params']) for g in groups]}; build it from the same groups in the same order"
        )
    for group, its_options, saved in zip(groups, options, saved_groups, strict=True):
        decay = decay_of_saved(saved)
        for name in OURS:
            saved.pop(name, None)
        saved.update({name: group[name] for name in _NOT_LOADED_KEYS}, decoupled_weight_decay=True, **decay)
        loaded = its_options.changed(decay).with_decay_lr(saved["lr"]).resolved()
        check_group({"amsgrad": False, **saved, **loaded, "params": group["params"]}, seed_given=False)

    params = dict(
        zip(
            chain.from_iterable(group["params"] for group in saved_groups),
            chain.from_iterable(group["params"] for group in groups),
            strict=True,
        )
    )
    state = {}
    for key, values in state_dict["state"].items():
        if key in params and values:
            values = _renamed(values)
            _check(params[key], key, values)
            values = {name: _UncastTensor(v) if isinstance(v, Tensor) else v for name, v in values.items()}
        state[key] = values
    return {**state_dict, "state": state, "param_groups": saved_groups}


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return state by today's names; codes were kept as moments once, and remainders as int16."""
    renamed = dict(values)
    for name, coded in CODED.items():
        if coded.scale in values and name in values and coded.codes not in values:
            renamed[coded.codes] = renamed.pop(name)
    remainder = values.get("param_remainder")
    if isinstance(remainder, Tensor):
        renamed["param_remainder"] = remainder_entry(remainder)
    return renamed


def _check(param: Tensor, key: Any, values: Mapping[str, Any]) -> None:
    only_master = values.keys() <= set(MASTER_ENTRIES)  # of a parameter that has not been stepped
    has = {"step": "step" in values, **{name: name in values or coded.codes in values for name, coded in CODED.items()}}
    missing = [name for name, is_there in has.items() if not is_there]
    if missing and not only_master:
        raise ValueError(
            f"loaded state of parameter {key} has no {', '.join(missing)} (it has {', '.join(values)}); "
            f"only the state of an AdamW or Adam can be loaded"
        )
    step = values.get("step", 0)
    if not isinstance(step, Number) and not (isinstance(step, Tensor) and step.numel() == 1):
        raise ValueError(f"loaded state 'step' of parameter {key} must be a number or a tensor of one, got {step!r}")
    for name in (name for name in LIKE_PARAM if name in values):
        value = values[name]
        if not isinstance(value, Tensor):
            raise ValueError(f"loaded state {name!r} of parameter {key} must be a tensor, got {type(value).__name__}")
        if value.shape != shape_of_entry(name, value.dtype, param):
            raise ValueError(
                f"loaded state {name!r} of parameter {key} has shape {tuple(value.shape)}, the parameter "
                f"{tuple(param.shape)}; build the optimizer from the same parameters in the same order"
            )
    try:
        for name, value in values.items():
            if isinstance(value, Tensor):
                check_memory(value, f"state {name!r}")
        elsewhere = torch.empty_like(param, device="meta")
        entries = {name: v.to("meta") if isinstance(v, Tensor) else v for name, v in values.items()}
        check_entries(elsewhere, entries)
    except RuntimeError as error:
        raise ValueError(f"loaded state of parameter {key} cannot be used: {error}") from None


def restore(groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]) -> None:
    """Put the tensors kept by `pack` where their parameters are, in the storage of their groups.

    Where a group has no wish, moments stay in the floating-point dtypes that they were saved in.

    Args:
        groups: with all their options.
    """
    group_of = {param: group for group in groups for param in group["params"]}
    for param, values in state.items():
        if not isinstance(values, dict):
            continue
        loaded = False
        for name, value in values.items():
            if isinstance(value, _UncastTensor):
                loaded = True
                # The next step moves its count to the side that counts.
                values[name] = value.tensor if name == "step" else value.tensor.to(param.device)
            elif name == "step" and not isinstance(value, Tensor):
                values[name] = torch.tensor(float(value), dtype=torch.float32, device="cpu")
        if loaded and param in group_of:
            group = group_of[param]
            with torch.no_grad():
                StorageOptions.from_group(group).complete(param, values, amsgrad=group["amsgrad"])
        elif isinstance(param, Tensor):  # of an optimizer that was pickled
            renamed = _renamed(values)
            values.clear()
            values.update(renamed)


def torch_state_dict(packed: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of this optimizer as torch.optim.AdamW has it: floating-point moments and no more."""
    params = set(chain.from_iterable(group["params"] for group in packed["param_groups"]))
    state = {}
    for key, values in packed["state"].items():
        entries = dict(values)
        if key in params:
            for name, coded in CODED.items():
                if coded.codes in entries:
                    entries[name] = moment(name, entries)
                    del entries[coded.codes], entries[coded.scale]
            for name in MASTER_ENTRIES:
                entries.pop(name, None)
        state[key] = entries
    param_groups = [{**group, "decoupled_weight_decay": True} for group in packed["param_groups"]]
    return {**packed, "state": state, "param_groups": param_groups}
