"""State dicts: the same keys as torch.optim.AdamW's, and loading them without changing a bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from .storage import SCALES, StorageOptions, decode
from .validation import check_entries, check_memory, check_storage, is_trainable

# How a step is carried out and stored belongs to the optimizer that does it; what it computes, to the checkpoint.
_NOT_LOADED_KEYS = ("foreach", "fused", "capturable", "differentiable", *StorageOptions._fields)


_OURS = ("cautious", "decouple_lr", "decay_lr")
_EXTRA_GROUP_KEYS = (*StorageOptions._fields, *_OURS)
_LIKE_PARAM = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "param_remainder", "master_param")


class _UncastTensor:
    """Hides a tensor from Optimizer.load_state_dict, which would cast it to the parameter's dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def pack(groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict to hand to Optimizer.load_state_dict, after which `restore` must follow.

    Args:
        groups: the optimizer's own param groups.
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
    for group, saved in zip(groups, saved_groups, strict=True):
        saved.update({name: group[name] for name in _NOT_LOADED_KEYS})
        for name in _OURS:  # which other implementations do not save
            if name in group:
                saved.setdefault(name, group[name])
        check_storage({"amsgrad": False, **saved}, [param for param in group["params"] if is_trainable(param)])

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
            _check(params[key], key, values)
            values = {name: _UncastTensor(v) if isinstance(v, Tensor) else v for name, v in values.items()}
        state[key] = values
    return {**state_dict, "state": state, "param_groups": saved_groups}


def _check(param: Tensor, key: Any, values: Mapping[str, Any]) -> None:
    only_master = values.keys() <= {"param_remainder", "master_param"}  # of a parameter that has not been stepped
    missing = [name for name in ("step", "exp_avg", "exp_avg_sq") if name not in values]
    if missing and not only_master:
        raise ValueError(
            f"loaded state of parameter {key} has no {', '.join(missing)} (it has {', '.join(values)}); "
            f"only the state of an AdamW or Adam can be loaded"
        )
    step = values.get("step", 0)
    if not isinstance(step, Number) and not (isinstance(step, Tensor) and step.numel() == 1):
        raise ValueError(f"loaded state 'step' of parameter {key} must be a number or a tensor of one, got {step!r}")
    for name in _LIKE_PARAM:
        if name in values and not isinstance(values[name], Tensor):
            raise ValueError(
                f"loaded state {name!r} of parameter {key} must be a tensor, got {type(values[name]).__name__}"
            )
        if name in values and values[name].shape != param.shape:
            raise ValueError(
                f"loaded state {name!r} of parameter {key} has shape {tuple(values[name].shape)}, the parameter "
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


def torch_state_dict(groups: Sequence[Mapping[str, Any]], packed: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of this optimizer as torch.optim.AdamW has it: floating-point moments and no more."""
    params = dict(
        zip(
            chain.from_iterable(group["params"] for group in packed["param_groups"]),
            chain.from_iterable(group["params"] for group in groups),
            strict=True,
        )
    )
    state = {}
    for key, values in packed["state"].items():
        entries = dict(values)
        if key in params:
            for name, scale in SCALES.items():
                if scale in entries:
                    entries[name] = decode(name, entries[name], entries.pop(scale))
            entries.pop("param_remainder", None)
            entries.pop("master_param", None)
        state[key] = entries
    param_groups = [
        {name: value for name, value in group.items() if name not in _EXTRA_GROUP_KEYS}
        for group in packed["param_groups"]
    ]
    return {**packed, "state": state, "param_groups": param_groups}
