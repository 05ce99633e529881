"""What is refused, in a sentence that says what was given and what to do instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .layout import overlaps_itself
from .storage import EIGHT_BITS, GROUP_SIZE, SCALES

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    tensors = {"lr": lr, "betas[0]": beta1, "betas[1]": beta2, "weight_decay": options["weight_decay"]}
    for name, value in tensors.items():
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


def check_entries(param: Tensor, entries: Mapping[str, Any]) -> None:
    """Refuse state that does not belong to the parameter, or whose parts do not belong together.

    Raises:
        RuntimeError: an entry that is not a tensor, or of another shape, device or kind of number than the
            parameter, an 8-bit moment without its scale, or a remainder of a parameter that has none.
    """
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "param_remainder", "master_param"):
        if name in entries:
            _check_entry(param, name, entries[name])
    coded = [name for name in _OF_SMALL if name in entries]
    coded += [name for name in SCALES if name in entries and entries[name].dtype == EIGHT_BITS[name]]
    if coded and param.dtype not in _SMALL:
        raise RuntimeError(
            f"state {coded[0]!r} ({_describe(entries[coded[0]])}) is for float32, bfloat16 and float16 parameters; "
            f"got one of dtype {param.dtype}"
        )
    for name, scale in SCALES.items():
        is_coded = name in entries and entries[name].dtype == EIGHT_BITS[name]
        if is_coded != (scale in entries):
            raise RuntimeError(
                f"state {name!r} of dtype {entries[name].dtype if name in entries else None} does not go with "
                f"{'a' if scale in entries else 'no'} state {scale!r}: {EIGHT_BITS[name]} has it, and nothing else"
            )
        if is_coded:
            expected = -(-param.numel() // GROUP_SIZE)
            value = entries[scale]
            if (
                not isinstance(value, Tensor)
                or value.shape != (expected,)
                or value.dtype != torch.float32
                or value.device != param.device
                or not value.is_contiguous()
            ):
                given = _describe(value) if isinstance(value, Tensor) else type(value).__name__
                raise RuntimeError(
                    f"state {scale!r} ({given}) must be float32 of shape ({expected},), contiguous, on {param.device}: "
                    f"one for each {GROUP_SIZE} of {param.numel()} elements"
                )


def check_rounding(param: Tensor, entries: Mapping[str, Any], *, stochastic: bool, numbers: Mapping[str, int]) -> None:
    """Refuse stochastic rounding where there is nothing to round, and what belongs to it without it.

    Args:
        numbers: seed, stream and element_offset.

    Raises:
        ValueError: which of them, and what to do instead.
    """
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{name} must be an integer, got {value!r}")
        limit = 2**31 if name == "stream" else 2**63
        if not 0 <= value < limit:
            raise ValueError(f"{name} must be from 0 to {limit} - 1; got {value}")
        if value and not stochastic:
            raise ValueError(f"{name}={value} is of stochastic rounding; give it with stochastic_rounding=True")
    if not stochastic:
        return
    remainder = entries.get("param_remainder")
    stored = [entries["exp_avg"].dtype, entries["exp_avg_sq"].dtype]
    stored += [param.dtype] if remainder is None and "master_param" not in entries else []
    rounds = torch.bfloat16 in stored or (remainder is not None and remainder.dtype == torch.int8)
    if param.dtype not in _SMALL or not rounds:
        raise ValueError(
            f"stochastic_rounding=True rounds what is stored in bfloat16, and 24-bit master weights, of float32, "
            f"bfloat16 and float16 parameters; got a parameter of {param.dtype}, moments of {stored[0]} and {stored[1]}"
        )


def _check_entry(param: Tensor, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise RuntimeError(f"state {name!r} must be a tensor, got {type(value).__name__}")
    is_moment = name not in ("param_remainder", "master_param")
    if (
        value.shape != param.shape
        or value.device != param.device
        or (is_moment and value.is_complex() != param.is_complex())
    ):
        raise RuntimeError(
            f"state {name!r} ({_describe(value)}) does not match its parameter ({_describe(param)}); "
            f"move the model before the optimizer's first step, or load_state_dict() after moving it"
        )
    if is_moment and not (_is_supported(value.dtype) or value.dtype == EIGHT_BITS.get(name)):
        raise RuntimeError(f"state {name!r} of dtype {value.dtype} is not supported; use a floating-point dtype")
    if name == "param_remainder" and (value.dtype not in (torch.int16, torch.int8) or param.dtype != torch.bfloat16):
        raise RuntimeError(
            f"state {name!r} must be int16 or int8, of a bfloat16 parameter; got {value.dtype} of a {param.dtype} one"
        )
    if name == "master_param" and value.dtype != torch.float32:
        raise RuntimeError(f"state {name!r} must be float32, got {value.dtype}")


_SMALL = (torch.float32, torch.bfloat16, torch.float16)
_OF_SMALL = ("param_remainder", "master_param")
_MOMENT_DTYPES = {
    "exp_avg_dtype": (torch.float32, torch.bfloat16, torch.float16, torch.int8),
    "exp_avg_sq_dtype": (torch.float32, torch.bfloat16, torch.float16, torch.uint8),
}
_OPTIONS = ("exp_avg_dtype", "exp_avg_sq_dtype", "master_weight_bits", "stochastic_rounding")


def check_storage(options: Mapping, params: Sequence[Tensor]) -> None:
    """Refuse storage options that cannot work for a group of parameters.

    Raises:
        ValueError: which options, for which parameters, and what to do instead.
    """
    for name, allowed in _MOMENT_DTYPES.items():
        if options[name] is not None and options[name] not in allowed:
            raise ValueError(f"{name} must be None or one of {', '.join(map(str, allowed))}; got {options[name]!r}")
    seed = options["seed"]
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an integer from 0 to 2**63 - 1; got {seed!r}")
    if options["amsgrad"] and options["exp_avg_sq_dtype"] == torch.uint8:
        raise ValueError("amsgrad=True needs an exp_avg_sq_dtype other than uint8: a maximum of codes is not kept")
    bits = options["master_weight_bits"]
    if bits is not None and (type(bits) is not int or bits not in (24, 32)):
        raise ValueError(f"master_weight_bits must be None, 24 or 32; got {bits!r}")
    if not any(options[name] for name in _OPTIONS):
        return
    for param in params:
        of_param = f"a parameter of dtype {param.dtype} (shape {tuple(param.shape)})"
        if param.dtype not in _SMALL:
            raise ValueError(
                f"storage options are for float32, bfloat16 and float16; got {of_param}. "
                f"Put it into a param group without them"
            )
        if bits is not None and param.dtype == torch.float32:
            raise ValueError(
                f"master_weight_bits={bits} is for bfloat16 and float16 parameters; got {of_param}, which is its own "
                f"master. Split the groups with param_groups_master_weights(groups, {bits})"
            )
        if bits == 24 and param.dtype == torch.float16:
            raise ValueError(f"master_weight_bits=24 is for bfloat16; got {of_param}. Use master_weight_bits=32")
        if options["exp_avg_sq_dtype"] == torch.float16 and param.dtype != torch.float16:
            raise ValueError(
                f"exp_avg_sq_dtype=torch.float16 is for float16 parameters, whose gradients have its range; "
                f"got {of_param}. Use bfloat16 or float32"
            )
    if options["stochastic_rounding"] and params and not _rounds_something(options, params):
        raise ValueError(
            "stochastic_rounding=True rounds what is stored in bfloat16, and 24-bit master weights; this group has "
            "neither. Leave it out, or store the moments in bfloat16"
        )


def _rounds_something(options: Mapping, params: Sequence[Tensor]) -> bool:
    bits = options["master_weight_bits"]
    for param in params:
        default = param.dtype if bits is None else torch.float32
        moments = (options["exp_avg_dtype"] or default, options["exp_avg_sq_dtype"] or default)
        if torch.bfloat16 in moments or (param.dtype == torch.bfloat16 and bits != 32):
            return True
    return False
