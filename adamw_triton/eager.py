"""The step of parameters that no plan has, one by one in eager torch: without values, or on a GPU without kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .functional import is_skipped, step_tensor_eager
from .grad_control import GradDecision
from .hyperparams import Hyperparams
from .param_work import ParamWork
from .storage import Formats, StateTensors
from .strides import real_view
from .validation import is_simulated


def place_steps(works: Sequence[ParamWork]) -> None:
    """Have the updates of each parameter counted in a 0-d float32 of its own; one that is there stays where it is."""
    taken: set[int] = set()
    for entries in (work.entries for work in works):
        step = entries["step"]
        if not isinstance(step, Tensor):
            step = torch.tensor(float(step), dtype=torch.float32, device="cpu")
        elif step.dtype != torch.float32 or step.dim() != 0:
            step = step.to(torch.float32).reshape(())
        entries["step"] = step if id(step) not in taken else step.clone()
        taken.add(id(step))


def sum_of_squares(work: ParamWork) -> Tensor:
    """Return that of a gradient: 0-d float64, on its device."""
    assert work.grad is not None
    return real_view(work.grad.resolve_conj()).double().square().sum()


def step(
    works: Sequence[ParamWork],
    groups: Sequence[Mapping[str, Any]],
    hyperparams: Sequence[Hyperparams],
    decision_on: Callable[[torch.device], GradDecision] | None,
    *,
    statistics: bool,
) -> list[Tensor] | None:
    """Step parameters whose state is complete, and count.

    Args:
        works: parameters with gradients.
        groups: all param groups; hyperparams: of each.
        decision_on: the decision on each device, if the step is subject to one.
        statistics: whether to sum the squares of what is written, and of its change.

    Returns:
        The sums, float64 [2] of each parameter, with `statistics`; None where the step is skipped.
    """
    decisions = {} if decision_on is None else {d: decision_on(d).values for d in {w.param.device for w in works}}
    if any(map(is_skipped, decisions.values())):
        return None
    sums = []
    for work in works:
        group, param, entries = groups[work.group], work.param, work.entries
        assert work.grad is not None
        count = entries["step"]
        tensors = StateTensors.from_entries(entries, group["amsgrad"])
        formats = Formats.of(param, work.grad.dtype, tensors, stochastic=group["stochastic_rounding"])
        of_param = torch.zeros(2, dtype=torch.float64, device=param.device) if statistics else None
        step_tensor_eager(
            param,
            work.grad,
            tensors,
            hyperparams[work.group],
            1.0 if is_simulated(count) else float(count.item()) + 1,
            maximize=group["maximize"],
            cautious=group["cautious"],
            decision=decisions.get(param.device),
            statistics=of_param,
            noise_key=work.noise_key(group["seed"], formats),
        )
        count.add_(1)
        if work.listed is not param:
            torch.autograd.graph.increment_version([work.listed])
        sums += [] if of_param is None else [of_param]
    return sums
