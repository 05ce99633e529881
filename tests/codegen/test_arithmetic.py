"""The kernel's square root and division on a GPU, by the emulation of bench/codegen/arithmetic.py."""

import numpy as np
import pytest

from bench.codegen.arithmetic import (
    SEED_ERROR,
    f32,
    fma,
    newton_divide,
    newton_sqrt,
    seed_errors,
    ulps,
    update_errors,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_square_root(rng):
    n = 1_000_000
    x = (2.0 ** rng.uniform(-149, 128, n)).astype(f32)
    x = x[np.isfinite(x) & (x > 0)]
    assert (x < 2.0**-126).sum() > 10_000, "denormals are among them"
    assert ulps(newton_sqrt(x, seed_errors(rng, len(x))), np.sqrt(x.astype(np.float64))).max() < 0.51


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
    quotient = newton_divide(numerator, denominator, seed_errors(rng, len(v)))
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


def test_error_of_the_update():
    """Why not PTX's approximate operations."""
    rms = update_errors(1_000_000, seed=1)
    assert rms["this kernel"] < 1.001 * rms["IEEE square root and division"], rms
    assert rms["this kernel"] < 0.99 * rms["torch's operations"], rms
    assert rms["PTX's approximate ones"] > 2 * rms["torch's operations"], rms
