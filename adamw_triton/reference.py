"""The AdamW step in eager torch: the specification of the kernels, and what runs where they do not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import storage
from .storage import JoinedKeys, NoiseKey, StateTensors


def adamw_(
    param: Tensor,
    grad: Tensor,
    state: StateTensors,
    *,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decay_lr: float = 1.0,
    maximize: bool = False,
    cautious: bool = False,
    grad_factor: Tensor | None = None,
    noise_key: NoiseKey | JoinedKeys | None = None,
    first_element: int = 0,
    fused: bool = False,
    statistics: Tensor | None = None,
) -> None:
    """Update number `step` (1 is the first) of one real parameter and its state, in place.

    Arithmetic is in float32, or float64 for a float64 parameter, whatever the storage; each value is
    rounded to its storage once, at the end. In float32 these are the operations of torch.optim.AdamW's
    single-tensor loop in their order, and the results are the same bits.

    Args:
        param, grad, and moments with floating dtypes: same shape, any strides. grad is not modified.
        state: a master, 8-bit moments and `noise_key` need all of them flat.
        decay_lr: weight_decay is multiplied by lr / decay_lr.
        cautious: decay only where that moves the parameter as the update does.
        grad_factor: 0-d tensor that the gradient is multiplied by.
        noise_key: of stochastic rounding, where it is given.
        first_element: index of the first element of param in the tensor that the key is of.
        fused: take torch's fused CPU step for the formula, whose last bits are others; not for the gaps in strided
            tensors, a maximum (of which it drops a NaN) and cautious decay.
        statistics: two elements, set to the sums of squares of the parameter's change and of the new parameter, before
            they are rounded.
    """
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    p, m, v = (
        _load_param(param, state).to(dtype),
        _load("exp_avg", state).to(dtype),
        _load("exp_avg_sq", state).to(dtype),
    )
    largest = None if state.max_exp_avg_sq is None else state.max_exp_avg_sq.to(dtype)
    g = grad.to(dtype)
    if grad_factor is not None:
        g = g * grad_factor.to(dtype)
    if maximize:
        g = -g

    old = None if statistics is None else p.clone()
    hyperparams = _Hyperparams(lr, beta1, beta2, eps, weight_decay / decay_lr)
    if fused:
        _fused_update(p, g, m, v, step, hyperparams)
    else:
        _update(p, g, m, v, largest, step, hyperparams, cautious=cautious)
    if statistics is not None and old is not None:
        statistics.copy_(torch.stack([value.double().square().sum() for value in (p - old, p)]))

    of_param, of_exp_avg, of_exp_avg_sq = (
        (None,) * 3 if noise_key is None else _noise(noise_key, first_element, step, param, state, p)
    )
    _store_param(param, state, p, of_param)
    _store("exp_avg", state, m, of_exp_avg)
    _store("exp_avg_sq", state, v, of_exp_avg_sq)
    if state.max_exp_avg_sq is not None and largest is not None:
        _write(state.max_exp_avg_sq, largest, of_exp_avg_sq)


class _Hyperparams(NamedTuple):
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def _update(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    largest: Tensor | None,
    step: float,
    hyperparams: _Hyperparams,
    *,
    cautious: bool,
) -> None:
    lr, beta1, beta2, eps, weight_decay = hyperparams
    decay = 1 - lr * weight_decay
    if weight_decay != 0 and not cautious:
        p.mul_(decay)
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    second_moment = v if largest is None else torch.maximum(largest, v, out=largest)
    bias_correction1 = 1 - beta1**step
    bias_correction2 = 1 - beta2**step
    denominator = (second_moment.sqrt() / bias_correction2**0.5).add_(eps)
    if cautious:
        # In the arithmetic's dtype: where() of two numbers would make the default one.
        p.mul_(torch.where(m / denominator * p >= 0, torch.full_like(p, decay), 1.0))
    p.addcdiv_(m, denominator, value=-lr / bias_correction1)


def _fused_update(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: float, hyperparams: _Hyperparams) -> None:
    count = torch.tensor(float(step), dtype=torch.float32, device="cpu")
    options: dict[str, Any] = {**hyperparams._asdict(), "amsgrad": False, "maximize": False}
    torch._fused_adamw_([p], [g], [m], [v], [], [count], **options)


def _noise(
    key: NoiseKey | JoinedKeys, first: int, step: float, param: Tensor, state: StateTensors, new_param: Tensor
) -> Iterable[Tensor]:
    dtypes = [state.exp_avg.dtype, state.exp_avg_sq.dtype, *([param.dtype] if state.master is None else [])]
    guarded = new_param if torch.bfloat16 in dtypes else None  # a NaN to which bits are added can become a number
    of_param, of_exp_avg, of_exp_avg_sq = storage.noise(key, int(step), param.numel(), guarded, param.device, first)
    both_coded = state.exp_avg_scale is not None and state.exp_avg_sq_scale is not None
    return of_param, of_exp_avg, of_exp_avg if both_coded else of_exp_avg_sq


def _load_param(param: Tensor, state: StateTensors) -> Tensor:
    if state.master is None:
        return param
    if state.master.is_floating_point():
        return storage.master_weight(param, {"master_param": state.master})
    return storage.join(param, state.master)


def _load(name: str, state: StateTensors) -> Tensor:
    stored, scale = getattr(state, name), getattr(state, storage.CODED[name].scale)
    return stored if scale is None else storage.decode(name, stored, scale)


def _write(tensor: Tensor, value: Tensor, noise: Tensor | None) -> None:
    if value is not tensor:
        tensor.copy_(
            value if noise is None or tensor.dtype != torch.bfloat16 else storage.round_to_bfloat16(value, noise)
        )


def _store_param(param: Tensor, state: StateTensors, value: Tensor, noise: Tensor | None) -> None:
    if state.master is None:
        _write(param, value, noise)
    elif state.master.is_floating_point():
        _write_all((param, state.master), (value, value))
    else:
        _write_all((param, state.master), storage.split(value, state.master.dtype, noise))


def _store(name: str, state: StateTensors, value: Tensor, noise: Tensor | None) -> None:
    stored, scale = getattr(state, name), getattr(state, storage.CODED[name].scale)
    if scale is None:
        _write(stored, value, noise)
    else:
        _write_all((stored, scale), storage.encode(name, value, noise))


def _write_all(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        _write(tensor, value, None)
