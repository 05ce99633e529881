"""Param groups that decay weight matrices and nothing else."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT


def param_groups_weight_decay(
    model: nn.Module, weight_decay: float = 1e-2, no_decay: Collection[str] = (), **options: Any
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into a group that decays and a group that does not.

    Biases, the parameters of normalisation layers and other parameters of at most one dimension do not
    decay. A tied parameter is listed once, under its first name.

    Args:
        model: module whose parameters with `requires_grad` are split.
        weight_decay: of the first group; the second has 0.
        no_decay: names that do not decay either: a parameter's full name ("wte.weight") or, for all
            parameters below it, a module's ("wte").
        options: put into both groups, e.g. `lr`.

    Returns:
        At most two groups, the decaying one first; a group without parameters is left out.

    Raises:
        ValueError: a name in `no_decay` that the model does not have.

    Example:
        >>> groups = param_groups_weight_decay(nn.Linear(3, 2), 0.1)
        >>> [(len(g["params"]), g["weight_decay"]) for g in groups]
        [(1, 0.1), (1, 0.0)]
    """
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    names.update(name for name, _ in model.named_modules(remove_duplicate=False))
    unknown = sorted(set(no_decay) - names)
    if isinstance(no_decay, str) or unknown:
        raise ValueError(f"no_decay must list names of parameters or modules of the model, got {no_decay!r}")

    norms = {
        id(param)
        for module in model.modules()
        if re.search(r"norm(\dd)?$", type(module).__name__, re.IGNORECASE)
        for param in module.parameters(recurse=False)
    }
    exempt = {
        id(param)
        for name, param in model.named_parameters(remove_duplicate=False)
        if any(name == given or name.startswith(given + ".") for given in no_decay)
    }
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": weight_decay, **options},
        {"params": [], "weight_decay": 0.0, **options},
    ]
    for param in model.parameters():
        if param.requires_grad:
            group = groups[param.ndim <= 1 or id(param) in norms or id(param) in exempt]
            group["params"].append(param)
    return [group for group in groups if group["params"]]


def param_groups_master_weights(params: ParamsT, master_weight_bits: int = 32, **options: Any) -> list[dict[str, Any]]:
    """Param groups in which bfloat16 and float16 parameters have master weights, and all others do not.

    Args:
        params: parameters, (name, parameter) pairs or param groups, like those of `param_groups_weight_decay`.
        master_weight_bits: of the parameters that are stored with fewer than 32.
        options: further options of the groups with master weights, like `exp_avg_dtype`.

    Returns:
        Of each given group the parameters with and those without master weights, where there are any.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 3).bfloat16(), torch.nn.LayerNorm(3))
        >>> groups = param_groups_master_weights(model.parameters(), 32)
        >>> [(group["master_weight_bits"], len(group["params"])) for group in groups]
        [(32, 2), (None, 2)]
    """
    if isinstance(params, Tensor):
        raise TypeError(f"params must be an iterable of parameters or groups, got a tensor of {tuple(params.shape)}")
    given: list[Any] = list(params)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    split = []
    for group in groups:
        members = group["params"]
        members = [members] if isinstance(members, Tensor) else list(members)
        by_need: dict[bool, list[Any]] = {True: [], False: []}
        for member in members:
            param = member[1] if isinstance(member, tuple) else member
            by_need[param.dtype in (torch.bfloat16, torch.float16)].append(member)
        if by_need[True]:
            split.append({**group, **options, "params": by_need[True], "master_weight_bits": master_weight_bits})
        if by_need[False]:
            split.append({**group, "params": by_need[False], "master_weight_bits": None})
    return split
