"""What storing moments in 8 bits does to the update: codes of several optimizers, emulated, and hard gradients."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adamw_triton import storage

from .records import Record


class Code(NamedTuple):
    """What `exp_avg` and `exp_avg_sq` (flat float32) become by being stored."""

    exp_avg: Callable[[Tensor], Tensor]
    exp_avg_sq: Callable[[Tensor], Tensor]
    bytes_per_element: float  # of both


def _grouped(value: Tensor, size: int, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Groups of `size` elements relative to the largest magnitude of each, and these, rounded to what stores them."""
    padded = torch.zeros(-(-value.numel() // size) * size)
    padded[: value.numel()] = value
    groups = padded.view(-1, size)
    scale = groups.abs().amax(dim=1, keepdim=True).to(scale_dtype).float()
    return (groups / scale).nan_to_num(0.0, 0.0, 0.0).clamp(-1, 1), scale


def _restored(relative: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    return (relative * scale).view(-1)[: like.numel()]


def _ours(name: str) -> Callable[[Tensor], Tensor]:
    return lambda value: storage.decode(name, *storage.encode(name, value))


def _ours_stochastic(name: str) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)  # the same bits for both moments

    def store(value: Tensor) -> Tensor:
        noise = torch.randint(2**16, (value.numel(),), dtype=torch.int32, generator=generator)
        return storage.decode(name, *storage.encode(name, value, noise))

    return store


def _linear(value: Tensor) -> Tensor:
    relative, scale = _grouped(value, storage.GROUP_SIZE)
    return _restored((relative * 127).round() / 127, scale, value)


def _linear_root(value: Tensor) -> Tensor:
    relative, scale = _grouped(value.sqrt(), storage.GROUP_SIZE)
    return _restored((relative * 255).round() / 255, scale, value).square()


def _softsign(value: Tensor) -> Tensor:
    """FlashOptim's exp_avg: y = 2x / (1 + |x|) in 127 steps, one fp16 scale for 32."""
    relative, scale = _grouped(value, 32, torch.float16)
    code = (127 * 2 * relative / (1 + relative.abs())).round() / 127
    return _restored(code / (2 - code.abs()), scale, value)


def _root_of_32(value: Tensor) -> Tensor:
    """FlashOptim's exp_avg_sq: sqrt(v) in 255 steps, one fp16 scale for 32."""
    relative, scale = _grouped(value.sqrt(), 32, torch.float16)
    return _restored((relative * 255).round() / 255, scale, value).square()


@cache
def dynamic_map(signed: bool) -> Tensor:
    """The values of dynamic tree quantization (Dettmers et al., https://arxiv.org/abs/2110.02861), sorted.

    Each power of ten from 1e-6 to 1 has twice as many values as the one below, the middles of equal intervals.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        count = 2**exponent if signed else 2 ** (exponent + 1)
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float64)
        positive = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)).tolist()
        values += positive + [-value for value in positive if signed]
    return torch.tensor(sorted(values), dtype=torch.float32)


def _dynamic(signed: bool) -> Callable[[Tensor], Tensor]:
    """torchao's (and bitsandbytes') moments: the nearest value of `dynamic_map`, one fp32 scale for 256."""

    def store(value: Tensor) -> Tensor:
        values = dynamic_map(signed)
        relative, scale = _grouped(value, 256)
        middles = (values[:-1] + values[1:]) / 2
        return _restored(values[torch.bucketize(relative, middles)], scale, value)

    return store


def _bf16(value: Tensor) -> Tensor:
    return value.bfloat16().float()


def _same(value: Tensor) -> Tensor:
    return value


CODES = {
    "fp32": Code(_same, _same, 8),
    "bf16": Code(_bf16, _bf16, 4),
    "adamw_triton 8-bit": Code(_ours("exp_avg"), _ours("exp_avg_sq"), 2 + 2 * 4 / 128),
    "adamw_triton 8-bit, stochastic": Code(
        _ours_stochastic("exp_avg"), _ours_stochastic("exp_avg_sq"), 2 + 2 * 4 / 128
    ),
    "flashoptim 8-bit": Code(_softsign, _root_of_32, 2 + 2 * 2 / 32),
    "torchao 8-bit": Code(_dynamic(signed=True), _dynamic(signed=False), 2 + 2 * 4 / 256),
    "linear 8-bit": Code(_linear, _linear_root, 2 + 2 * 4 / 128),
}


BASELINE = "fp32"
BETA1, EPS = 0.9, 1e-8
BETAS2 = (0.95, 0.999)


class Moments:
    """exp_avg and exp_avg_sq of several tensors, as they are after having been stored."""

    def __init__(self, code: Code, betas: tuple[float, float]) -> None:
        self.code = code
        self.betas = betas
        self.stored: list[tuple[Tensor, Tensor]] = []
        self.steps = 0

    def update(self, gradients: list[Tensor]) -> list[Tensor]:
        """Take the gradients in; returns the update in units of the learning rate."""
        beta1, beta2 = self.betas
        self.stored = self.stored or [(torch.zeros_like(g), torch.zeros_like(g)) for g in gradients]
        self.steps += 1
        correction1, correction2 = 1 - beta1**self.steps, 1 - beta2**self.steps
        updates = []
        for i, g in enumerate(gradients):
            m, v = self.stored[i]
            m, v = m.lerp(g, 1 - beta1), beta2 * v + (1 - beta2) * g * g
            updates.append(m / correction1 / ((v / correction2).sqrt() + EPS))
            self.stored[i] = self.code.exp_avg(m), self.code.exp_avg_sq(v)
        return updates


def update_records(run: Iterable[tuple[Any, float]], steps: int) -> list[Record]:
    """Each code next to fp32, on the gradients of one fp32 training run.

    Args:
        run: the trainee before each of `steps` steps, and its loss; once more after the last.
    """
    names = [name for name in CODES if name != BASELINE]
    betas = [(BETA1, beta2) for beta2 in BETAS2]
    exact = {b: Moments(CODES[BASELINE], b) for b in betas}
    coded = {(name, b): Moments(CODES[name], b) for name in names for b in betas}
    relative: dict[Any, list[float]] = {key: [] for key in coded}
    worst = dict.fromkeys(coded, 0.0)
    for trainee, loss in run:
        if math.isnan(loss):
            break
        gradients = [p.grad.flatten().cpu() for p in trainee.stored]
        expected = {b: torch.cat(moments.update(gradients)) for b, moments in exact.items()}
        for key, moments in coded.items():
            error = torch.cat(moments.update(gradients)) - expected[key[1]]
            relative[key].append((error.norm() / expected[key[1]].norm()).item())
            worst[key] = max(worst[key], error.abs().max().item())
    return [
        {
            "command": "accuracy",
            "case": f"update, beta2 {b[1]:g}",
            "provider": name,
            "beta2": b[1],
            "steps": steps,
            "bytes_per_element": CODES[name].bytes_per_element,
            "relative_error": statistics.fmean(relative[name, b]),
            "worst_element": worst[name, b],
        }
        for name, b in coded
    ]


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "ordinary": lambda normal: 1e-3 * normal,
    "1e-8": lambda normal: 1e-8 * normal,
    "1e-12": lambda normal: 1e-12 * normal,
    "spiky": lambda normal: torch.where(normal.abs() > 2.576, 0.1 * normal, torch.zeros_like(normal)),  # 1 in 100
    "zero": torch.zeros_like,
}


def gradient_records(steps: int = 1000) -> list[Record]:
    """Weights of every kind interleaved in one tensor, stepped with each code and with fp32."""
    kinds = list(KINDS)
    n = 128 * 5 * len(kinds)
    kind_of = torch.arange(n) % len(kinds)
    found: list[Record] = []
    for beta2 in BETAS2:
        generator = torch.Generator().manual_seed(0)
        moments = {name: Moments(code, (BETA1, beta2)) for name, code in CODES.items()}
        moved = {name: torch.zeros(n, dtype=torch.float64) for name in CODES}
        for _ in range(steps):
            normal = torch.randn(n, generator=generator)
            gradient = torch.zeros(n)
            for index, kind in enumerate(kinds):
                gradient[kind_of == index] = KINDS[kind](normal[kind_of == index])
            for name, kept in moments.items():
                moved[name] += kept.update([gradient])[0].double()
        for name in CODES:
            if name == BASELINE:
                continue
            record: Record = {
                "command": "accuracy", "case": f"gradients, beta2 {beta2:g}", "provider": name, "beta2": beta2,
            }  # fmt: skip
            for index, kind in enumerate(kinds):
                error = (moved[name] - moved[BASELINE])[kind_of == index].norm()
                distance = moved[BASELINE][kind_of == index].norm()
                record[f"error_{kind}"] = (error / distance).item() if distance > 0 else error.item()
            found.append(record)
    return found


MIXED_SEEDS = 8
MIXED_SIZE = 1280  # elements of each seed


def mixed_records(steps: int = 300) -> list[Record]:
    """Gradients of magnitudes from 1e-9 to 1 within each group: how far the codes let a weight run."""
    found: list[Record] = []
    for beta2 in BETAS2:
        generator = torch.Generator().manual_seed(0)
        n = MIXED_SEEDS * MIXED_SIZE
        magnitude = 10 ** (torch.rand(n, generator=generator) * 9 - 9)
        moments = {name: Moments(code, (BETA1, beta2)) for name, code in CODES.items()}
        moved = {name: torch.zeros(n, dtype=torch.float64) for name in CODES}
        largest_step = dict.fromkeys(CODES, 0.0)
        for _ in range(steps):
            gradient = torch.randn(n, generator=generator) * magnitude
            for name, kept in moments.items():
                update = kept.update([gradient])[0].double()
                moved[name] += update
                largest_step[name] = max(largest_step[name], update.abs().max().item())
        largest = {name: total.abs().view(MIXED_SEEDS, MIXED_SIZE).amax(dim=1) for name, total in moved.items()}
        found += [
            {
                "command": "accuracy",
                "case": f"mixed, beta2 {beta2:g}",
                "provider": name,
                "beta2": beta2,
                "steps": steps,
                "largest_movement": largest[name].max().item(),
                "movement_over_fp32": (largest[name] / largest[BASELINE]).max().item(),
                "largest_step": largest_step[name],
            }
            for name in CODES
        ]
    return found
