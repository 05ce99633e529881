"""What is refused, in a sentence that says what was given and what to do instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from .dtensors import is_dtensor
from .storage import CODED, GROUP_SIZE, MASTER_ENTRIES, ROUNDED_PARAMS, Formats, StateTensors, n_groups, remainder_of
from .strides import overlaps_itself

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FLOATS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_SPECIAL = (*(coded.codes for coded in CODED.values()), *MASTER_ENTRIES)
LIKE_PARAM = (*_FLOATS, *_SPECIAL)  # state entries that have something for each of the parameter's elements
_MOMENT_DTYPES = {
    "exp_avg_dtype": (torch.float32, torch.bfloat16, torch.float16, torch.int8),
    "exp_avg_sq_dtype": (torch.float32, torch.bfloat16, torch.float16, torch.uint8),
}
_STORAGE = ("exp_avg_dtype", "exp_avg_sq_dtype", "master_weight_bits", "stochastic_rounding")


def is_simulated(tensor: Tensor) -> bool:
    """Whether a tensor stands for one without having values: meta and fake tensors."""
    return tensor.device.type == "meta" or isinstance(tensor, FakeTensor)


def check_memory(tensor: Tensor, what: str) -> None:
    """Refuse a tensor whose elements lie in other tensors, which the kernels cannot find.

    Args:
        tensor: any tensor.
        what: what it is, for the message.

    Raises:
        RuntimeError: a wrapper subclass, like DTensor.
    """
    if type(tensor) in (Tensor, torch.nn.Parameter) or is_simulated(tensor):
        return
    if is_dtensor(tensor):
        raise RuntimeError(
            f"{what} is a DTensor where a plain tensor is needed; use its local tensor (to_local()), or for the state "
            f"of a parameter torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
        )
    try:
        has_memory = tensor.numel() == 0 or tensor.data_ptr() != 0
    except RuntimeError:  # some wrappers refuse the question
        has_memory = False
    if not has_memory or hasattr(tensor, "__tensor_flatten__"):
        raise RuntimeError(
            f"{what} is a {type(tensor).__name__}, a tensor without memory of its own, which AdamW does not "
            f"support; use plain tensors, or torch.optim.AdamW"
        )


def check_hyperparams(options: Mapping) -> None:
    """Refuse hyper-parameters that torch.optim.AdamW refuses; the values of tensors on a GPU are not read.

    Raises:
        ValueError: lr, eps or weight_decay negative, a beta outside [0, 1), or a tensor of several elements.
    """
    lr, (beta1, beta2) = options["lr"], options["betas"]
    weight_decay = options["weight_decay"]
    for name, value in {"lr": lr, "betas[0]": beta1, "betas[1]": beta2, "weight_decay": weight_decay}.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element, got shape {tuple(value.shape)}")
    # `not >=` rather than `<`, so that NaN is refused too.
    for name, value in (
        ("learning rate", lr),
        ("epsilon value", options["eps"]),
        ("weight_decay value", weight_decay),
    ):
        if _is_on_host(value) and not value >= 0.0:
            raise ValueError(f"Invalid {name}: {value}; it must be at least 0")
    for index, beta in enumerate((beta1, beta2)):
        if _is_on_host(beta) and not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}; it must be in [0, 1)")


def _is_on_host(value: float | Tensor) -> bool:
    return not isinstance(value, Tensor) or (value.device.type == "cpu" and not is_simulated(value))


def check_implementation(options: Mapping) -> None:
    """Refuse what this package does not do, rather than ignore it.

    Raises:
        ValueError: differentiable=True.
    """
    if options["differentiable"]:
        raise ValueError(
            "differentiable=True is not supported: the step writes in place, outside of autograd. "
            "Use torch.optim.AdamW(..., differentiable=True) to differentiate through a step."
        )


def check_param(param: Tensor) -> None:
    """Refuse a parameter that no update can be written to.

    Raises:
        RuntimeError: no memory of its own.
        TypeError: neither floating point nor complex, or of a dtype without kernels.
        ValueError: elements that share memory.
    """
    check_memory(param, "a parameter")
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
        RuntimeError: sparse, without memory of its own, or of another shape, device or kind of number than the
            parameter.
    """
    if grad.layout != torch.strided:
        raise RuntimeError(
            "AdamW does not support sparse gradients, please consider torch.optim.SparseAdam instead "
            f"(got a gradient of layout {grad.layout} for a parameter of shape {tuple(param.shape)})"
        )
    check_memory(grad, "a gradient")
    if grad.shape != param.shape or grad.device != param.device or grad.is_complex() != param.is_complex():
        raise RuntimeError(
            f"gradient ({_describe(grad)}) does not match its parameter ({_describe(param)}); "
            f"assign p.grad a tensor of the parameter's shape on its device"
        )
    if not _is_supported(grad.dtype):
        raise RuntimeError(
            f"gradient of dtype {grad.dtype} is not supported; use float32, bfloat16, float16 or float64"
        )


def shape_of_entry(name: str, dtype: torch.dtype, param: Tensor) -> torch.Size:
    """Return the shape of a state entry that has something for each of the parameter's elements."""
    two_bytes = name == "param_remainder" and dtype == torch.uint8
    return torch.Size((*param.shape, 2)) if two_bytes else param.shape


def check_entries(param: Tensor, entries: Mapping[str, Any]) -> None:
    """Refuse state that does not belong to the parameter, or whose parts do not belong together.

    Raises:
        RuntimeError: an entry that is not a tensor, or of another shape, device or kind of number than the
            parameter, codes without their scale, a moment twice, or a remainder of a parameter that has none.
    """
    for name in LIKE_PARAM:
        if name in entries:
            _check_entry(param, name, entries[name])
    special = [name for name in _SPECIAL if name in entries]
    if special and param.dtype not in ROUNDED_PARAMS:
        raise RuntimeError(
            f"state {special[0]!r} ({_describe(entries[special[0]])}) is for float32, bfloat16 and float16 parameters; "
            f"got one of dtype {param.dtype}"
        )
    for name, coded in CODED.items():
        if (coded.codes in entries) != (coded.scale in entries):
            has, lacks = (coded.codes, coded.scale) if coded.codes in entries else (coded.scale, coded.codes)
            raise RuntimeError(f"state {has!r} is there, but not {lacks!r}, which belongs to it")
        if coded.codes in entries and name in entries:
            raise RuntimeError(
                f"state has {name!r} and {coded.codes!r}; a moment is stored as one of them. full_state_dict=True of "
                f"torch.distributed.checkpoint merges what it loads into what is there: leave it out"
            )
        if coded.scale in entries:
            _check_scale(param, coded.scale, entries[coded.scale])
    step = entries.get("step", 0.0)
    if isinstance(step, Tensor):
        check_memory(step, "state 'step'")
        if step.numel() != 1:
            raise RuntimeError(f"state 'step' must have one element, got shape {tuple(step.shape)}")


def _check_entry(param: Tensor, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise RuntimeError(f"state {name!r} must be a tensor, got {type(value).__name__}")
    check_memory(value, f"state {name!r}")
    is_float = name in _FLOATS
    if (
        value.shape != shape_of_entry(name, value.dtype, param)
        or value.device != param.device
        or (is_float and value.is_complex() != param.is_complex())
    ):
        raise RuntimeError(
            f"state {name!r} ({_describe(value)}) does not match its parameter ({_describe(param)}); "
            f"move the model before the optimizer's first step, or load_state_dict() after moving it"
        )
    if is_float and not _is_supported(value.dtype):
        codes = f", or codes as {CODED[name].codes!r}" if name in CODED else ""
        raise RuntimeError(f"state {name!r} of dtype {value.dtype} is not supported; use a floating-point dtype{codes}")
    for coded in CODED.values():
        if name == coded.codes and value.dtype != coded.dtype:
            raise RuntimeError(f"state {name!r} must be {coded.dtype}, got {value.dtype}")
    if name == "param_remainder":
        _check_remainder(param, value)
    if name == "master_param" and value.dtype != torch.float32:
        raise RuntimeError(f"state {name!r} must be float32, got {value.dtype}")


def _check_remainder(param: Tensor, value: Tensor) -> None:
    if value.dtype not in (torch.uint8, torch.int8, torch.int16) or param.dtype != torch.bfloat16:
        raise RuntimeError(
            f"state 'param_remainder' must be int8, or uint8 with a last dimension of 2, of a bfloat16 parameter; got "
            f"{value.dtype} of a {param.dtype} one"
        )
    try:
        remainder_of(value)
    except RuntimeError as error:
        raise RuntimeError(
            f"the two bytes of each element of state 'param_remainder' must lie together, at a multiple of 2 bytes; "
            f"got strides {value.stride()} and offset {value.storage_offset()}"
        ) from error


def _check_scale(param: Tensor, name: str, value: object) -> None:
    expected = n_groups(param.numel())
    if isinstance(value, Tensor):
        check_memory(value, f"state {name!r}")
    if (
        not isinstance(value, Tensor)
        or value.numel() != expected
        or value.dtype != torch.float32
        or value.device != param.device
        or not value.is_contiguous()
    ):
        given = _describe(value) if isinstance(value, Tensor) else type(value).__name__
        raise RuntimeError(
            f"state {name!r} ({given}) must be float32 of {expected} elements, contiguous, on {param.device}: "
            f"one for each {GROUP_SIZE} of {param.numel()} elements"
        )


def check_rounding(
    param: Tensor, grad: Tensor, state: StateTensors, *, stochastic: bool, numbers: Mapping[str, int]
) -> None:
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
    formats = Formats.of(param, grad.dtype, state)
    if stochastic and not formats.can_round_stochastically:
        raise ValueError(
            f"stochastic_rounding=True rounds what is stored in bfloat16, 8-bit moments and 24-bit master weights, of "
            f"float32, bfloat16 and float16 parameters; got a parameter of {param.dtype}, moments of {formats.exp_avg} "
            f"and {formats.exp_avg_sq}"
        )


def check_option_values(options: Mapping) -> None:
    """Refuse values of options that torch's AdamW does not have and that work for no parameter.

    Raises:
        ValueError: which option, and what it may be.
    """
    for name, allowed in _MOMENT_DTYPES.items():
        if options[name] is not None and options[name] not in allowed:
            raise ValueError(f"{name} must be None or one of {', '.join(map(str, allowed))}; got {options[name]!r}")
    for name in ("stochastic_rounding", "cautious", "decouple_lr"):
        if not isinstance(options[name], bool):
            either = "None, True or False" if name == "stochastic_rounding" else "True or False"
            raise ValueError(f"{name} must be {either}; got {options[name]!r}")
    seed = options["seed"]
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an integer from 0 to 2**63 - 1; got {seed!r}")
    bits = options["master_weight_bits"]
    if bits is not None and (type(bits) is not int or bits not in (24, 32)):
        raise ValueError(f"master_weight_bits must be None, 24 or 32; got {bits!r}")


def check_decay_lr(options: Mapping) -> None:
    """Refuse `decouple_lr` without a learning rate to divide by.

    Raises:
        ValueError: that was 0 when it was set.
    """
    if options["decouple_lr"] and not (options["decay_lr"] or 0) > 0:
        raise ValueError(
            f"decouple_lr=True decays by weight_decay * lr / initial lr; the initial lr must be above 0, got "
            f"{options['lr'] if options['decay_lr'] is None else options['decay_lr']}"
        )


def check_storage(options: Mapping, params: Sequence[Tensor]) -> None:
    """Refuse storage options that cannot work for a group of parameters that are stepped.

    Raises:
        ValueError: which options, for which parameters, and what to do instead.
    """
    check_option_values(options)
    bits = options["master_weight_bits"]
    if options["amsgrad"] and options["exp_avg_sq_dtype"] == torch.uint8:
        raise ValueError("amsgrad=True needs an exp_avg_sq_dtype other than uint8: a maximum of codes is not kept")
    if not any(options[name] for name in _STORAGE):
        return
    for param in params:
        _check_storage_of(param, options, bits)
    if options["stochastic_rounding"] and params and not _rounds_something(options, params):
        raise ValueError(
            "stochastic_rounding=True rounds what is stored in bfloat16, 8-bit moments and 24-bit master weights; this "
            "group has none of them. Leave it out, or store the moments in bfloat16 or 8 bits"
        )


def check_group(options: Mapping, *, seed_given: bool) -> None:
    """Refuse a group with all its options that cannot be stepped.

    Raises:
        ValueError: of `check_storage` and `check_decay_lr`, or a seed of the group's own without stochastic rounding.
    """
    check_storage(options, [param for param in options["params"] if is_trainable(param)])
    check_decay_lr(options)
    if seed_given and not options["stochastic_rounding"]:
        refuse_seed(options["seed"])


def refuse_seed(seed: int) -> None:
    """Refuse a seed where nothing is rounded stochastically."""
    if seed != 0:
        raise ValueError(
            f"seed={seed} is of stochastic rounding; leave it out, or store moments in 8 bits, or low-precision "
            f"parameters with stochastic_rounding=True"
        )


def _check_storage_of(param: Tensor, options: Mapping, bits: int | None) -> None:
    of_param = f"a parameter of dtype {param.dtype} (shape {tuple(param.shape)})"
    if param.dtype not in ROUNDED_PARAMS:
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


def is_trainable(param: Tensor) -> bool:
    """Whether a parameter is going to have gradients as far as one can know; others are checked when they have one."""
    return param.requires_grad and not is_lazy(param)


def _rounds_something(options: Mapping, params: Sequence[Tensor]) -> bool:
    bits = options["master_weight_bits"]
    for param in params:
        default = param.dtype if bits is None else torch.float32
        moments = (options["exp_avg_dtype"] or default, options["exp_avg_sq_dtype"] or default)
        if any(dtype in moments for dtype in (torch.bfloat16, torch.int8, torch.uint8)) or (
            param.dtype == torch.bfloat16 and bits != 32
        ):
            return True
    return False


def _is_supported(dtype: torch.dtype) -> bool:
    return (dtype.to_real() if dtype.is_complex else dtype) in DTYPES


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}, {tensor.dtype}, on {tensor.device}"
