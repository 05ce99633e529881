"""Stochastic rounding, resuming, and training that must not stand still for want of bits."""

import itertools

import pytest
import torch
from helpers import truncates_bf16
from torch import nn

from adamw_triton import AdamW, adamw_, launch, storage
from adamw_triton.storage.policies import POLICIES

OPTIONS = {"lr": 3e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
CODED = [policy for policy in POLICIES if not policy.is_plain]


# Stochastic rounding


def test_rounding_is_unbiased_and_independent(device, path):
    """The mean over many keys is the value; the noise of parameter, exp_avg and exp_avg_sq is uncorrelated."""
    n, keys = 2048, 200
    value = torch.randn(n, device=device, generator=torch.Generator(device).manual_seed(0)).abs() + 0.5
    sums = {name: torch.zeros(n, dtype=torch.float64, device=device) for name in ("param", "exp_avg", "exp_avg_sq")}
    products = torch.zeros(3, dtype=torch.float64)
    # With these, the new values before rounding are 1 + 2^-9 g (exp_avg), and so on, the same at every key.
    grad = value
    for key in range(keys):
        param = torch.ones(n, dtype=torch.bfloat16, device=device)
        exp_avg, exp_avg_sq = torch.ones_like(param), torch.ones_like(param)
        adamw_(
            param, grad, exp_avg, exp_avg_sq, step=1, lr=0.01, betas=(0.5, 0.5), weight_decay=0.0,
            stochastic_rounding=True, seed=key,
        )  # fmt: skip
        if key == 0:
            m, v = (1 + grad.double()) / 2, (1 + grad.double() ** 2) / 2
            exact = {"exp_avg": m, "exp_avg_sq": v, "param": 1 - 0.01 * (m / 0.5) / ((v / 0.5).sqrt() + 1e-8)}
        rounded = {"param": param, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        errors = {}
        for name, stored in rounded.items():
            ulp = 2.0 ** (torch.frexp(exact[name].float()).exponent - 8).double()
            errors[name] = (stored.double() - exact[name]) / ulp
            assert errors[name].abs().max() < 1.001, "rounded to a neighbour"
            sums[name] += errors[name]
        e = list(errors.values())
        products += torch.stack([(e[i] * e[j]).mean() for i, j in ((0, 1), (0, 2), (1, 2))]).cpu()
    for name, total in sums.items():
        mean = total / keys
        # A rounding error has at most the variance 1/4 of an ulp²: 5 sigma over all n * keys, 6 for each element.
        assert mean.mean().abs() < 5 * 0.5 / (n * keys) ** 0.5, name
        assert mean.abs().max() < 6 * 0.5 / keys**0.5, name
    assert (products / keys).abs().max() < 5 * 0.25 / (n * keys) ** 0.5


def stochastic_steps(params, *, foreach, seed=3, steps=3, skip=0):
    optimizer = AdamW(params, stochastic_rounding=True, seed=seed, foreach=foreach, **OPTIONS)
    generator = torch.Generator(params[0].device).manual_seed(9)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, device=p.device, generator=generator).to(p.dtype)
        optimizer.step()
    return optimizer


def test_random_bits_do_not_depend_on_the_launch(device, path):
    sizes = (5, 1024, 3000)
    start = [torch.randn(n, device=device).bfloat16() for n in sizes]
    one, other, third = ([nn.Parameter(p.clone()) for p in start] for _ in range(3))
    stochastic_steps(one, foreach=True)
    stochastic_steps(other, foreach=False)
    stochastic_steps(third, foreach=True, seed=4)
    assert all(map(torch.equal, one, other))
    assert not torch.equal(one[2], third[2]), "the seed counts"


def test_parameters_have_bits_of_their_own(device, path):
    twins = [nn.Parameter(torch.full((4096,), 1.001, device=device).bfloat16()) for _ in range(2)]
    for p in twins:
        p.grad = torch.ones_like(p)
    AdamW(twins, lr=1e-4, stochastic_rounding=True).step()
    assert not torch.equal(*twins)


@pytest.mark.fast
def test_slices_with_offsets_are_the_whole(device, path):
    """As sharding needs it, also where a slice begins inside of the 8 elements that share a Philox call."""
    n = 3000
    tensors = [torch.randn(n, device=device).bfloat16() for _ in range(3)] + [torch.rand(n, device=device).bfloat16()]
    whole = [t.clone() for t in tensors]
    options = {"step": 4, **OPTIONS, "stochastic_rounding": True, "seed": 2**40 + 5, "stream": 7}
    adamw_(*whole, **options)
    for cuts in ((0, 1024, n), (0, 8, 1000, n), (0, 3, 1501, 1506, n)):
        sliced = [t.clone() for t in tensors]
        for start, end in itertools.pairwise(cuts):
            adamw_(*(t[start:end] for t in sliced), **options, element_offset=start)
        assert all(map(torch.equal, whole, sliced)), cuts


@pytest.mark.parametrize("policy", CODED, ids=lambda policy: policy.name)
def test_resume_is_bit_exact(policy, device, path, tmp_path):
    def train(params, optimizer, steps):
        for step in steps:
            generator = torch.Generator(device).manual_seed(step)
            for p in params:
                p.grad = torch.randn(p.shape, device=device, generator=generator).to(policy.grad)
            optimizer.step()

    params = [nn.Parameter(torch.randn(n, device=device).to(policy.param)) for n in (5, (12, 128))]
    optimizer = AdamW(params, **OPTIONS, **policy.options)
    train(params, optimizer, range(3))
    torch.save({"params": params, "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed = AdamW(loaded["params"], **OPTIONS, **policy.options)
    resumed.load_state_dict(loaded["optimizer"])
    for name, value in optimizer.state[params[1]].items():
        assert torch.equal(resumed.state[loaded["params"][1]][name], value), name
    train(params, optimizer, range(3, 6))
    train(loaded["params"], resumed, range(3, 6))
    assert all(map(torch.equal, params, loaded["params"]))
    assert all(map(torch.equal, optimizer.master_params(), resumed.master_params()))


# Training that must not stand still


def test_tiny_weight_decay_acts(device, path):
    """lr * wd = 1e-6 is far below half a bf16 ulp: rounded to nearest it vanishes; it must not here."""
    options = {"lr": 1e-3, "weight_decay": 1e-3, "betas": (0.9, 0.999)}
    steps, n = 50, 4096
    expected = (1 - 1e-6) ** steps

    def run(**storage_options):
        param = nn.Parameter(torch.ones(n, dtype=torch.bfloat16, device=device))
        optimizer = AdamW([param], **options, **storage_options)
        param.grad = torch.zeros_like(param)
        for _ in range(steps):
            optimizer.step()
        return optimizer.master_params()[0].double().mean().item()

    if path == "reference" or not truncates_bf16():
        assert run() == 1.0, "what is to be mended"
    arithmetic = steps * 2.0**-25  # of fp32, whose rounding of 1 - 1e-6 is the same at every step
    assert run(master_weight_bits=32) == pytest.approx(expected, abs=arithmetic)
    # The mean of n weights after `steps` roundings of 2^-8 with probability p: its standard deviation, 5 times.
    p = 1e-6 / 2.0**-8
    deviation = (steps * p * (1 - p) / n) ** 0.5 * 2.0**-8
    assert run(stochastic_rounding=True) == pytest.approx(expected, abs=5 * deviation + arithmetic)
    p = 1e-6 / 2.0**-16
    deviation = (steps * p * (1 - p) / n) ** 0.5 * 2.0**-16
    mean = run(master_weight_bits=24, stochastic_rounding=True)
    assert mean == pytest.approx(expected, abs=5 * deviation + arithmetic)


@pytest.mark.parametrize("start", [0.0, 100.0])
@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_8_bit_v_reaches_its_fixed_point(start, beta2, device, path):
    """A constant gradient g: v tends to g², also from far above, where a code is a larger step than the decay."""
    if path == "kernel" and beta2 == 0.999 and launch.INTERPRETED:
        pytest.skip("8000 launches take minutes in the interpreter")
    g = 3.0
    param = nn.Parameter(torch.zeros(3, 128, device=device))
    optimizer = AdamW(
        [param], lr=0.0, betas=(0.9, beta2), exp_avg_dtype="int8", exp_avg_sq_dtype="uint8", stochastic_rounding=False
    )
    param.grad = torch.full_like(param, g)
    optimizer.step()
    codes, scale = storage.encode("exp_avg_sq", torch.full((3, 128), start, device=device))
    optimizer.state[param].update(exp_avg_sq_codes=codes, exp_avg_sq_scale=scale)
    for _ in range(int(8 / (1 - beta2))):
        optimizer.step()
    v = storage.moment("exp_avg_sq", optimizer.state[param])
    torch.testing.assert_close(v, torch.full_like(v, g * g), rtol=0.01, atol=0)
