"""The kernel's square root and division, emulated with every error that a GPU's approximate seeds may have.

The interpreter has exact seeds and no fused multiply-add, a GPU has approximate seeds and real fma. Here both are
what the hardware documents: PTX ISA, rsqrt.approx.ftz.f32, largest relative error 2^-22.9. That makes the last
two units wrong at worst; the Newton step must repair them for whatever error inside of that.
"""

import numpy as np
import pytest

SEED_ERROR = 2.0**-22.9
f32 = np.float32


def fma(a, b, c):
    # The product of two fp32 is exact in fp64 and the sum nearly so: one rounding in effect.
    return (a.astype(np.float64) * b.astype(np.float64) + np.float64(c)).astype(f32)


def rsqrt(x, error):
    """rsqrt.approx.ftz: denormals count as 0."""
    x = np.where(np.abs(x) < 2.0**-126, 0, x).astype(np.float64)
    return (1 / np.sqrt(x) * (1 + error)).astype(f32)


def newton_sqrt(x, error):
    tiny = x < f32(2.0**-100)
    scaled = np.where(tiny, x * f32(2.0**100), x)
    seed = rsqrt(scaled, error)
    root = scaled * seed
    root = fma(fma(-root, root, scaled), f32(0.5) * seed, root)
    root = np.where(root == root, root, scaled)
    return np.where(tiny, root * f32(2.0**-50), root)


def newton_divide(a, b, error):
    seed = rsqrt(b, error)
    reciprocal = seed * seed
    estimate = a * reciprocal
    quotient = fma(fma(-b, estimate, a), reciprocal, estimate)
    return np.where(quotient == quotient, quotient, estimate)


def errors(rng, n):
    """Random, and both extremes."""
    return np.concatenate(
        [rng.uniform(-SEED_ERROR, SEED_ERROR, n - 2 * (n // 4)), *[np.full(n // 4, s * SEED_ERROR) for s in (-1, 1)]]
    )


def ulps(actual, expected):
    return np.abs(actual.astype(np.float64) - expected) / np.spacing(np.abs(expected).astype(f32)).astype(np.float64)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_square_root(rng):
    n = 1_000_000
    x = (2.0 ** rng.uniform(-149, 128, n)).astype(f32)
    x = x[np.isfinite(x) & (x > 0)]
    assert (x < 2.0**-126).sum() > 10_000, "denormals are among them"
    assert ulps(newton_sqrt(x, errors(rng, len(x))), np.sqrt(x.astype(np.float64))).max() < 0.51


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-3])
def test_division_by_every_denominator_there_is(rng, eps):
    """sqrt(v) * c + eps, for v from the smallest denormal to the largest number and c = 1 / sqrt(1 - β2^t)."""
    n = 1_000_000
    v = (2.0 ** rng.uniform(-149, 128, n)).astype(f32)
    v = v[np.isfinite(v) & (v > 0)]
    denominator = fma(np.sqrt(v), (1 / np.sqrt(rng.uniform(1e-4, 1, len(v)))).astype(f32), f32(eps))
    numerator = (rng.choice([-1, 1], len(v)) * denominator * 2.0 ** rng.uniform(-40, 12, len(v))).astype(f32)
    exact = numerator.astype(np.float64) / denominator.astype(np.float64)
    # Below 2^-100 the residual is a denormal that may round; such an update is lost in any parameter.
    normal = np.abs(numerator) > 2.0**-100
    quotient = newton_divide(numerator, denominator, errors(rng, len(v)))
    assert ulps(quotient, exact)[normal].max() < 0.52
    assert np.abs(quotient - exact)[~normal].max(initial=0) <= 2.0**-20 * np.abs(exact[~normal]).max(initial=0)
    assert denominator.min() > 2.0**-80 and denominator.max() < 2.0**80, "far from where a reciprocal needs scaling"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("error", [-SEED_ERROR, 0.0, SEED_ERROR])
def test_special_values(error):
    inf, nan = f32(np.inf), f32(np.nan)
    x = np.array([0.0, -0.0, inf, nan, 1.0, 4.0], f32)
    np.testing.assert_array_equal(newton_sqrt(x, error), np.sqrt(x))
    a, b = (
        t.reshape(-1)
        for t in np.meshgrid(np.array([0.0, 1.0, -2.0, inf, -inf, nan], f32), np.array([0.0, 1.0, inf, nan], f32))
    )
    np.testing.assert_array_equal(newton_divide(a, b, error), a / b)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_error_of_the_update(rng):
    """Why not PTX's approximate operations: root mean square error of η m / (sqrt(v) c + eps), in ulp.

    sqrt.approx.ftz.f32 may be off by 2^-23 and div.full.f32 by 2 ulp; errors are drawn evenly from that. The
    kernel adds the product with the step size to the parameter unrounded (fma), torch's loop rounds it.
    """
    n = 1_000_000
    m, v = rng.standard_normal(n).astype(f32), rng.uniform(0.01, 4, n).astype(f32)
    # The rounding of these to fp32 is part of the error, so there are many of each.
    step_size, bias_correction2_sqrt = rng.uniform(1e-4, 1e-3, n), rng.uniform(0.03, 1, n)
    eta, c, eps = step_size.astype(f32), (1 / bias_correction2_sqrt).astype(f32), f32(1e-8)
    exact = step_size * m / (np.sqrt(v.astype(np.float64)) / bias_correction2_sqrt + np.float64(eps))

    root = (np.sqrt(v.astype(np.float64)) * (1 + rng.uniform(-1, 1, n) * 2.0**-23)).astype(f32)
    approximate = m.astype(np.float64) / fma(root, c, eps)
    approximate = (approximate + rng.uniform(-2, 2, n) * np.spacing(np.abs(approximate).astype(f32))).astype(f32)
    updates = {
        "ours": newton_divide(m, fma(newton_sqrt(v, errors(rng, n)), c, eps), errors(rng, n)) * eta.astype(np.float64),
        "ieee": m / fma(np.sqrt(v), c, eps) * eta.astype(np.float64),
        "approximate": approximate * eta.astype(np.float64),
        "torch": (eta * m) / (np.sqrt(v) / bias_correction2_sqrt.astype(f32) + eps),
    }
    rms = {name: np.sqrt(np.mean(ulps(update, exact) ** 2)) for name, update in updates.items()}
    assert rms["ours"] < 1.001 * rms["ieee"], rms
    assert rms["ours"] < 0.99 * rms["torch"], rms
    assert rms["approximate"] > 2 * rms["torch"], rms
    # The README's table.
    assert rms == pytest.approx({"ours": 0.69, "ieee": 0.69, "approximate": 1.66, "torch": 0.74}, abs=0.01)
