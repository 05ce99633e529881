"""GPUs and the rates that bound a step on them. Nominal, with their sources; nothing here was measured.

The bound of each is what cannot be beaten at the clock given:

    memory    bytes / nominal bandwidth
    issue     thread-instructions / (multiprocessors x issue rate x clock)
    special   special functions / (multiprocessors x special-function rate x clock)

Issue counts every instruction alike. That is optimistic where instructions wait for a pipe of their own: the A100
issues for 128 threads but has 64 fp32 lanes, and sm_100's FFMA2, FMUL2 and FADD2 are two fp32 operations each. It is
pessimistic on AMD, where a wavefront's scalar instructions are issued next to another's vector instructions.
"""

from __future__ import annotations

from dataclasses import dataclass

_NVIDIA = (
    "4 warp schedulers of 1 instruction for 32 threads a clock in each SM (NVIDIA's architecture white papers); "
    "16 special functions a clock and SM (CUDA C++ Programming Guide, throughput of native arithmetic instructions)"
)


@dataclass(frozen=True)
class Device:
    key: str
    name: str
    reported: str  # how the name that torch reports begins
    target: str  # of bench.codegen.variants
    bandwidth: float  # B/s
    multiprocessors: int  # SM, on AMD CU
    clock: float  # Hz
    issue: int  # thread-instructions per clock and multiprocessor
    special: int  # special functions per clock and multiprocessor
    source: str

    def memory_seconds(self, moved_bytes: float) -> float:
        return moved_bytes / self.bandwidth

    def issue_seconds(self, instructions: float) -> float:
        return instructions / (self.multiprocessors * self.issue * self.clock)

    def special_seconds(self, functions: float) -> float:
        return functions / (self.multiprocessors * self.special * self.clock)

    def instruction_budget(self, moved_bytes: float) -> float:
        """Instructions that could be issued while the bytes move."""
        return self.memory_seconds(moved_bytes) / self.issue_seconds(1)


DEVICES = [
    Device(
        key="a100",
        name="A100 SXM 80 GB",
        reported="NVIDIA A100-SXM4-80GB",
        target="sm_80",
        bandwidth=2.039e12,
        multiprocessors=108,
        clock=1.41e9,
        issue=128,
        special=16,
        source=f"NVIDIA A100 data sheet: 2039 GB/s; white paper: 108 SMs, boost 1410 MHz; {_NVIDIA}",
    ),
    Device(
        key="h100",
        name="H100 SXM",
        reported="NVIDIA H100 80GB HBM3",
        target="sm_90",
        bandwidth=3.35e12,
        multiprocessors=132,
        clock=1.98e9,
        issue=128,
        special=16,
        source="NVIDIA H100 data sheet: 3.35 TB/s and 67 TFLOPS of fp32, which is 132 SMs x 128 lanes x 2 x 1980 MHz, "
        f"the highest clock; under a power limit it is lower; {_NVIDIA}",
    ),
    Device(
        key="h200",
        name="H200 SXM",
        reported="NVIDIA H200",
        target="sm_90",
        bandwidth=4.8e12,
        multiprocessors=132,
        clock=1.98e9,
        issue=128,
        special=16,
        source=f"NVIDIA H200 data sheet: 4.8 TB/s, and 67 TFLOPS of fp32 as the H100; {_NVIDIA}",
    ),
    Device(
        key="b200",
        name="B200",
        reported="NVIDIA B200",
        target="sm_100",
        bandwidth=7680 / 8 * 3996e6 * 2,
        multiprocessors=148,
        clock=1.85e9,
        issue=128,
        special=16,
        source="bus width and memory clock as the driver reports them (pytorch/ao#4002), 7.672 TB/s, where NVIDIA "
        f"says 8; 148 SMs; clock of 1.85 GHz assumed; issue and special functions assumed as for the H100: {_NVIDIA}",
    ),
    Device(
        key="mi300x",
        name="MI300X",
        reported="AMD Instinct MI300X",
        target="gfx942",
        bandwidth=5.3e12,
        multiprocessors=304,
        clock=2.1e9,
        issue=64,
        special=16,
        source="AMD MI300X data sheet: 5.3 TB/s, 304 CUs, peak 2100 MHz; 4 SIMDs of 16 lanes a CU (ROCm Compute "
        "Profiler, pipeline descriptions), one instruction for 64 threads in 4 clocks each; packed and dual issue "
        "assumed unused; fp32 transcendentals at a quarter of that rate (LLVM, SISchedule.td)",
    ),
]


def find(reported_name: str) -> Device | None:
    """The device that torch reports by this name, if it is in the table."""
    return next((device for device in DEVICES if reported_name.startswith(device.reported)), None)
