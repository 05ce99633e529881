"""The step of one tensor: `adamw_`, and what the optimizer does to a tensor that no table holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import launch, reference
from .grad_control import GradNormOptions, GradScalerInputs, decide
from .hyperparams import Hyperparams, kernel_scalars
from .storage import GROUP_SIZE, JoinedKeys, NoiseKey, StateTensors
from .strides import dense, flat, real_view, same_strides
from .validation import check_entries, check_grad, check_hyperparams, check_param, check_rounding, is_simulated


def step_tensor(
    param: Tensor,
    grad: Tensor,
    state: StateTensors,
    scalars: Tensor,
    *,
    maximize: bool,
    cautious: bool = False,
    decision: Tensor | None = None,
    statistics: Tensor | None = None,
    noise_key: NoiseKey | None = None,
) -> None:
    """Launch the kernel for one checked parameter of any layout; a complex one is a pair of real numbers."""
    with flat_views(param, grad, state) as (work, work_grad, work_state):
        launch.launch_tensor(
            work,
            work_grad,
            work_state,
            scalars,
            maximize=maximize,
            cautious=cautious,
            decision=decision,
            statistics=statistics,
            noise_key=noise_key,
        )


def step_tensor_eager(
    param: Tensor,
    grad: Tensor,
    state: StateTensors,
    hyperparams: Hyperparams,
    step: float,
    *,
    maximize: bool,
    cautious: bool = False,
    decision: Tensor | None = None,
    statistics: Tensor | None = None,
    noise_key: NoiseKey | None = None,
) -> None:
    """Take update number `step` of one checked parameter of any layout in eager torch; it is not skipped."""
    options: dict[str, Any] = {
        "step": step,
        "maximize": maximize,
        "cautious": cautious,
        "grad_factor": None if decision is None else decision[0],
        "statistics": statistics,
        "noise_key": noise_key,
        **dict(zip(hyperparams._fields, hyperparams.numbers(), strict=True)),
    }
    on_cpu = param.device.type == "cpu" and not is_simulated(param)
    options["fused"] = on_cpu and _can_be_fused(state, cautious)
    is_torchs = state.is_plain and noise_key is None and {grad.dtype, *state.dtypes} == {param.dtype}
    if state.is_plain and noise_key is None and not options["fused"] and not (on_cpu and param.numel() > host_piece()):
        reference.adamw_(real_view(param), real_view(grad.resolve_conj()), state.map(real_view), **options)
        return
    # Groups of elements and random bits are counted in the order of memory.
    with flat_views(param, grad, state) as (work, work_grad, work_state):
        tensors = flat(work), flat(work_grad), work_state.map(flat)
        if on_cpu:
            _step_in_pieces(*tensors, pad=not is_torchs, **options)
        else:
            reference.adamw_(*tensors, **options)


def _can_be_fused(state: StateTensors, cautious: bool) -> bool:
    return state.max_exp_avg_sq is None and not cautious


def host_piece() -> int:
    """Return how many elements the CPU steps at a time: what is computed of them stays in the caches of its cores."""
    return 2**16 * max(2, torch.get_num_threads())


_VECTOR = GROUP_SIZE  # also a multiple of how many elements one instruction of a CPU takes


def _step_in_pieces(
    param: Tensor, grad: Tensor, state: StateTensors, *, pad: bool, statistics: Tensor | None, **options: Any
) -> None:
    """Take a step of flat tensors on the CPU piece by piece.

    Args:
        pad: whether to fill up the last vector of elements. An element then has the same bits wherever it is: what is
            left over of vectors is rounded otherwise, by torch's fused step too.
    """
    n, size = param.numel(), host_piece()
    total = None if statistics is None else torch.zeros_like(statistics)
    for start in range(0, n, size):
        stop = min(start + size, n)
        part, of_scales = slice(start, stop), slice(start // GROUP_SIZE, -(-stop // GROUP_SIZE))
        scales = [None if scale is None else scale[of_scales] for scale in state[4:]]
        piece = StateTensors(*(None if t is None else t[part] for t in state[:4]), *scales)  # type: ignore[arg-type]
        how = {**options, "statistics": statistics, "first_element": start}
        if pad and stop % _VECTOR:
            _step_joined([(param[part], grad[part], piece)], **how)
        else:
            reference.adamw_(param[part], grad[part], piece, **how)
        if total is not None and statistics is not None:
            total += statistics
    if total is not None and statistics is not None:
        statistics.copy_(total)


def step_joined_eager(
    tensors: Sequence[tuple[Tensor, Any, StateTensors]],
    noise_keys: Sequence[NoiseKey | None],
    hyperparams: Hyperparams,
    step: float,
    *,
    maximize: bool,
    cautious: bool,
    decision: Tensor | None,
) -> None:
    """Take update number `step` of several small parameters on the CPU at once.

    Args:
        tensors: parameter, gradient and state, dense and of the same strides, real and of the same formats.
        noise_keys: of stochastic rounding, all or none.
    """
    keys = [key for key in noise_keys if key is not None]
    sizes = _filled_sizes([param for param, *_ in tensors])
    options: dict[str, Any] = {
        "step": step,
        "maximize": maximize,
        "cautious": cautious,
        "fused": _can_be_fused(tensors[0][2], cautious),
        "grad_factor": None if decision is None else decision[0],
        "noise_key": JoinedKeys(keys, sizes) if keys else None,
        **dict(zip(hyperparams._fields, hyperparams.numbers(), strict=True)),
    }
    _step_joined([(flat(param), flat(grad), state.map(flat)) for param, grad, state in tensors], **options)


def _step_joined(tensors: Sequence[tuple[Tensor, Tensor, StateTensors]], **options: Any) -> None:
    """Step flat tensors in copies that are filled up and joined, and write these back.

    Args:
        tensors: parameter, gradient and state; with 8-bit moments whole groups, but for the last.
    """
    columns = list(zip(*((param, grad, *state) for param, grad, state in tensors), strict=True))
    filled = _filled_sizes(columns[0])
    n_scales = 2  # the last columns, which have nothing to fill up
    sizes = [filled] * (len(columns) - n_scales)
    sizes += [[0 if scale is None else scale.numel() for scale in column] for column in columns[-n_scales:]]

    def join(column: Sequence[Any], sizes: Sequence[int]) -> Any:
        if column[0] is None:
            return None
        fills = [column[0].new_zeros(size - tensor.numel()) for tensor, size in zip(column, sizes, strict=True)]
        return torch.cat([each for pair in zip(column, fills, strict=True) for each in pair])

    joined = [join(*each) for each in zip(columns, sizes, strict=True)]
    reference.adamw_(joined[0], joined[1], StateTensors(*joined[2:]), **options)
    for i, values in enumerate(joined):
        if values is not None and i != 1:  # the gradients
            parts = zip(values.split(sizes[i]), columns[i], strict=True)
            torch._foreach_copy_(list(columns[i]), [part[: tensor.numel()] for part, tensor in parts])


def _filled_sizes(params: Sequence[Tensor]) -> list[int]:
    """Return how many elements each takes where they are joined.

    Eight elements share random bits; all together are whole vectors.
    """
    sizes = [param.numel() + -param.numel() % 8 for param in params]
    sizes[-1] += -sum(sizes) % _VECTOR
    return sizes


def is_skipped(decision: Tensor) -> bool:
    """Read the flag of `GradDecision.values`; tensors without values skip nothing."""
    return not is_simulated(decision) and bool(decision[1].item())


@contextmanager
def flat_views(param: Tensor, grad: Tensor, state: StateTensors) -> Iterator[tuple[Tensor, Tensor, StateTensors]]:
    """Yield real tensors that can be walked through memory side by side.

    What has gaps, or another order than the parameter, takes part as a copy, and is written back at the end.
    """
    work = dense(param)
    copies: list[tuple[Tensor, Tensor]] = [] if work is param else [(param, work)]

    def like_work(tensor: Tensor) -> Tensor:
        tensor = tensor.resolve_conj().resolve_neg()
        return tensor if same_strides(tensor, work) else torch.empty_like(work, dtype=tensor.dtype).copy_(tensor)

    def entry(tensor: Tensor) -> Tensor:
        if tensor is state.exp_avg_scale or tensor is state.exp_avg_sq_scale:
            return tensor  # it has no element for each of the parameter's
        copy = like_work(tensor)
        if copy is not tensor:
            copies.append((tensor, copy))
        return real_view(copy)

    yield real_view(work), real_view(like_work(grad)), state.map(entry)
    for tensor, copy in copies:
        tensor.copy_(copy)


@torch.no_grad()
def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int | Tensor,
    lr: float | Tensor,
    betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    max_exp_avg_sq: Tensor | None = None,
    maximize: bool = False,
    cautious: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    param_remainder: Tensor | None = None,
    master_param: Tensor | None = None,
    exp_avg_scale: Tensor | None = None,
    exp_avg_sq_scale: Tensor | None = None,
    stochastic_rounding: bool = False,
    seed: int = 0,
    stream: int = 0,
    element_offset: int = 0,
) -> None:
    """One AdamW update of one tensor and its state, in place: what `AdamW.step` does to each parameter.

    Args:
        param: float32, bfloat16, float16, float64 or complex tensor of any shape and strides.
        grad: gradient in param's shape, of any of these dtypes; not modified.
        exp_avg, exp_avg_sq: moments in param's shape, of any of these dtypes, or int8 and uint8 with scales; zeros
            before the first update.
        step: number of this update, 1 for the first. Not incremented.
        lr, betas, eps, weight_decay, maximize, cautious: as for `AdamW`.
        max_exp_avg_sq: running maximum of exp_avg_sq; given, the update is AMSGrad's.
        grad_scale: one-element tensor that the gradient is divided by.
        found_inf: one-element tensor; if it is not 0, nothing is written.
        param_remainder: what completes a bfloat16 param to its master weight: int8 in its shape, or 16 bits as two
            bytes, uint8 with a last dimension of 2.
        master_param: float32 in param's shape: the master weight, which param is rounded from.
        exp_avg_scale, exp_avg_sq_scale: float32 of ceil(n / 128) elements for n of param, in the order of its memory,
            with 8-bit moments.
        stochastic_rounding: round what is stored in bfloat16, 8-bit moments and a remainder of 8 bits stochastically,
            by random bits of (seed, step, stream, index of the element).
        stream: number that tells parameters apart.
        element_offset: index of param's first element in the tensor whose slice it is.

    Raises:
        ValueError: a hyper-parameter out of range, step < 1, a param whose elements share memory, or stochastic
            rounding of nothing.
        TypeError: a param of integer or another dtype that cannot be optimized.
        RuntimeError: grad or state of another shape or device than param, or a sparse grad.

    Example:
        >>> param, grad = torch.ones(3), torch.ones(3)
        >>> exp_avg, exp_avg_sq = torch.zeros(3), torch.zeros(3)
        >>> adamw_(param, grad, exp_avg, exp_avg_sq, step=1, lr=0.1, weight_decay=0.0)
        >>> param
        tensor([0.9000, 0.9000, 0.9000])
    """
    options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    check_hyperparams(options)
    if step < 1:
        raise ValueError(f"step must be at least 1, the number of this update; got {step}")
    check_param(param)
    check_grad(param, grad)
    if param_remainder is not None and master_param is not None:
        raise ValueError("got param_remainder and master_param; a parameter has one of them")
    entries = {
        "exp_avg_codes" if exp_avg.dtype == torch.int8 else "exp_avg": exp_avg,
        "exp_avg_sq_codes" if exp_avg_sq.dtype == torch.uint8 else "exp_avg_sq": exp_avg_sq,
        "max_exp_avg_sq": max_exp_avg_sq,
        "param_remainder": param_remainder,
        "master_param": master_param,
        "exp_avg_scale": exp_avg_scale,
        "exp_avg_sq_scale": exp_avg_sq_scale,
    }
    entries = {name: entry for name, entry in entries.items() if entry is not None}
    check_entries(param, entries)
    state = StateTensors.from_entries(entries, amsgrad=max_exp_avg_sq is not None)
    numbers = {"seed": seed, "stream": stream, "element_offset": element_offset}
    check_rounding(param, grad, state, stochastic=stochastic_rounding, numbers=numbers)

    noise_key = NoiseKey(seed, stream, element_offset) if stochastic_rounding else None
    hyperparams = Hyperparams.from_group(options)
    scaler = GradScalerInputs(grad_scale, found_inf).to(param.device)
    decision = decide(None, scaler, GradNormOptions()) if scaler.present else None
    how: dict[str, Any] = {"maximize": maximize, "cautious": cautious, "decision": decision, "noise_key": noise_key}
    if launch.can_launch(param):
        dtype = torch.float64 if param.dtype.to_real() == torch.float64 else torch.float32
        # A small pageable copy does not wait for the device.
        scalars = torch.tensor(kernel_scalars(hyperparams, float(step)), dtype=dtype, device="cpu")
        step_tensor(param, grad, state, scalars.to(param.device, non_blocking=True), **how)
        torch.autograd.graph.increment_version([param, *state.present])
    elif decision is None or not is_skipped(decision):
        step_tensor_eager(param, grad, state, hyperparams, float(step), **how)
