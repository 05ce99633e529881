"""State dicts: the same keys as torch.optim.AdamW's, and loading them without changing a bit."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from itertools import chain
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from .dtensors import is_dtensor, local
from .group_options import OURS, GroupOptions, decay_of_saved, decay_to_save
from .sharding import LocalEntries, Sharding, like_dtensor, local_entries
from .storage import CODED, MASTER_ENTRIES, StorageOptions, master_weight, moment, remainder_entry
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
    if isinstance(remainder, Tensor) and not is_dtensor(remainder):
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
    sharding = Sharding(param) if is_dtensor(param) else None
    try:
        for name, value in values.items():
            if sharding is not None and is_dtensor(value) and name != "step":
                sharding.check_entry(name, value)
            elif isinstance(value, Tensor):
                check_memory(value, f"state {name!r}")
        check_entries(_on_meta(param), {name: _on_meta(v) for name, v in values.items()})
    except RuntimeError as error:
        raise ValueError(f"loaded state of parameter {key} cannot be used: {error}") from None


def _on_meta(value: Any) -> Any:
    """Return a plain tensor without values in the shape, and the layout, of a tensor; what is none as it is."""
    if not is_dtensor(value):
        return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def restore(groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]) -> None:
    """Put the tensors kept by `pack` where their parameters are, in the storage of their groups.

    Where a group has no wish, moments stay in the floating-point dtypes that they were saved in. Of whole tensors, a
    DTensor's state takes the part of its rank.

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
            with torch.no_grad():
                _complete(param, values, group_of[param])
        elif isinstance(param, Tensor):  # of an optimizer that was pickled
            renamed = _renamed(values)
            values.clear()
            values.update(renamed)


def _complete(param: Tensor, values: dict[str, Any], group: Mapping[str, Any]) -> None:
    """Bring what was loaded into the storage of its group, and of a DTensor to its rank."""
    storage, amsgrad = StorageOptions.from_group(group), group["amsgrad"]
    if not is_dtensor(param):
        storage.complete(param, values, amsgrad=amsgrad)
        return
    sharding = Sharding(param)
    whole = {name: v for name, v in values.items() if isinstance(v, Tensor) and name != "step" and not is_dtensor(v)}
    if not sharding.allows_codes:
        for name, coded in CODED.items():
            if coded.codes in whole:
                whole[name] = moment(name, whole)  # type: ignore[assignment]
                for entry in coded[1:]:
                    del whole[entry], values[entry]
    values.update({name: sharding.part_of(name, value) for name, value in whole.items()})
    entries = LocalEntries(values, sharding)
    storage.complete(local(param), entries, amsgrad=amsgrad, allows_codes=sharding.allows_codes)


def torch_state_dict(packed: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of this optimizer as torch.optim.AdamW has it: floating-point moments and no more."""
    params = set(chain.from_iterable(group["params"] for group in packed["param_groups"]))
    state = {}
    for key, values in packed["state"].items():
        entries = dict(values)
        if key in params:
            for name, coded in CODED.items():
                if coded.codes in entries:
                    codes = entries[coded.codes]
                    decoded: Any = moment(name, {entry: local(entries[entry]) for entry in coded[1:]})
                    entries[name] = like_dtensor(decoded, codes) if is_dtensor(codes) else decoded
                    del entries[coded.codes], entries[coded.scale]
            for name in MASTER_ENTRIES:
                entries.pop(name, None)
        state[key] = entries
    param_groups = [{**group, "decoupled_weight_decay": True} for group in packed["param_groups"]]
    return {**packed, "state": state, "param_groups": param_groups}


def master_param(param: Tensor, entries: MutableMapping[str, Any]) -> Tensor:
    """Return a copy of a parameter's value in float32, with what its state adds to it; see `AdamW.master_params`."""
    value = master_weight(*local_entries(param, entries)).clone(memory_format=torch.contiguous_format)
    return like_dtensor(value, param) if is_dtensor(param) else value


def part_for(param: Tensor, value: Tensor) -> Tensor:
    """Return what of a tensor in a parameter's shape belongs to the parameter's part on this rank.

    Raises:
        ValueError: a DTensor where the parameter is none, or that lies otherwise.
    """
    if not is_dtensor(param):
        if is_dtensor(value):
            raise ValueError(
                f"got a DTensor of shape {tuple(value.shape)} for a plain parameter; give its full_tensor()"
            )
        return value
    sharding = Sharding(param)
    if not is_dtensor(value):
        return local(sharding.part_of("master_param", value))
    try:
        sharding.check_entry("master_param", value)
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    return local(value)
