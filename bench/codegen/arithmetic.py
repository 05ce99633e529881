"""The kernel's square root and division, emulated with every error that a GPU's approximate seeds may have.

The interpreter has exact seeds and no fused multiply-add, a GPU has approximate seeds and real fma. Here both are
what the hardware documents: PTX ISA, rsqrt.approx.ftz.f32, largest relative error 2^-22.9. That makes the last
two units wrong at worst; the Newton step must repair them for whatever error inside of that.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from rich.console import Console

from .. import common, records
from ..records import Record

Array = np.ndarray
DESCRIPTION = """\
Root mean square error of the fp32 update η m / (sqrt(v) c + eps), in units in the last place, by emulation: the kernel
with errors of the hardware's reciprocal square root as the PTX manual allows them, IEEE operations, the operations of
torch.optim.AdamW(foreach=False), and PTX's approximate square root and division. Nothing is measured on a GPU."""

SEED_ERROR = 2.0**-22.9
f32 = np.float32


def fma(a: Array, b: Array, c: Any) -> Array:
    # The product of two fp32 is exact in fp64 and the sum nearly so: one rounding in effect.
    return (a.astype(np.float64) * b.astype(np.float64) + np.float64(c)).astype(f32)


def rsqrt(x: Array, error: Any) -> Array:
    """rsqrt.approx.ftz: denormals count as 0."""
    x = np.where(np.abs(x) < 2.0**-126, 0, x).astype(np.float64)
    return (1 / np.sqrt(x) * (1 + error)).astype(f32)


def newton_sqrt(x: Array, error: Any) -> Array:
    tiny = x < f32(2.0**-100)
    scaled = np.where(tiny, x * f32(2.0**100), x)
    seed = rsqrt(scaled, error)
    root = scaled * seed
    root = fma(fma(-root, root, scaled), f32(0.5) * seed, root)
    root = np.where(root == root, root, scaled)
    return np.where(tiny, root * f32(2.0**-50), root)


def newton_divide(a: Array, b: Array, error: Any) -> Array:
    seed = rsqrt(b, error)
    reciprocal = seed * seed
    estimate = a * reciprocal
    quotient = fma(fma(-b, estimate, a), reciprocal, estimate)
    return np.where(quotient == quotient, quotient, estimate)


def seed_errors(rng: np.random.Generator, n: int) -> Array:
    """Random, and both extremes."""
    return np.concatenate(
        [rng.uniform(-SEED_ERROR, SEED_ERROR, n - 2 * (n // 4)), *[np.full(n // 4, s * SEED_ERROR) for s in (-1, 1)]]
    )


def ulps(actual: Array, expected: Array) -> Array:
    return np.abs(actual.astype(np.float64) - expected) / np.spacing(np.abs(expected).astype(f32)).astype(np.float64)


def update_errors(n: int, seed: int) -> dict[str, float]:
    """RMS error in ulp of the update of `n` random elements, by what computes it.

    sqrt.approx.ftz.f32 may be off by 2^-23 and div.full.f32 by 2 ulp; errors are drawn evenly from that. The
    kernel adds the product with the step size to the parameter unrounded (fma), torch's loop rounds it.
    """
    rng = np.random.default_rng(seed)
    m, v = rng.standard_normal(n).astype(f32), rng.uniform(0.01, 4, n).astype(f32)
    # The rounding of these to fp32 is part of the error, so there are many of each.
    step_size, bias_correction2_sqrt = rng.uniform(1e-4, 1e-3, n), rng.uniform(0.03, 1, n)
    eta, c, eps = step_size.astype(f32), (1 / bias_correction2_sqrt).astype(f32), f32(1e-8)
    exact = step_size * m / (np.sqrt(v.astype(np.float64)) / bias_correction2_sqrt + np.float64(eps))

    root = newton_sqrt(v, seed_errors(rng, n))
    ours = newton_divide(m, fma(root, c, eps), seed_errors(rng, n))
    root = (np.sqrt(v.astype(np.float64)) * (1 + rng.uniform(-1, 1, n) * 2.0**-23)).astype(f32)
    approximate = m.astype(np.float64) / fma(root, c, eps)
    approximate = (approximate + rng.uniform(-2, 2, n) * np.spacing(np.abs(approximate).astype(f32))).astype(f32)
    updates = {
        "this kernel": ours * eta.astype(np.float64),
        "IEEE square root and division": m / fma(np.sqrt(v), c, eps) * eta.astype(np.float64),
        "torch's operations": (eta * m) / (np.sqrt(v) / bias_correction2_sqrt.astype(f32) + eps),
        "PTX's approximate ones": approximate * eta.astype(np.float64),
    }
    return {name: float(np.sqrt(np.mean(ulps(update, exact) ** 2))) for name, update in updates.items()}


def add_options(parser: common.Parser) -> None:
    parser.add_argument("--elements", type=common.positive_int, default=1_000_000, help="random elements")
    parser.add_argument("--seed", type=common.seed, default=0, help="of the random elements")


def measure(options: argparse.Namespace) -> list[Record]:
    errors = update_errors(options.elements, options.seed)
    return [
        {"command": "arithmetic", "case": "fp32 update", "provider": name, "rms_ulp": error}
        for name, error in errors.items()
    ]


def main(argv: list[str]) -> int:
    parser = common.Parser("arithmetic", DESCRIPTION)
    add_options(parser)
    parser.add_argument("--json", type=common.json_file, help="file for the records")
    options = parser.parse(argv)
    found = measure(options)
    Console().print(records.table("Error of the update", found, {"rms_ulp": "RMS, ulp"}))
    if options.json:
        records.write(options.json, "arithmetic", argv, torch.device("cpu"), found)
    return 0
