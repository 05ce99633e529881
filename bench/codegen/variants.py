"""Targets, and the variants of the kernels that are compiled for them."""

from __future__ import annotations

from dataclasses import dataclass

from adamw_triton.storage.policies import DTYPES, Policy, dtype_name

# backend, architecture, threads of a warp
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
KERNELS = ("tensor", "table")
NORM = "norm"  # kernel of the gradient norm, of which only the gradient's dtype, `control` and `scaler` matter
SCALARS = "scalars"  # kernel of step counts and scalars, of which only the parameter's dtype and the same matter
FLAGS = ("amsgrad", "maximize", "control", "scaler", "statistics", "cautious", "stochastic", "part")


@dataclass(frozen=True)
class Variant:
    """One compilation of one kernel."""

    target: str
    kernel: str
    dtypes: tuple[str, str, str, str]  # param, grad, exp_avg, exp_avg_sq
    amsgrad: bool = False
    maximize: bool = False
    control: bool = False  # factor and flag in memory: clipping, unscaling, skipping
    scaler: bool = False  # what GradScaler leaves is read, to write factor and flag
    statistics: bool = False  # sums of squares of update and parameter
    cautious: bool = False
    aligned: bool = True  # all tensors to 16 bytes
    master: str | None = None  # int16 or int8 remainder, or fp32 master
    stochastic: bool = False
    part: bool = False  # of a larger parameter, whose random bits it has

    def __str__(self) -> str:
        flags = [flag for flag in FLAGS if getattr(self, flag)]
        if self.master is not None:
            flags.append(f"master_{self.master}")
        return "-".join([self.target, self.kernel, *self.dtypes, *flags, *([] if self.aligned else ["unaligned"])])

    @classmethod
    def of(cls, target: str, kernel: str, policy: Policy) -> Variant:
        master = None if policy.master is None else dtype_name(policy.master)
        stochastic = policy.stochastic_rounding
        names = policy.dtype_names
        return cls(target, kernel, names, amsgrad=policy.amsgrad, master=master, stochastic=stochastic)

    @property
    def read_widths(self) -> list[int]:
        """Bytes per element of what a step reads: param, grad, exp_avg, exp_avg_sq (, max_exp_avg_sq) (, master)."""
        widths = [DTYPES[name].itemsize for name in self.dtypes]
        widths += widths[3:] if self.amsgrad else []
        return widths if self.master is None else [*widths, DTYPES[self.master].itemsize]

    @property
    def written_widths(self) -> list[int]:
        """Bytes per element of each tensor that a step writes: all but the gradient."""
        return self.read_widths[:1] + self.read_widths[2:]

    @property
    def scales(self) -> int:
        """Moments of which 128 elements share a scale: 4 bytes that every thread loads and one in 16 stores."""
        return sum(name in ("int8", "uint8") for name in self.dtypes)
