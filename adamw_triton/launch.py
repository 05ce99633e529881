"""Grid, block size, device: the only place that calls a kernel."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from .scalars import Scalars
from .storage import Rounding, Storage, TensorState

try:
    import triton
    import triton.language as tl
except ImportError:  # triton is published for Linux only; the reference runs elsewhere
    triton = None
else:
    from .kernels.adamw import adamw_kernel, adamw_table_kernel

# With TRITON_INTERPRET=1 set before this import, kernels run through NumPy, on CPU tensors too.
INTERPRETED = triton is not None and not isinstance(adamw_kernel, triton.JITFunction)

# 128 threads a program, of warps of 32 threads (NVIDIA) or wavefronts of 64 (AMD).
NUM_WARPS = 4 if torch.version.hip is None else 2

_NO_SCALARS = Scalars(*[0.0] * len(Scalars._fields))


class Configuration(NamedTuple):
    """How the elements of a launch are dealt out, and a hint to the caches ("", "evict_first", "evict_last")."""

    block_size: int
    num_warps: int
    eviction: str = ""


class Table(NamedTuple):
    """Several tensors for one launch, on their device; layouts as in `adamw_table_kernel`."""

    tensors: Tensor
    grads: Tensor
    chunks: Tensor
    storage: Storage
    amsgrad: bool
    aligned: bool
    seed: int
    configuration: Configuration

    @classmethod
    def of(
        cls,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[TensorState],
        *,
        aligned: bool,
        roundings: Sequence[Rounding] | None = None,
        configuration: Configuration | None = None,
    ) -> Table:
        """The table of tensors on one device, of the same formats.

        Args:
            params: dense parameters.
            grads: of each, with its strides.
            states: of each, with its strides.
            aligned: whether all but scales begin at multiples of 16 bytes.
            roundings: of each, with one seed and no offset, for stochastic rounding.
            configuration: another one than that of these formats.
        """
        device = params[0].device
        storage = Storage.of(params[0], grads[0], states[0], stochastic=roundings is not None)
        used = configuration or configuration_of(*storage.dtypes)
        rows = [
            [param.numel(), param.data_ptr(), *(tensor.data_ptr() for tensor in state.tensors)]
            for param, state in zip(params, states, strict=True)
        ]
        if roundings is not None:
            rows = [[*row, rounding.stream] for row, rounding in zip(rows, roundings, strict=True)]
        tensors = torch.tensor(rows, dtype=torch.int64)
        n_chunks = (tensors[:, 0] + used.block_size - 1) // used.block_size
        tensor = torch.repeat_interleave(torch.arange(len(rows)), n_chunks)
        block = torch.arange(len(tensor)) - (n_chunks.cumsum(0) - n_chunks)[tensor]
        return cls(
            tensors=tensors.to(device),
            grads=torch.tensor([grad.data_ptr() for grad in grads], dtype=torch.int64).to(device),
            chunks=torch.stack((tensor, block), dim=1).to(torch.int32).to(device),
            storage=storage,
            amsgrad=states[0].max_exp_avg_sq is not None,
            aligned=aligned,
            seed=roundings[0].seed if roundings else 0,
            configuration=used,
        )


def has_kernels(device: torch.device) -> bool:
    """Whether tensors on `device` go through the kernels; if not, through the reference."""
    if triton is None and device.type == "cuda":
        warnings.warn(
            "Triton is not installed: AdamW steps as eager PyTorch operations instead of its kernel. "
            "Install triton (published for Linux).",
            stacklevel=2,
        )
    return triton is not None and (device.type == "cuda" or (INTERPRETED and device.type == "cpu"))


def configuration_of(*dtypes: torch.dtype) -> Configuration:
    """The fixed configuration for the dtypes of what has an element for each of the parameter's: 128 threads.

    Accesses: with one width, 8 elements a thread (4 of float64), two of 128 bits for each fp32 tensor. With mixed
    widths 4, so that the wide side takes 128 bits and the narrow side 64: at 8 the compiler would move the
    narrow values between threads through shared memory. 8-bit values next to 16-bit ones take 64 bits.

    Bytes in flight: before its first wait a thread has loaded 80 bytes (fp32) or 48 (bf16), with 48 registers 10
    programs share an SM: 60 to 100 KiB, where CUB asks for 32 on an H100, 48 on an H200 and 64 on a B200.

    Waves: a program is one block, so that 1320 of them, 1.35 M elements, are one wave of an H100. ResNet-50's 25.6 M
    parameters are 19 waves, whose last one costs at most 5 %; in chunks of 64 Ki they would be 508 programs, not
    even half a wave. The price is the table, 8 bytes for each 1024 elements, 0.03 % of what these move.
    """
    sizes = {dtype.itemsize for dtype in dtypes}
    return Configuration(1024 if sizes == {4} or max(sizes) == 2 else 512, NUM_WARPS)


def launch_tensor(
    param: Tensor,
    grad: Tensor,
    state: TensorState,
    scalars: Scalars | Tensor,
    *,
    maximize: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    rounding: Rounding | None = None,
    configuration: Configuration | None = None,
) -> None:
    """Step one dense, real parameter; all tensors on its device, with its strides.

    Args:
        scalars: floats, or a float64 row on the device (`device_scalars`).
        grad_scale: one-element device tensor; gradients are divided by it in registers.
        found_inf: one-element device tensor; nothing is written where it is not 0.
        rounding: stochastic where it is given.
        configuration: another one than that of these formats.
    """
    n_elements = param.numel()
    if n_elements == 0:
        return
    used = configuration or configuration_of(*Storage.of(param, grad, state).dtypes)
    how = "nearest"
    if rounding is not None:
        how = "stochastic" if rounding.element_offset % 8 == 0 else "stochastic shifted"
    row, floats = _split(scalars, param)
    with _on(param.device):
        adamw_kernel[(-(-n_elements // used.block_size),)](
            param,
            grad,
            *state,
            n_elements,
            grad_scale,
            found_inf,
            *(rounding or Rounding(0, 0)),
            row,
            *floats,
            maximize,
            how,
            used.block_size,
            used.eviction,
            num_warps=used.num_warps,
        )


def launch_table(
    table: Table,
    scalars: Scalars | Tensor,
    *,
    maximize: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Step every tensor of a table in one launch; other arguments as for `launch_tensor`."""
    n_chunks = table.chunks.shape[0]
    if n_chunks == 0:
        return
    storage = table.storage
    row, floats = _split(scalars, table.tensors, storage.param)
    with _on(table.tensors.device):
        adamw_table_kernel[(n_chunks,)](
            table.tensors,
            table.grads,
            table.chunks,
            grad_scale,
            found_inf,
            table.seed,
            row,
            *floats,
            *map(_triton_dtype, storage[:5]),
            table.amsgrad,
            table.aligned,
            maximize,
            "stochastic" if storage.stochastic else "nearest",
            table.configuration.block_size,
            table.configuration.eviction,
            num_warps=table.configuration.num_warps,
        )


def _split(scalars: Scalars | Tensor, like: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor | None, Scalars]:
    """The row in memory, if the scalars are or must be there, and the floats."""
    if isinstance(scalars, Tensor):
        return scalars, _NO_SCALARS
    if (dtype or like.dtype) == torch.float64:
        # A float argument reaches the kernel as fp32. A small pageable copy does not wait for the device.
        return torch.tensor(scalars, dtype=torch.float64).to(like.device, non_blocking=True), _NO_SCALARS
    return None, scalars


def _on(device: torch.device) -> AbstractContextManager:
    # Triton launches on the current device's current stream, whatever device its arguments are on.
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _triton_dtype(dtype: torch.dtype | None) -> tl.dtype | None:
    return None if dtype is None else _TRITON_DTYPES[dtype]


if triton is not None:
    _TRITON_DTYPES = {
        torch.float32: tl.float32,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
        torch.float64: tl.float64,
        torch.int16: tl.int16,
        torch.int8: tl.int8,
        torch.uint8: tl.uint8,
    }
