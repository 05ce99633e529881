"""Grid, block size, device: the only place that calls a kernel."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from .grad_control import NO_NORM, GradDecision, GradNormOptions, GradScalerInputs
from .storage import Formats, NoiseKey, StateTensors
from .validation import is_simulated

try:
    import triton
    import triton.language as tl
except ImportError:  # triton is published for Linux only; the reference runs elsewhere
    triton = None
else:
    from .kernels.adamw import adamw_kernel, adamw_table_kernel
    from .kernels.grad_norm import SPAN_BLOCKS, grad_norm_kernel
    from .kernels.scalars import scalars_kernel
    from .kernels.statistics import STATISTICS_ROWS

# With TRITON_INTERPRET=1 set before this import, kernels run through NumPy, on CPU tensors too.
INTERPRETED = triton is not None and not isinstance(adamw_kernel, triton.JITFunction)

# 128 threads a program, of warps of 32 threads (NVIDIA) or wavefronts of 64 (AMD).
NUM_WARPS = 4 if torch.version.hip is None else 2
SCALARS_BLOCK = 128  # parameters, one for each thread


class Configuration(NamedTuple):
    """How the elements of a launch are dealt out, and a hint to the caches ("", "evict_first", "evict_last")."""

    block_size: int
    num_warps: int
    eviction: str = ""


class Table(NamedTuple):
    """Several tensors for one launch, on their device; layouts as in `adamw_table_kernel`."""

    tensors: Tensor
    chunks: Tensor
    formats: Formats
    amsgrad: bool
    aligned: bool
    rounding: str
    seed: int
    configuration: Configuration

    @classmethod
    def of(
        cls,
        params: Sequence[Tensor],
        grad_dtype: torch.dtype,
        states: Sequence[StateTensors],
        *,
        aligned: bool,
        noise_keys: Sequence[NoiseKey] | None = None,
        configuration: Configuration | None = None,
    ) -> Table:
        """Make the table of tensors on one device, of the same formats.

        Args:
            params: dense parameters.
            grad_dtype: of their gradients, which have the parameters' strides.
            states: of each, with its strides.
            aligned: whether all but scales begin at multiples of 16 bytes.
            noise_keys: of each, with one seed, for stochastic rounding.
            configuration: another one than that of these formats.
        """
        device = params[0].device
        formats = Formats.of(params[0], grad_dtype, states[0], stochastic=noise_keys is not None)
        used = configuration or configuration_of(*formats.dtypes)
        lines = [
            [param.numel(), param.data_ptr(), *(tensor.data_ptr() for tensor in state.present)]
            for param, state in zip(params, states, strict=True)
        ]
        rounding = rounding_of(noise_keys)
        if noise_keys is not None:
            numbers = [key[1:2] if rounding == "stochastic" else key[1:] for key in noise_keys]
            lines = [[*line, *of_key] for line, of_key in zip(lines, numbers, strict=True)]
        tensors = torch.tensor(lines, dtype=torch.int64, device="cpu")
        return cls(
            tensors=tensors.to(device),
            chunks=_pieces(tensors[:, 0], used.block_size).to(device),
            formats=formats,
            amsgrad=states[0].max_exp_avg_sq is not None,
            aligned=aligned,
            rounding=rounding,
            seed=noise_keys[0].seed if noise_keys else 0,
            configuration=used,
        )


class NormTable(NamedTuple):
    """Gradients of one dtype for one launch, on their device; layouts as in `grad_norm_kernel`."""

    numels: Tensor
    spans: Tensor
    first: int
    dtype: torch.dtype
    aligned: bool

    @classmethod
    def of(cls, numels: Tensor, members: Sequence[int], *, first: int, dtype: torch.dtype, aligned: bool) -> NormTable:
        """Make the table of some of all gradients on one device.

        Args:
            numels: int64, elements of all (real numbers), on the device.
            members: indices of those of `dtype`.
            first: partial sums before theirs.
            aligned: whether they begin at multiples of 16 bytes.
        """
        index = torch.tensor(members, dtype=torch.int64, device="cpu")
        spans = _pieces(numels.cpu()[index], int(SPAN_BLOCKS.value) * norm_block_size(dtype), at_least=1)
        spans[:, 0] = index[spans[:, 0].long()].to(torch.int32)
        return cls(numels, spans.to(numels.device), first, dtype, aligned)


def norm_block_size(dtype: torch.dtype) -> int:
    """Two accesses of 128 bits for each of 128 threads."""
    return 4096 // dtype.itemsize


def _pieces(numels: Tensor, size: int, *, at_least: int = 0) -> Tensor:
    """int32 [n, 2]: tensor, and number within it, of each piece of at most `size` elements."""
    counts = ((numels + size - 1) // size).clamp(min=at_least)
    tensor = torch.repeat_interleave(torch.arange(len(numels), dtype=torch.int64, device="cpu"), counts)
    piece = torch.arange(len(tensor), dtype=torch.int64, device="cpu") - (counts.cumsum(0) - counts)[tensor]
    return torch.stack((tensor, piece), dim=1).to(torch.int32)


def has_kernels(device: torch.device) -> bool:
    """Whether tensors on `device` go through the kernels; if not, through eager torch."""
    if triton is None and device.type == "cuda":
        warnings.warn(
            "Triton is not installed: AdamW steps as eager PyTorch operations instead of its kernel. "
            "Install triton (published for Linux).",
            stacklevel=2,
        )
    return triton is not None and (device.type == "cuda" or (INTERPRETED and device.type == "cpu"))


def can_launch(tensor: Tensor) -> bool:
    """Whether a tensor goes through the kernels: one without values, on the meta device or fake, never does."""
    return not is_simulated(tensor) and has_kernels(tensor.device)


def configuration_of(*dtypes: torch.dtype) -> Configuration:
    """The fixed configuration for the dtypes of what has an element for each of the parameter's: 128 threads.

    Accesses: with one width, 8 elements a thread (4 of float64), two of 128 bits for each fp32 tensor. With mixed
    widths 4, so that the wide side takes 128 bits and the narrow side 64: at 8 the compiler would move the
    narrow values between threads through shared memory. 8-bit values next to 16-bit ones take 64 bits, and a thread
    has twice 8 elements: what it computes once is 6 instructions less for each.

    Bytes in flight: before its first wait a thread has loaded 80 bytes (fp32) or 48 (bf16), with 48 registers 10
    programs share an SM: 60 to 100 KiB, where CUB asks for 32 on an H100, 48 on an H200 and 64 on a B200. With 16
    elements it has 112 and up to 128 registers: 4 programs, 56 KiB.

    Waves: a program is one block, so that 1320 of them, 1.35 M elements, are one wave of an H100. ResNet-50's 25.6 M
    parameters are 19 waves, whose last one costs at most 5 %; in chunks of 64 Ki they would be 508 programs, not
    even half a wave. The price is the table, 8 bytes for each 1024 elements, 0.03 % of what these move.
    """
    sizes = {dtype.itemsize for dtype in dtypes}
    if sizes == {1, 2}:
        return Configuration(2048, NUM_WARPS)
    return Configuration(1024 if sizes in ({4}, {2}) else 512, NUM_WARPS)


def launch_tensor(
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
    configuration: Configuration | None = None,
) -> None:
    """Step one dense, real parameter; all tensors on its device, with its strides.

    Args:
        scalars: `KernelScalars`, float32 [8], or float64 [8] for a float64 parameter.
        cautious: decay only where that moves the parameter as the update does.
        decision: `GradDecision.values`: a factor for the gradient, and a flag, not 0 where nothing is to be written.
        statistics: of `statistics_like`, written.
        noise_key: of stochastic rounding, where it is given.
        configuration: another one than that of these formats.
    """
    n_elements = param.numel()
    if n_elements == 0:
        return
    used = configuration or configuration_of(*Formats.of(param, grad.dtype, state).dtypes)
    with _on(param.device):
        adamw_kernel[(n_programs(n_elements, used),)](
            param,
            grad,
            *state,
            n_elements,
            decision,
            statistics,
            *(noise_key or NoiseKey(0, 0)),
            scalars,
            maximize,
            cautious,
            rounding_of(None if noise_key is None else [noise_key]),
            used.block_size,
            used.eviction,
            num_warps=used.num_warps,
        )


def launch_table(
    table: Table,
    grads: Tensor,
    scalars: Tensor,
    *,
    maximize: bool,
    cautious: bool = False,
    decision: Tensor | None = None,
    statistics: Tensor | None = None,
) -> None:
    """Step every tensor of a table in one launch; other arguments as for `launch_tensor`.

    Args:
        grads: int64 [n_tensors] on the device, addresses of the gradients; 0 where there is none.
        scalars: float32 [n_tensors, 8] on the device, or float64 for float64 parameters.
    """
    n_chunks = table.chunks.shape[0]
    if n_chunks == 0:
        return
    formats = table.formats
    with _on(table.tensors.device):
        adamw_table_kernel[(n_chunks,)](
            table.tensors,
            grads,
            table.chunks,
            decision,
            statistics,
            table.seed,
            scalars,
            *map(_triton_dtype, formats[:5]),
            table.amsgrad,
            table.aligned,
            maximize,
            cautious,
            table.rounding,
            table.configuration.block_size,
            table.configuration.eviction,
            num_warps=table.configuration.num_warps,
        )


def rounding_of(noise_keys: Sequence[NoiseKey] | None) -> str:
    """Return how a kernel is to round, in its own words."""
    if noise_keys is None:
        return "nearest"
    if not any(key.is_of_part for key in noise_keys):
        return "stochastic"
    return "stochastic part" if all(key.is_aligned for key in noise_keys) else "stochastic part, unaligned"


def statistics_like(n_programs: int, device: torch.device) -> Tensor:
    """Make memory for the sums of squares of so many programs: float32 [n_programs, STATISTICS_ROWS, 4], NaN."""
    size = (n_programs, int(STATISTICS_ROWS.value), 4)
    return torch.full(size, math.nan, dtype=torch.float32, device=device)


def n_programs(n_elements: int, configuration: Configuration) -> int:
    return -(-n_elements // configuration.block_size)


def launch_scalars(
    params: Tensor,
    grads: Tensor,
    hyperparams: Tensor,
    scalars: Tensor,
    scalars64: Tensor | None,
    decision: GradDecision | None,
    scaler: GradScalerInputs,
    *,
    decided: bool,
    sums: Tensor | None = None,
    options: GradNormOptions = NO_NORM,
) -> None:
    """Count one update of every parameter that has a gradient, and write its scalars.

    Args:
        params, grads, hyperparams, scalars, scalars64: as in `scalars_kernel`.
        decision: written from `scaler` and `sums`, unless it is `decided`; None if the step is subject to neither.
        sums: float64 [2]: sum of squares of the gradients, and how many ranks refused the step; options: of its norm.
    """
    n_params = params.shape[0]
    with _on(params.device):
        scalars_kernel[(-(-n_params // SCALARS_BLOCK),)](
            params,
            grads,
            n_params,
            hyperparams,
            scalars,
            scalars64,
            None if decision is None else decision.values,
            None if decision is None or decided else decision.skipped,
            *((None, None) if decided else scaler),
            sums,
            float(options.max_grad_norm or 0.0),
            float(options.skip_above or 0.0),
            decided,
            sums is not None and options.max_grad_norm is not None,
            sums is not None and options.skip_above is not None,
            SCALARS_BLOCK,
            num_warps=NUM_WARPS,
        )


def launch_norms(
    tables: Sequence[NormTable],
    grads: Tensor,
    partials: Tensor,
    finished: Tensor,
    decision: GradDecision | None,
    scaler: GradScalerInputs,
    options: GradNormOptions,
) -> None:
    """Norm of all gradients of some tables on one device, and what follows from it.

    Args:
        grads: int64, addresses of all gradients on the device; 0 where there is none.
        partials: float64 [n + 1] for n partial sums.
        finished: int32, 0: programs that have finished.
        decision: written; without it only the sum of squares is made, as the last of `partials`.
    """
    try:
        for table in tables:
            with _on(partials.device):
                grad_norm_kernel[(table.spans.shape[0],)](
                    grads,
                    table.numels,
                    table.spans,
                    table.first,
                    partials,
                    partials.shape[0] - 1,
                    finished,
                    None if decision is None else decision.values,
                    None if decision is None else decision.skipped,
                    *scaler,
                    float(options.max_grad_norm or 0.0),
                    float(options.skip_above or 0.0),
                    options.max_grad_norm is not None,
                    options.skip_above is not None,
                    _triton_dtype(table.dtype),
                    table.aligned,
                    norm_block_size(table.dtype),
                    num_warps=NUM_WARPS,
                )
    except BaseException:
        finished.zero_()  # or programs of the next step would pass for those of this one
        raise


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
