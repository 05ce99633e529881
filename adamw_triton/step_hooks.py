"""What torch puts around the `step` of every optimizer, and when it can be left out."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar, cast

import torch
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import Optimizer

_P = ParamSpec("_P")
_R = TypeVar("_R")


def with_hooks(func: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return `func`, a step, with its hooks and its record in a profile, as `Optimizer.profile_hook_step` does.

    Without hooks and profiler, it is called as it is: on the host the wrapper costs as much as 15 parameters.
    """
    wrapped = Optimizer.profile_hook_step(func)

    @wraps(func)
    def hooked_step(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        optimizer = cast(Optimizer, args[0])
        # The compiler cannot trace the question whether a profiler runs.
        if torch.compiler.is_compiling() or _has_hooks(optimizer) or torch.autograd._profiler_enabled():
            return wrapped(*args, **kwargs)
        return func(*args, **kwargs)

    return hooked_step


def exclude_from_compilation(optimizer: type, method: str) -> None:
    """Have torch.compile leave the step alone: it is one kernel already."""
    function = getattr(optimizer, method)
    if not getattr(function, "_torchdynamo_disable", False):  # not on import, since that imports the compiler
        reason = "AdamW's step is one kernel already: there is nothing in it to compile"
        setattr(optimizer, method, torch.compiler.disable(function, reason=reason))


def _has_hooks(optimizer: Optimizer) -> bool:
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    )
