"""What is refused, in a sentence that says what was given and what to do instead."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one piece of memory without gaps or overlaps, in any order of dimensions."""
    expected = 1
    for stride, size in _dimensions(tensor):
        if stride != expected:
            return False
        expected *= size
    return True


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape lay their elements out alike; strides of dimensions of size 1 are moot."""
    return a.numel() == 0 or all(
        size == 1 or x == y for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements share memory, as after `expand`."""
    reach = 1
    for stride, size in _dimensions(tensor):
        if stride < reach:
            # Not nested: either overlapping or interleaved, which only counting the places can tell.
            span = 1 + sum((s - 1) * t for s, t in zip(tensor.shape, tensor.stride(), strict=True))
            places = torch.arange(span).as_strided(tensor.shape, tensor.stride())
            return bool(places.unique().numel() < tensor.numel())
        reach = stride * (size - 1) + reach
    return False


def _dimensions(tensor: Tensor) -> list[tuple[int, int]]:
    if tensor.numel() == 0:
        return []
    return sorted((t, s) for s, t in zip(tensor.shape, tensor.stride(), strict=True) if s != 1)


def _is_supported(dtype: torch.dtype) -> bool:
    return (dtype.to_real() if dtype.is_complex else dtype) in DTYPES


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}, {tensor.dtype}, on {tensor.device}"


def check_hyper(options: Mapping) -> None:
    """Refuse hyper-parameters that torch.optim.AdamW refuses.

    Raises:
        ValueError: lr, eps or weight_decay negative, a beta outside [0, 1), or a tensor of several elements.
    """
    lr, (beta1, beta2) = options["lr"], options["betas"]
    for name, value in (("lr", lr), ("betas[0]", beta1), ("betas[1]", beta2)):
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element, got shape {tuple(value.shape)}")
    # `not >=` rather than `<`, so that NaN is refused too.
    for name, value in (
        ("learning rate", lr),
        ("epsilon value", options["eps"]),
        ("weight_decay value", options["weight_decay"]),
    ):
        if not value >= 0.0:
            raise ValueError(f"Invalid {name}: {value}; it must be at least 0")
    for index, beta in enumerate((beta1, beta2)):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}; it must be in [0, 1)")


def check_implementation(options: Mapping) -> None:
    """Refuse what this package does not do, rather than ignore it."""
    if options["differentiable"]:
        raise ValueError(
            "differentiable=True is not supported: the step writes in place, outside of autograd. "
            "Use torch.optim.AdamW(..., differentiable=True) to differentiate through a step."
        )
    if options["capturable"]:
        raise ValueError(
            "capturable=True is not supported: the step count lives on the host. "
            "Use capturable=False, and keep optimizer.step() outside of the CUDA graph."
        )


def check_param(param: Tensor) -> None:
    """Refuse a parameter that no update can be written to.

    Raises:
        TypeError: neither floating point nor complex, or of a dtype without kernels.
        ValueError: elements that share memory.
    """
    if not _is_supported(param.dtype):
        raise TypeError(
            f"cannot optimize a parameter of dtype {param.dtype} (shape {tuple(param.shape)}); "
            f"use float32, bfloat16, float16, float64 or a complex dtype"
        )
    if param.is_conj() or param.is_neg():
        raise ValueError(
            f"cannot optimize a lazily conjugated or negated view (shape {tuple(param.shape)}); "
            f"call .resolve_conj().resolve_neg() first"
        )
    if overlaps_itself(param):
        raise ValueError(
            f"cannot optimize a parameter whose elements share memory (shape {tuple(param.shape)}, strides "
            f"{param.stride()}), as after expand(); optimize the tensor it was expanded from, or a .clone()"
        )


def check_grad(param: Tensor, grad: Tensor) -> None:
    """Refuse a gradient that does not belong to the parameter.

    Raises:
        RuntimeError: sparse, or of another shape, device or kind of number than the parameter.
    """
    if grad.layout != torch.strided:
        raise RuntimeError(
            "AdamW does not support sparse gradients, please consider torch.optim.SparseAdam instead "
            f"(got a gradient of layout {grad.layout} for a parameter of shape {tuple(param.shape)})"
        )
    if grad.shape != param.shape or grad.device != param.device or grad.is_complex() != param.is_complex():
        raise RuntimeError(
            f"gradient ({_describe(grad)}) does not match its parameter ({_describe(param)}); "
            f"assign p.grad a tensor of the parameter's shape on its device"
        )
    if (grad.dtype.to_real() if grad.is_complex() else grad.dtype) not in DTYPES:
        raise RuntimeError(
            f"gradient of dtype {grad.dtype} is not supported; use float32, bfloat16, float16 or float64"
        )


def check_state(param: Tensor, name: str, value: object) -> None:
    """Refuse a state tensor that does not belong to the parameter.

    Raises:
        RuntimeError: not a tensor, or of another shape, device or kind of number than the parameter.
    """
    if not isinstance(value, Tensor):
        raise RuntimeError(f"state {name!r} must be a tensor, got {type(value).__name__}")
    if value.shape != param.shape or value.device != param.device or value.is_complex() != param.is_complex():
        raise RuntimeError(
            f"state {name!r} ({_describe(value)}) does not match its parameter ({_describe(param)}); "
            f"move the model before the optimizer's first step, or load_state_dict() after moving it"
        )
    if not _is_supported(value.dtype):
        raise RuntimeError(f"state {name!r} of dtype {value.dtype} is not supported; use a floating-point dtype")
