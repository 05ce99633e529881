"""Grid, block size, device: the only place that calls a kernel."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from .control import Control, Scaling
from .scalars import Scalars
from .storage import Rounding, Storage, TensorState

try:
    import triton
    import triton.language as tl
except ImportError:  # triton is published for Linux only; the reference runs elsewhere
    triton = None
else:
    from .kernels.adamw import STATISTICS_ROWS, adamw_kernel, adamw_table_kernel
    from .kernels.grad_norm import SPAN_BLOCKS, grad_norm_kernel
    from .kernels.scalars import scalars_kernel

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
    has_rows: bool = False  # whether each tensor has a row of the scalars

    @classmethod
    def of(
        cls,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[TensorState],
        *,
        aligned: bool,
        addresses: Tensor | None = None,
        rows: Sequence[int] | None = None,
        roundings: Sequence[Rounding] | None = None,
        configuration: Configuration | None = None,
    ) -> Table:
        """The table of tensors on one device, of the same formats.

        Args:
            params: dense parameters.
            grads: of each, with its strides.
            states: of each, with its strides.
            aligned: whether all but scales begin at multiples of 16 bytes.
            addresses: of the gradients, int64 on their device, if they are there already.
            rows: of each, in a table of scalars, if they differ.
            roundings: of each, with one seed and no offset, for stochastic rounding.
            configuration: another one than that of these formats.
        """
        device = params[0].device
        storage = Storage.of(params[0], grads[0], states[0], stochastic=roundings is not None)
        used = configuration or configuration_of(*storage.dtypes)
        lines = [
            [param.numel(), param.data_ptr(), *(tensor.data_ptr() for tensor in state.tensors)]
            for param, state in zip(params, states, strict=True)
        ]
        if roundings is not None:
            lines = [[*line, rounding.stream] for line, rounding in zip(lines, roundings, strict=True)]
        if rows is not None:
            lines = [[*line, row] for line, row in zip(lines, rows, strict=True)]
        tensors = torch.tensor(lines, dtype=torch.int64)
        if addresses is None:
            addresses = torch.tensor([grad.data_ptr() for grad in grads], dtype=torch.int64).to(device)
        return cls(
            tensors=tensors.to(device),
            grads=addresses,
            chunks=_pieces(tensors[:, 0], used.block_size).to(device),
            storage=storage,
            amsgrad=states[0].max_exp_avg_sq is not None,
            aligned=aligned,
            has_rows=rows is not None,
            seed=roundings[0].seed if roundings else 0,
            configuration=used,
        )


class NormTable(NamedTuple):
    """Gradients of one dtype for one launch, on their device; layouts as in `grad_norm_kernel`."""

    grads: Tensor
    numels: Tensor
    spans: Tensor
    first: int
    dtype: torch.dtype
    aligned: bool

    @classmethod
    def of(
        cls, grads: Tensor, numels: Tensor, members: Sequence[int], *, first: int, dtype: torch.dtype, aligned: bool
    ) -> NormTable:
        """The table of some of all gradients on one device.

        Args:
            grads: int64, addresses of all, on the device.
            numels: int64, elements of all (real numbers), on the device.
            members: indices of those of `dtype`.
            first: partial sums before theirs.
            aligned: whether they begin at multiples of 16 bytes.
        """
        index = torch.tensor(members)
        spans = _pieces(numels.cpu()[index], int(SPAN_BLOCKS.value) * norm_block_size(dtype), at_least=1)
        spans[:, 0] = index[spans[:, 0].long()].to(torch.int32)
        return cls(grads, numels, spans.to(grads.device), first, dtype, aligned)


def norm_block_size(dtype: torch.dtype) -> int:
    """Two accesses of 128 bits for each of 128 threads."""
    return 4096 // dtype.itemsize


def _pieces(numels: Tensor, size: int, *, at_least: int = 0) -> Tensor:
    """int32 [n, 2]: tensor, and number within it, of each piece of at most `size` elements."""
    counts = ((numels + size - 1) // size).clamp(min=at_least)
    tensor = torch.repeat_interleave(torch.arange(len(numels)), counts)
    piece = torch.arange(len(tensor)) - (counts.cumsum(0) - counts)[tensor]
    return torch.stack((tensor, piece), dim=1).to(torch.int32)


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
    cautious: bool = False,
    control: Tensor | None = None,
    statistics: Tensor | None = None,
    rounding: Rounding | None = None,
    configuration: Configuration | None = None,
) -> None:
    """Step one dense, real parameter; all tensors on its device, with its strides.

    Args:
        scalars: floats, or a float64 row on the device.
        cautious: decay only where that moves the parameter as the update does.
        control: `Control.values`: a factor for the gradient, and a flag, not 0 where nothing is to be written.
        statistics: of `statistics_like`, written.
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
        adamw_kernel[(n_programs(n_elements, used),)](
            param,
            grad,
            *state,
            n_elements,
            control,
            statistics,
            *(rounding or Rounding(0, 0)),
            row,
            *floats,
            maximize,
            cautious,
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
    cautious: bool = False,
    control: Tensor | None = None,
    statistics: Tensor | None = None,
) -> None:
    """Step every tensor of a table in one launch; other arguments as for `launch_tensor`.

    Args:
        scalars: of all tensors, or float64 [n_rows, 8] on the device if the table says which is whose.
    """
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
            control,
            statistics,
            table.seed,
            row,
            *floats,
            *map(_triton_dtype, storage[:5]),
            table.amsgrad,
            table.has_rows,
            table.aligned,
            maximize,
            cautious,
            "stochastic" if storage.stochastic else "nearest",
            table.configuration.block_size,
            table.configuration.eviction,
            num_warps=table.configuration.num_warps,
        )


def statistics_like(n_programs: int, device: torch.device) -> Tensor:
    """Memory for the sums of squares of so many programs: float32 [n_programs, STATISTICS_ROWS, 4], 0."""
    return torch.zeros(n_programs, int(STATISTICS_ROWS.value), 4, device=device)


def n_programs(n_elements: int, configuration: Configuration) -> int:
    return -(-n_elements // configuration.block_size)


def launch_scalars(
    rows: Tensor, steps: Tensor, scalars: Tensor, control: Control | None, scaling: Scaling, *, known: bool
) -> None:
    """Count one update and write its scalars.

    Args:
        rows, steps, scalars: as in `scalars_kernel`; one row or more.
        control: written from `scaling`, unless it is `known`; None if there is neither.
    """
    with _on(rows.device):
        scalars_kernel[(rows.shape[0],)](
            rows,
            steps,
            scalars,
            None if control is None else control.values,
            None if control is None or known else control.skipped,
            *((None, None) if known else scaling),
            known,
            1024,
            num_warps=NUM_WARPS,
        )


def launch_norms(
    tables: Sequence[NormTable],
    partials: Tensor,
    arrived: Tensor,
    control: Control | None,
    scaling: Scaling,
    max_grad_norm: float | None,
    skip_above: float | None,
) -> None:
    """Norm of all gradients of some tables on one device, and what follows from it.

    Args:
        partials: float64 [n + 1] for n partial sums.
        arrived: int32, 0.
        control: written; without it only the sum of squares is made, as the last of `partials`.
        max_grad_norm, skip_above: as in `gradient_control`.
    """
    try:
        for table in tables:
            with _on(partials.device):
                grad_norm_kernel[(table.spans.shape[0],)](
                    table.grads,
                    table.numels,
                    table.spans,
                    table.first,
                    partials,
                    partials.shape[0] - 1,
                    arrived,
                    None if control is None else control.values,
                    None if control is None else control.skipped,
                    *scaling,
                    float(max_grad_norm or 0.0),
                    float(skip_above or 0.0),
                    max_grad_norm is not None,
                    skip_above is not None,
                    _triton_dtype(table.dtype),
                    table.aligned,
                    norm_block_size(table.dtype),
                    num_warps=NUM_WARPS,
                )
    except BaseException:
        arrived.zero_()  # or programs of the next step would pass for those of this one
        raise


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
