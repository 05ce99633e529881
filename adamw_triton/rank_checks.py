"""What is refused, or warned of, where a model is spread over ranks."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .grad_control import GradNormOptions


def check_no_fsdp1(params: Iterable[Tensor], options: GradNormOptions, *, statistics: bool) -> None:
    """Refuse norms over parameters that FullyShardedDataParallel has cut up, of which nothing says how.

    Raises:
        ValueError: which option, and what to do instead.
    """
    asked = [name for name, value in options._asdict().items() if value] + ["statistics"] * statistics
    if asked and any(map(is_flat_shard, params)):
        raise ValueError(
            f"{asked[0]} needs norms over all ranks, which the flat parameters of FullyShardedDataParallel do not "
            f"allow: each rank would use the norm of its own part. Call model.clip_grad_norm_() before the step, or "
            f"use fully_shard (FSDP2) instead"
        )


def is_flat_shard(param: Tensor) -> bool:
    """Whether a parameter is a part of what FullyShardedDataParallel, the first FSDP, has flattened and cut up."""
    return getattr(param, "_fsdp_flattened", False)


def check_norm_group(group: Any) -> None:
    """Refuse what is no process group.

    Raises:
        TypeError: what was given.
    """
    if group is not None and not (
        torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup)
    ):
        raise TypeError(f"norm_group must be None or a torch.distributed.ProcessGroup; got {group!r}")


def warn_if_replaced(params: Sequence[Tensor]) -> None:
    """Warn if no module has parameters that have no gradients: it has others, made since the optimizer was.

    Only where torch.distributed is in use: `fully_shard` and `parallelize_module` make new parameters.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    wanted = {id(param) for param in params if not is_lazy(param)}
    of_modules = {
        id(param)
        for module in gc.get_objects()
        if issubclass(type(module), torch.nn.Module)  # isinstance would ask some objects for more than their type
        for param in module.__dict__.get("_parameters", {}).values()
    }
    if wanted and wanted.isdisjoint(of_modules):
        warnings.warn(
            "step() found no gradient, and no module has the optimizer's parameters: the model's were replaced, as "
            "fully_shard and parallelize_module do. Build the optimizer after them",
            stacklevel=4,
        )
