"""Bytes per second of one step of one tensor, next to kernels that only move bytes."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from adamw_triton import launch
from adamw_triton.hyperparams import Hyperparams, kernel_scalars
from adamw_triton.storage import NoiseKey, StateTensors
from adamw_triton.storage.policies import BY_NAME as POLICIES_BY_NAME
from adamw_triton.storage.policies import POLICIES, Policy

from . import common, peers, records, timing
from .codegen import devices
from .records import Record

DESCRIPTION = """\
Bytes per second of one step of one tensor by the byte formula: parameter, gradient and state read once, all but the
gradient written once. "tensor" is the launch of foreach=False, "table" that of foreach=True, both without the small
one before it that counts the step. Next to them a copy of as many bytes, read and written counted, by Tensor.copy_ and
by 128-bit accesses in Triton, and a kernel without math that reads four tensors and writes three. Times are between
events around the launch, which was prepared before; the L2 cache is flushed before each; providers take turns; median
and 20th and 80th percentile. Other peers than torch fused have no launch to call: for them it is all of step(), which
at small sizes is their time on the host; GB/s counts what they store themselves. A peer whose own state does not fit
beside the rest is left out."""

TENSOR, TABLE = "adamw_triton tensor", "adamw_triton table"
TORCH_COPY, OUR_COPY, SKELETON = "copy (Tensor.copy_)", "copy (Triton)", "skeleton 4R3W"
PROVIDERS = (TENSOR, TABLE, peers.FUSED, TORCH_COPY, OUR_COPY, SKELETON)
# Those whose whole step() is timed.
STEPPED = [peer for peer in peers.PEERS if peer.name not in (peers.OURS, peers.OURS_EACH, peers.FUSED)]
EXPONENTS = range(10, 31, 2)
FREE_SHARE = 0.85

COLUMNS = {
    "gb_per_s": "GB/s",
    "us": "µs",
    "of_nominal": "of nominal",
    "of_copy": "of best copy",
    "of_skeleton": "of skeleton",
}


def needed_bytes(policy: Policy, elements: int) -> float:
    """The tensors of a step, and the source and target of a copy that moves as many bytes as it."""
    stored = policy.param.itemsize + policy.grad.itemsize + policy.state_bytes
    return elements * (stored + policy.bytes_per_element)


def moved_bytes(policy: Policy, elements: int, peer: peers.Peer) -> int:
    """What a peer's step must read and write: all it stores and the gradient, and all it stores."""
    stored = policy.param.itemsize + (peer.own_state(policy) if peer.own_state else policy.state_bytes)
    return round(elements * (2 * stored + policy.grad.itemsize))


def peers_that_fit(policy: Policy, elements: int, room: float) -> tuple[list[peers.Peer], dict[str, str]]:
    """The peers for whose own state and temporaries there is room, and why not the others."""
    chosen: list[peers.Peer] = []
    errors: dict[str, str] = {}
    left = room - 2 * elements * policy.param.itemsize  # what torch's foreach makes for a moment
    for peer in STEPPED:
        own = elements * (peer.own_state(policy) if peer.own_state else 0)
        if own <= left:
            chosen.append(peer)
            left -= own
        else:
            errors[peer.name] = f"its state needs {own / 1e9:.1f} GB, {max(left, 0) / 1e9:.1f} are left"
    return chosen, errors


def can_measure(device: torch.device) -> bool:
    return device.type == "cuda"


def free_bytes(device: torch.device) -> int:
    gc.collect()  # the calls of the case before refer to each other, and to its tensors
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def step_scalars(device: torch.device) -> Tensor:
    """Return the scalars of one tensor, as the optimizer has them on the device: float32 [8]."""
    scalars = kernel_scalars(Hyperparams.from_group(peers.HYPER), 1000.0)
    return torch.tensor(scalars, dtype=torch.float32, device=device)


def noise_key(policy: Policy) -> NoiseKey | None:
    return NoiseKey(seed=0, param_index=0) if policy.stochastic_rounding else None


class Case:
    """One tensor and its state, and what every provider does with them; each moves `bytes` in a call."""

    def __init__(
        self,
        policy: Policy,
        elements: int,
        device: torch.device,
        stepped: Sequence[peers.Peer] = (),
        starter: peers.Starter | None = None,
    ) -> None:
        (self.param,), (self.moments,) = peers.problem([peers.single_shape(elements, policy)], policy, device)
        assert self.param.grad is not None
        self.policy = policy
        self.grad = self.param.grad
        step_bytes = round(elements * policy.bytes_per_element)
        self.state = StateTensors.from_entries(self.moments, policy.amsgrad)
        # It does not touch a fifth tensor.
        skeleton_bytes = elements * (sum(2 * dtype.itemsize for dtype in policy.dtypes) - policy.grad.itemsize)
        self.calls: dict[str, timing.Call] = {}
        self.errors: dict[str, str] = {}
        self.bytes = dict.fromkeys(PROVIDERS, step_bytes)
        self.bytes[SKELETON] = skeleton_bytes
        for name, make in (
            (TENSOR, self._tensor),
            (TABLE, self._table),
            (peers.FUSED, self._fused),
            (TORCH_COPY, self._copies),
            (SKELETON, self._skeleton),
        ):
            self._add(name, make, device)
        if stepped and starter is not None:
            steps, errors = starter.start(stepped, [self.param], policy, [self.moments])
            self.calls.update(steps)
            self.errors.update(errors)
        for peer in stepped:
            self.bytes[peer.name] = moved_bytes(policy, elements, peer)

    def _add(self, name: str, make: Callable[[], dict[str, timing.Call]], device: torch.device) -> None:
        try:
            made = make()
            for call in made.values():
                call()
            common.synchronize(device)
            self.calls.update(made)
        except (RuntimeError, ValueError, peers.Unavailable) as error:
            self.errors[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]

    def _tensor(self) -> dict[str, timing.Call]:
        param, scalars, key = self.param.detach(), step_scalars(self.param.device), noise_key(self.policy)
        return {
            TENSOR: lambda: launch.launch_tensor(param, self.grad, self.state, scalars, maximize=False, noise_key=key)
        }

    def _table(self) -> dict[str, timing.Call]:
        # As the optimizer makes it.
        key = noise_key(self.policy)
        table = launch.Table.of(
            [self.param],
            self.grad.dtype,
            [self.state],
            aligned=True,
            noise_keys=None if key is None else [key],
        )
        device = self.param.device
        grads = torch.tensor([self.grad.data_ptr()], dtype=torch.int64, device=device)
        scalars = step_scalars(device).unsqueeze(0)
        return {TABLE: lambda: launch.launch_table(table, grads, scalars, maximize=False)}

    def _fused(self) -> dict[str, timing.Call]:
        if not self.policy.is_plain:
            raise peers.Unavailable("has neither 8-bit moments nor master weights nor stochastic rounding")
        # The operator itself: the Python around it would be part of the time between events.
        lr, (beta1, beta2), eps, weight_decay = peers.HYPER.values()
        param, exp_avg, exp_avg_sq = [self.param.detach()], [self.moments["exp_avg"]], [self.moments["exp_avg_sq"]]
        maximum = [self.moments["max_exp_avg_sq"]] if self.policy.amsgrad else []
        step = [torch.full((), 1000.0, device=self.param.device)]
        return {
            peers.FUSED: lambda: torch._fused_adamw_(
                param,
                [self.grad],
                exp_avg,
                exp_avg_sq,
                maximum,
                step,
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                weight_decay=weight_decay,
                eps=eps,
                amsgrad=self.policy.amsgrad,
                maximize=False,
            )
        }

    def _copies(self) -> dict[str, timing.Call]:
        from .codegen import roofs

        source, target = roofs.copy_bytes(self.bytes[TENSOR], self.param.device)
        self.bytes[TORCH_COPY] = self.bytes[OUR_COPY] = 2 * source.nbytes
        return {TORCH_COPY: lambda: target.copy_(source), OUR_COPY: lambda: roofs.copy(source, target)}

    def _skeleton(self) -> dict[str, timing.Call]:
        from .codegen import roofs

        if not self.policy.is_plain:
            raise peers.Unavailable("reads and writes floating-point tensors only")
        param, exp_avg, exp_avg_sq = self.param.detach(), self.moments["exp_avg"], self.moments["exp_avg_sq"]
        return {SKELETON: lambda: roofs.skeleton(param, self.grad, exp_avg, exp_avg_sq)}


def rates(
    policy: Policy,
    elements: int,
    moved: dict[str, int],
    samples: timing.Samples,
    errors: dict[str, str],
    nominal: float | None,
) -> list[Record]:
    """Records of one case: milliseconds of each provider made into bytes per second and ratios of medians."""
    speeds = {
        name: records.spread([moved[name] / ms / 1e6 for ms in taken])  # B/ms/1e6 = GB/s
        for name, taken in samples.items()
    }
    medians = {name: speed["median"] for name, speed in speeds.items()}
    differs = {peer.name: peer.differs for peer in STEPPED}
    versions = {peer.name: peer.version for peer in STEPPED} | {peers.FUSED: torch.__version__}
    copies = [medians[name] for name in (TORCH_COPY, OUR_COPY) if name in medians]
    found: list[Record] = []
    for name in (*PROVIDERS, *(peer.name for peer in STEPPED)):
        row: Record = {
            "command": "throughput",
            "case": f"{policy.name} {size_name(elements)}",
            "provider": name,
            "policy": policy.name,
            "elements": elements,
            "bytes_per_element": policy.bytes_per_element,
            "differs": differs.get(name, ""),
            "version": versions.get(name),
        }
        if name in speeds:
            row["gb_per_s"] = speeds[name]
            row["us"] = records.spread([ms * 1e3 for ms in samples[name]])
            row["moved_bytes"] = moved[name]
            if nominal is not None:
                row["of_nominal"] = medians[name] * 1e9 / nominal
            if copies:
                row["of_copy"] = medians[name] / max(copies)
            if SKELETON in medians:
                row["of_skeleton"] = medians[name] / medians[SKELETON]
        else:
            row["error"] = errors.get(name) or errors.get(TORCH_COPY) or "not measured"
        found.append(row)
    return found


def size_name(elements: int) -> str:
    exponent = elements.bit_length() - 1
    return f"2^{exponent}" if elements == 2**exponent else str(elements)


def _errors(policy: Policy, case: str, reason: str, providers: Sequence[str] = PROVIDERS) -> list[Record]:
    row: dict[str, Any] = {"command": "throughput", "case": case, "policy": policy.name, "error": reason}
    return [{**row, "provider": provider} for provider in providers]


def measure(options: argparse.Namespace) -> list[Record]:
    device: torch.device = options.device
    policies = [POLICIES_BY_NAME[name] for name in options.dtype or POLICIES_BY_NAME]
    if not can_measure(device):
        reason = "no GPU: bytes per second of a GPU's memory cannot be measured"
        return [row for policy in policies for row in _errors(policy, policy.name, reason, ["adamw_triton"])]

    known = devices.find(common.device_name(device))
    nominal = known.bandwidth if known else None
    found: list[Record] = []
    starter = peers.Starter(options.compile_seconds)
    with torch.cuda.device(device):
        flush = timing.Flush(device)
        for policy in policies:
            for elements in options.sizes:
                room = min(options.max_bytes, FREE_SHARE * free_bytes(device))
                needed = needed_bytes(policy, elements)
                if needed > room:
                    case = f"{policy.name} {size_name(elements)}"
                    found += _errors(policy, case, f"needs {needed / 1e9:.1f} GB, {room / 1e9:.1f} may be used")
                    continue
                stepped, errors = peers_that_fit(policy, elements, room - needed)
                try:
                    made = Case(policy, elements, device, stepped, starter)
                except peers.Unavailable as error:
                    found += _errors(policy, f"{policy.name} {size_name(elements)}", str(error))
                    continue
                samples = timing.device_ms(made.calls, device, samples=options.samples, flush=flush)
                found += rates(policy, elements, made.bytes, samples, errors | made.errors, nominal)
                del made
    return found


def size(text: str) -> int:
    """A number of elements, or a power like 2^20."""
    base, _, exponent = text.partition("^")
    if base == "2" and exponent.isdecimal() and int(exponent) <= 40:
        return 2 ** int(exponent)
    if not (text.isdecimal() and 0 < int(text) <= 2**40):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a positive number of elements, or a power like 2^20")
    return int(text)


def add_options(parser: common.Parser) -> None:
    add = parser.add_argument
    add("--sizes", type=size, nargs="+", default=[2**n for n in EXPONENTS], help="elements of the tensor, like 2^20")
    add("--dtype", action="append", choices=POLICIES_BY_NAME, help="storage policy; may be repeated; without it all")
    add("--samples", type=common.positive_int, default=50, help="of each provider and size")
    add(
        "--compile-seconds",
        type=common.non_negative_float,
        default=60.0,
        help="after that, peers that compile are left out",
    )
    add("--max-bytes", type=common.positive_int, default=2**40, help="skip larger cases, whatever fits")
    add("--device", type=common.device, default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")


def main(argv: list[str]) -> int:
    parser = common.Parser("throughput", DESCRIPTION)
    add_options(parser)
    parser.add_argument("--json", type=common.json_file, help="file for the records")
    options = parser.parse(argv)
    found = measure(options)
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(records.table(f"Throughput on {common.device_name(options.device)}", found, COLUMNS))
    for name, text in {row["provider"]: row["differs"] for row in found if row.get("differs")}.items():
        console.print(f"{name}: {text}")
    formula = ", ".join(f"{p.name} {p.read_bytes} read + {p.written_bytes} written" for p in POLICIES)
    console.print(f"Bytes per element: {formula}")
    if options.json:
        records.write(options.json, "throughput", argv, options.device, found)
    return 0
