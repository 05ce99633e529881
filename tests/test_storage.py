"""Storage policies: every format against its definition, in both entries and both paths."""

import copy
import itertools

import numpy as np
import pytest
import torch
from helpers import Guarded, bits, truncates_bf16
from torch import nn

from adamw_triton import AdamW, adamw_, launch, storage
from bench.policies import POLICIES

OPTIONS = {"lr": 3e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
CODED = [policy for policy in POLICIES if not policy.is_plain]
EIGHT = [policy for policy in CODED if policy.exp_avg == torch.int8]
# Shorter than a group, around a group and a block, and several blocks with a tail.
SIZES = (1, 7, 127, 128, 129, 511, 512, 1023, 1024, 1025, 3 * 1024 + 5)


def parameters(policy, sizes, device, offset=0, guard=None):
    params = []
    for size in sizes:
        value = torch.randn(size, device=device).to(policy.param)
        param = nn.Parameter(guard.place(value, offset) if guard else value)
        param.grad = torch.randn(size, device=device).to(policy.grad)
        params.append(param)
    return params


def copies(params):
    made = [nn.Parameter(p.detach().clone()) for p in params]
    for p, q in zip(params, made, strict=True):
        q.grad = p.grad.clone()
    return made


def new_gradients(*lists, scale=1.0):
    for together in zip(*lists, strict=True):
        gradient = torch.randn(together[0].shape, device=together[0].device) * scale
        for p in together:
            p.grad = gradient.to(p.grad.dtype)


# The formats


def fp32_from_bits(values):
    return torch.tensor(values, dtype=torch.int64).to(torch.int32).view(torch.float32)


def test_split_is_exact_with_16_bits():
    weights = torch.randint(-(2**31), 2**31, (200_000,)).to(torch.int32).view(torch.float32)
    high, remainder = storage.split(weights, torch.int16)
    joined = storage.join(high, remainder)
    numbers = ~weights.isnan()
    assert torch.equal(bits(joined[numbers]), bits(weights[numbers]))
    assert joined.isnan().eq(weights.isnan()).all() and high.isnan().eq(weights.isnan()).all()
    # The parameter is the nearest bf16.
    finite = weights.isfinite() & high.isfinite()
    nearest = weights[finite].bfloat16().double()
    error = (high[finite].double() - weights[finite].double()).abs()
    assert (error <= (nearest - weights[finite].double()).abs()).all()


SPECIAL = {
    "NaN of a GPU": 0x7FFFFFFF, "negative NaN": 0xFFFFFFFF, "NaN whose high half is infinite": 0x7F800001,
    "infinity": 0x7F800000, "-infinity": 0xFF800000, "largest": 0x7F7FFFFF, "-largest": 0xFF7FFFFF,
    "-0.0": 0x80000000, "0.0": 0, "smallest denormal": 1, "-denormal": 0x80007FFF, "largest denormal": 0x007FFFFF,
    "tie": 0x3F808000, "-tie": 0xBF808000, "below a tie": 0x3F807FFF, "odd tie": 0x3F818000, "one": 0x3F800000,
}  # fmt: skip


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("dtype", [torch.int16, torch.int8])
def test_split_of_special_values(name, dtype):
    weight = fp32_from_bits([SPECIAL[name]])
    high, remainder = storage.split(weight, dtype)
    joined = storage.join(high, remainder)
    if weight.isnan():
        assert high.isnan() and joined.isnan()
    elif dtype == torch.int16:
        assert torch.equal(bits(joined), bits(weight))
    else:
        # 24 bits: half a unit of 2^8 bits away at most, overflow to infinity included.
        distance = (joined.view(torch.int32).long() - weight.view(torch.int32).long()).abs()
        assert distance <= 0x80 and joined.signbit() == weight.signbit()
    if "largest" in name and "denormal" not in name:
        assert high.isinf(), "rounded to bf16, it overflows"


@pytest.mark.parametrize("dtype", [torch.int16, torch.int8])
def test_special_weights_through_a_step_that_changes_nothing(dtype, device, path):
    """What was split is joined and split again by the step itself, NaN included."""
    weights = fp32_from_bits(list(SPECIAL.values())).to(device).repeat(9)
    param, remainder = storage.split(weights, dtype)
    before = param.clone(), remainder.clone()
    zeros = [torch.zeros_like(weights) for _ in range(3)]
    adamw_(param, *zeros, step=1, lr=0.0, weight_decay=0.0, param_remainder=remainder)
    joined = storage.join(param, remainder)
    assert joined.isnan().equal(weights.isnan()) and param.isnan().equal(weights.isnan())
    assert not joined[weights == 0].any(), "whose sign is the sum's"
    others = ~weights.isnan() & (weights != 0)
    assert torch.equal(bits(param[others]), bits(before[0][others]))
    assert torch.equal(remainder[others], before[1][others])


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("size", SIZES)
def test_codes_decode_to_what_they_say(name, size):
    """Against the definition in float64: the code is the nearest, and the decoded value that code's."""
    value = torch.randn(size) * torch.logspace(-6, 3, size)
    value = value if name == "exp_avg" else value * value
    codes, scale = storage.encode(name, value)
    assert scale.shape == (-(-size // 128),) and codes.dtype == storage.EIGHT_BITS[name]
    magnitude = value.double().abs().numpy()
    magnitude = magnitude if name == "exp_avg" else np.sqrt(magnitude)
    largest = 127 if name == "exp_avg" else 255
    starts = range(0, size, 128)
    exact_scale = np.concatenate([np.full(len(magnitude[s : s + 128]), magnitude[s : s + 128].max()) for s in starts])
    expected = largest * np.sqrt(magnitude / exact_scale)
    assert np.abs(codes.long().abs().numpy() - np.maximum(expected, name == "exp_avg_sq")).max() < 0.5 + 1e-3
    decoded = (codes.double().numpy() / largest) ** 2 * exact_scale
    decoded = decoded * np.sign(codes.numpy()) if name == "exp_avg" else decoded**2
    np.testing.assert_allclose(storage.decode(name, codes, scale).double().numpy(), decoded, rtol=1e-6)


def test_codes_of_special_blocks():
    zeros = torch.zeros(300)
    for name in ("exp_avg", "exp_avg_sq"):
        codes, scale = storage.encode(name, zeros)
        assert torch.equal(storage.decode(name, codes, scale), zeros) and not scale.any()
    value = torch.zeros(128)
    value[3], value[70] = 1e30, 1e-12
    codes, scale = storage.encode("exp_avg_sq", value)
    assert codes[3] == 255 and (codes > 0).all(), "a v > 0 is never coded 0"
    assert storage.decode("exp_avg_sq", codes, scale)[3].item() == pytest.approx(1e30, rel=1e-6)
    tiny = torch.full((200,), 1e-27)  # v of gradients of 1e-12
    codes, scale = storage.encode("exp_avg_sq", tiny)
    torch.testing.assert_close(storage.decode("exp_avg_sq", codes, scale), tiny)


@pytest.mark.parametrize(
    ("rounds", "words"),
    [
        (7, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (10, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ],
)
def test_philox_known_answers(rounds, words, monkeypatch):
    """Of Random123, for a counter and a key of zeros."""
    monkeypatch.setattr(storage, "PHILOX_ROUNDS", rounds)
    assert tuple(map(int, storage._philox(0, torch.tensor([0]), step=0, stream=0))) == words


# The step


@pytest.mark.parametrize("policy", CODED, ids=lambda policy: policy.name)
@pytest.mark.parametrize("offset", [0, 1])
def test_both_entries_and_the_reference_agree(policy, offset, device, monkeypatch):
    """Over several steps; the reference is the specification, on the CPU."""
    results = []
    start = parameters(policy, SIZES, device)
    gradients = [[torch.randn_like(p).to(policy.grad) for p in start] for _ in range(4)]
    for foreach, kernels in ((True, True), (False, True), (None, False)):
        guard = Guarded()
        params = [nn.Parameter(guard.place(p.detach(), offset)) for p in start]
        optimizer = AdamW(params, **OPTIONS, **policy.options, foreach=foreach)
        with monkeypatch.context() as patch:
            if not kernels:
                patch.setattr(launch, "has_kernels", lambda device: False)
            for step in gradients:
                for p, g in zip(params, step, strict=True):
                    p.grad = guard.place(g, offset)
                optimizer.step()
        guard.assert_untouched()
        results.append((params, optimizer))
    (table, table_state), (single, single_state), (reference, reference_state) = results
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(table, single, strict=True))
    for a, b in zip(table, single, strict=True):
        for name, value in table_state.state[a].items():
            assert torch.equal(value, single_state.state[b][name]), name
    for a, b in zip(table_state.master_params(), reference_state.master_params(), strict=True):
        difference = (a - b).abs()
        assert difference.max() <= tolerance(policy) * (1 + b.abs().max()), difference.max()
    for a, b in zip(table, reference, strict=True):
        for name, value in table_state.state[a].items():
            other = reference_state.state[b][name]
            assert value.dtype == other.dtype and value.shape == other.shape, name
            if name in ("exp_avg", "exp_avg_sq") and not value.is_floating_point():
                apart = (value.long() - other.long()).abs()  # ties, and what they entail
                assert apart.max() <= 2 and (apart > 0).float().mean() < 0.02, (name, apart.max())


def tolerance(policy):
    """Of weights after 4 steps of about 0.03: a code apart here and there, or a rounding."""
    if policy.exp_avg == torch.int8:
        return 2e-3
    if policy.master_weight_bits is None or policy.exp_avg == torch.bfloat16:
        return 2.0**-7 if truncates_bf16() or policy.stochastic_rounding else 2.0**-8
    return 1e-6


@pytest.mark.parametrize("policy", EIGHT, ids=lambda policy: policy.name)
def test_one_step_of_8_bit_moments_is_the_definition(policy, device, path):
    """Decode in float64, step, and compare the decoded result within half a code of each group's scale."""
    n = 128 * 9 + 77
    param = nn.Parameter(torch.randn(n, device=device).to(policy.param))
    optimizer = AdamW([param], **OPTIONS, **policy.options)
    for _ in range(3):
        param.grad = torch.randn(n, device=device).to(policy.grad)
        optimizer.step()
    state = optimizer.state[param]
    m, v = (storage.decode(k, state[k], state[f"{k}_scale"]).double().cpu() for k in ("exp_avg", "exp_avg_sq"))
    p = optimizer.master_params()[0].double().cpu()
    param.grad = torch.randn(n, device=device).to(policy.grad)
    g = param.grad.double().cpu()
    optimizer.step()
    beta1, beta2 = OPTIONS["betas"]
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    denominator = (v / (1 - beta2**4)).sqrt() + OPTIONS["eps"]
    p = p * (1 - OPTIONS["lr"] * OPTIONS["weight_decay"]) - OPTIONS["lr"] / (1 - beta1**4) * m / denominator
    atol = 2.0**-15 if policy.master_weight_bits == 24 else 0
    torch.testing.assert_close(optimizer.master_params()[0].double().cpu(), p, rtol=2e-6, atol=max(atol, 2e-6))
    for name, value, largest in (("exp_avg", m, 127), ("exp_avg_sq", v.sqrt(), 255)):
        scale = state[f"{name}_scale"].double().cpu().repeat_interleave(128)[:n]
        decoded = storage.decode(name, state[name], state[f"{name}_scale"]).double().cpu()
        decoded = decoded if name == "exp_avg" else decoded.sqrt()
        code = largest * (decoded.abs() / scale).sqrt()
        exact = largest * (value.abs() / scale).sqrt()
        assert (code - exact.clamp(min=float(name == "exp_avg_sq"))).abs().max() < 0.51
        assert (decoded.sign() * value.sign() >= 0).all()


@pytest.mark.parametrize("policy", CODED, ids=lambda policy: policy.name)
def test_nothing_around_the_tensors_is_written(policy, device, path):
    guard = Guarded()
    for size, offset in itertools.product((1, 127, 129, 1025), (0, 1, 3)):
        param = nn.Parameter(guard.place(torch.randn(size, device=device).to(policy.param), offset))
        optimizer = AdamW([param], **policy.options)
        param.grad = guard.place(torch.randn(size, device=device).to(policy.grad), offset)
        optimizer.step()
        state = optimizer.state[param]
        for name in list(state):
            if name != "step":
                fill = 77 if state[name].dtype == torch.uint8 else -77
                buffer = torch.full((size + 200,), fill, dtype=state[name].dtype, device=device)
                inside = slice(100 + offset, 100 + offset + state[name].numel())
                buffer[inside] = state[name]
                state[name] = buffer[inside]
                guard.buffers.append((buffer if fill == -77 else buffer.to(torch.int16) - 154, inside))
        before = [b.clone() for b, _ in guard.buffers]
        param.grad = guard.place(torch.randn(size, device=device).to(policy.grad), offset)
        optimizer.step()
        for name, value in state.items():
            if name != "step":
                base = value._base
                edges = torch.cat((base[: 100 + offset], base[100 + offset + value.numel() :]))
                assert (edges == (77 if value.dtype == torch.uint8 else -77)).all(), name
        assert len(before) == len(guard.buffers) - 1


def test_32_bit_master_is_the_fp32_optimizer_bit_for_bit(device, path):
    """1000 steps of the same gradients (200 in the interpreter): bf16 with a remainder, fp16 with a master, fp32."""
    steps = 200 if path == "kernel" and launch.INTERPRETED else 1000
    for low in (torch.bfloat16, torch.float16):
        start = torch.randn(700, device=device).to(low)
        ours, fp32 = nn.Parameter(start.clone()), nn.Parameter(start.float())
        mine, reference = AdamW([ours], master_weight_bits=32, **OPTIONS), AdamW([fp32], **OPTIONS)
        generator = torch.Generator(device).manual_seed(1)
        for _ in range(steps):
            ours.grad = torch.randn(700, device=device, generator=generator).to(low)
            fp32.grad = ours.grad.float()
            mine.step()
            reference.step()
        assert torch.equal(bits(mine.master_params()[0]), bits(fp32))
        difference = (ours.float() - fp32).abs()
        assert (difference <= fp32.abs() * 2.0**-8).all() if low == torch.bfloat16 else True


@pytest.mark.parametrize("bits_", [24, 32])
def test_nan_in_a_gradient_stays_nan(bits_, device, path):
    param = nn.Parameter(torch.ones(300, dtype=torch.bfloat16, device=device))
    optimizer = AdamW([param], master_weight_bits=bits_)
    param.grad = torch.ones_like(param)
    param.grad[5] = float("nan")
    for _ in range(2):
        optimizer.step()
    assert param[5].isnan() and optimizer.master_params()[0][5].isnan()
    assert param.isnan().sum() == 1


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

    params = [nn.Parameter(torch.randn(n, device=device).to(policy.param)) for n in (5, 1500)]
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
    steps, n = 150, 4096
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
    n, g = 400, 3.0
    param = nn.Parameter(torch.zeros(n, device=device))
    optimizer = AdamW([param], lr=0.0, betas=(0.9, beta2), exp_avg_dtype=torch.int8, exp_avg_sq_dtype=torch.uint8)
    param.grad = torch.full_like(param, g)
    optimizer.step()
    codes, scale = storage.encode("exp_avg_sq", torch.full((n,), start, device=device))
    optimizer.state[param].update(exp_avg_sq=codes, exp_avg_sq_scale=scale)
    for _ in range(int(8 / (1 - beta2))):
        optimizer.step()
    v = storage.decode("exp_avg_sq", optimizer.state[param]["exp_avg_sq"], optimizer.state[param]["exp_avg_sq_scale"])
    torch.testing.assert_close(v, torch.full_like(v, g * g), rtol=0.01, atol=0)


# What a user does with it


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_state_bytes_are_the_table(policy, device, path):
    n = 128 * 64
    param = nn.Parameter(torch.zeros(n, device=device, dtype=policy.param))
    param.grad = torch.zeros(n, device=device, dtype=policy.param)
    optimizer = AdamW([param], **policy.options)
    optimizer.step()
    found = optimizer.state_bytes()
    assert found.n_params == n and found.total - found.by_name["step"] == policy.state_bytes * n
    assert found.total == sum(t.untyped_storage().nbytes() for t in optimizer.state[param].values())
    lines = str(found).splitlines()
    assert lines[-1].split()[0] == "total" and f"{found.total:,}" in lines[-1]


@pytest.mark.parametrize("policy", CODED, ids=lambda policy: policy.name)
def test_master_weights_in_and_out(policy, device, path):
    params = [nn.Parameter(torch.zeros(n, device=device, dtype=policy.param)) for n in (3, 700)]
    optimizer = AdamW(params, lr=0.0, weight_decay=0.0, **policy.options)
    weights = [torch.randn(n, device=device) for n in (3, 700)]
    weights[1][:4] = fp32_from_bits([0x3F808000, 0x3F818000, 0xBF808000, 0x3F807FFF]).to(device)  # ties
    optimizer.load_master_params(weights)
    for p in params:
        p.grad = torch.zeros_like(p)
    for _ in range(2):
        got = optimizer.master_params()
        for weight, master, param in zip(weights, got, params, strict=True):
            assert master.dtype == torch.float32
            if policy.master_weight_bits == 32:
                assert torch.equal(bits(master), bits(weight))
            elif policy.master_weight_bits == 24:
                assert (master - weight).abs().div(weight.abs()).max() <= 2.0**-16
            else:
                assert torch.equal(master, param.float())
            assert (param.float() - weight).abs().div(weight.abs()).max() <= 2.0**-8
        if not policy.stochastic_rounding:
            optimizer.step()  # a step of nothing changes nothing
    before = optimizer.master_params()
    with pytest.raises(ValueError, match="shapes"):
        optimizer.load_master_params(weights[::-1])
    assert all(map(torch.equal, before, optimizer.master_params()))


SAME_MODEL = [(a, b) for a, b in itertools.product(POLICIES, repeat=2) if a.param == b.param]


@pytest.mark.parametrize(("source", "target"), SAME_MODEL, ids=lambda policy: policy.name)
def test_state_of_any_policy_loads_into_any_other(source, target, device):
    """Where parameters have the same dtype; what the target can hold survives."""
    params = [nn.Parameter(torch.randn(n, device=device).to(source.param)) for n in (5, 300)]
    optimizer = AdamW(params, **OPTIONS, **source.options)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    other = AdamW(copies(params), **OPTIONS, **target.options)
    if source.amsgrad and target.exp_avg_sq == torch.uint8:
        with pytest.raises(ValueError, match="amsgrad=True needs"):
            other.load_state_dict(optimizer.state_dict())
        return
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for name in ("exp_avg", "exp_avg_sq"):
        for p, q in zip(params, other.param_groups[0]["params"], strict=True):
            a, b = optimizer.state[p], other.state[q]
            wish = target.options[f"{name}_dtype"]
            assert b[name].dtype == wish or wish is None
            values = [
                storage.decode(name, s[name], s[f"{name}_scale"]) if f"{name}_scale" in s else s[name].float()
                for s in (a, b)
            ]
            # A code's step is largest at the top: 2 / 127 of m, 4 / 255 of v.
            torch.testing.assert_close(*values, rtol=0.02, atol=1e-3 * values[0].abs().max().item())
    for a, b in zip(optimizer.master_params(), other.master_params(), strict=True):
        exact = target.master_weight_bits == 32 or source.master_weight_bits is None
        torch.testing.assert_close(a, b, rtol=0 if exact else 2.0**-8, atol=0)
    assert other.param_groups[0]["exp_avg_dtype"] == target.options["exp_avg_dtype"]
    for p in other.param_groups[0]["params"]:
        p.grad = torch.randn_like(p)
    other.step()


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_torch_loads_it(policy, device, path):
    params = [nn.Parameter(torch.randn(n, device=device).to(policy.param)) for n in (5, 300)]
    optimizer = AdamW(params, **OPTIONS, **policy.options)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    theirs = torch.optim.AdamW(copies(params), **OPTIONS, amsgrad=policy.amsgrad, foreach=False)
    state_dict = optimizer.torch_state_dict()
    names = {"step", "exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if policy.amsgrad else [])}
    assert all(entries.keys() == names for entries in state_dict["state"].values())
    assert state_dict["param_groups"][0].keys() <= theirs.param_groups[0].keys()
    theirs.load_state_dict(state_dict)
    theirs.step()
    back = AdamW(copies(params), **OPTIONS, **policy.options)
    back.load_state_dict(state_dict)
    assert back.state_dict()["state"][1].keys() == optimizer.state_dict()["state"][1].keys()
    back.step()


def edit_scale(state, **changes):
    state.update(changes)


BROKEN = {
    "no scale": (lambda s: s.pop("exp_avg_scale"), "exp_avg_scale"),
    "short scale": (lambda s: s.update(exp_avg_sq_scale=torch.ones(2)), r"shape \(3,\)"),
    "scale of blocks of 256": (lambda s: s.update(exp_avg_scale=torch.ones(2)), "one for each 128"),
    "fp16 scale": (lambda s: s.update(exp_avg_scale=torch.ones(3).half()), "must be float32"),
    "scale without codes": (lambda s: s.update(exp_avg=torch.zeros(300)), "exp_avg_scale"),
    "codes of the other moment": (lambda s: s.update(exp_avg=s["exp_avg_sq"].clone()), "exp_avg"),
    "remainder of another shape": (lambda s: s.update(param_remainder=torch.zeros(7, dtype=torch.int8)), r"\(7,\)"),
    "remainder that is a float": (lambda s: s.update(param_remainder=torch.zeros(300)), "int16 or int8"),
    "no exp_avg": (lambda s: s.pop("exp_avg"), "no exp_avg"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_inconsistent_state_is_refused_before_anything_changes(name, device):
    change, message = BROKEN[name]
    options = {"exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.uint8, "master_weight_bits": 24}
    param = nn.Parameter(torch.randn(300, device=device).bfloat16())
    optimizer = AdamW([param], **options)
    param.grad = torch.randn_like(param)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    broken = copy.deepcopy(saved)
    change(broken["state"][0])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(broken)
    now = optimizer.state_dict()["state"][0]
    assert all(torch.equal(now[key], value) for key, value in saved["state"][0].items())
    state, before = optimizer.state[param], param.detach().clone()
    if name != "no exp_avg":  # which is created anew
        change(state)
        with pytest.raises(RuntimeError, match=message.replace("no exp_avg", "exp_avg")):
            optimizer.step()
        assert torch.equal(param, before)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
REFUSED = [
    (BF16, {"exp_avg_dtype": torch.uint8}, "exp_avg_dtype must be None or one of"),
    (BF16, {"exp_avg_sq_dtype": torch.int8}, "exp_avg_sq_dtype must be None or one of"),
    (BF16, {"exp_avg_dtype": "int8"}, "got 'int8'"),
    (BF16, {"exp_avg_sq_dtype": FP16}, "for float16 parameters"),
    (BF16, {"exp_avg_sq_dtype": torch.uint8, "amsgrad": True}, "amsgrad"),
    (BF16, {"master_weight_bits": 16}, "None, 24 or 32; got 16"),
    (FP32, {"master_weight_bits": 32}, "param_groups_master_weights"),
    (FP32, {"master_weight_bits": 24}, "its own master"),
    (FP16, {"master_weight_bits": 24}, "Use master_weight_bits=32"),
    (FP32, {"stochastic_rounding": True}, "Leave it out"),
    (FP16, {"stochastic_rounding": True}, "Leave it out"),
    (BF16, {"stochastic_rounding": True, "master_weight_bits": 32}, "Leave it out"),
    (BF16, {"seed": 5}, "stochastic_rounding=True"),
    (BF16, {"seed": -1, "stochastic_rounding": True}, "got -1"),
    (BF16, {"seed": 0.5, "stochastic_rounding": True}, "got 0.5"),
    (torch.float64, {"exp_avg_dtype": torch.int8}, "float32, bfloat16 and float16"),
    (torch.complex64, {"exp_avg_dtype": torch.bfloat16}, "float32, bfloat16 and float16"),
]


@pytest.mark.parametrize(("dtype", "options", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_cannot_work_is_refused(dtype, options, message):
    param = nn.Parameter(torch.zeros(3, dtype=dtype))
    with pytest.raises(ValueError, match=message):
        AdamW([param], **options)
    with pytest.raises(ValueError, match=message):
        AdamW([nn.Parameter(torch.zeros(2))]).add_param_group({"params": [param], **options})


FUNCTION_REFUSES = [
    (BF16, {"param_remainder": torch.int16, "master_param": FP32}, ValueError, "one of them"),
    (FP32, {"param_remainder": torch.int16}, RuntimeError, "of a bfloat16 parameter"),
    (FP16, {"master_param": BF16}, RuntimeError, "must be float32"),
    (torch.float64, {"master_param": FP32}, RuntimeError, "float32, bfloat16 and float16 parameters"),
    (BF16, {"seed": 3}, ValueError, "give it with stochastic_rounding=True"),
    (BF16, {"element_offset": 8}, ValueError, "give it with stochastic_rounding=True"),
    (BF16, {"element_offset": -8, "stochastic_rounding": True}, ValueError, "got -8"),
    (BF16, {"stream": 2**31, "stochastic_rounding": True}, ValueError, "stream must be"),
    (FP32, {"stochastic_rounding": True}, ValueError, "got a parameter of torch.float32"),
    (torch.float64, {"stochastic_rounding": True}, ValueError, "torch.float64"),
]


@pytest.mark.parametrize(("dtype", "options", "error", "message"), FUNCTION_REFUSES)
def test_what_the_function_refuses(dtype, options, error, message, device, path):
    tensors = [torch.ones(5, dtype=dtype, device=device) for _ in range(4)]
    entries = {
        name: torch.zeros(5, dtype=value, device=device) if isinstance(value, torch.dtype) else value
        for name, value in options.items()
    }
    with pytest.raises(error, match=message):
        adamw_(*tensors, step=1, lr=0.1, **entries)
    assert all(torch.equal(t, torch.ones_like(t)) for t in tensors)


def test_codes_of_a_float64_parameter_are_refused(device, path):
    param, grad = (torch.ones(5, dtype=torch.float64, device=device) for _ in range(2))
    codes, scale = torch.zeros(5, dtype=torch.int8, device=device), torch.zeros(1, device=device)
    with pytest.raises(RuntimeError, match="float32, bfloat16 and float16 parameters"):
        adamw_(param, grad, codes, torch.zeros_like(param), step=1, lr=0.1, exp_avg_scale=scale)


def test_random_bits_of_a_step_counted_on_the_device(device, path):
    """With GradScaler's attributes the step reaches the kernel through memory; the bits are the same."""
    start = torch.randn(2000, device=device).bfloat16()
    results = []
    for scaled in (False, True):
        param = nn.Parameter(start.clone())
        optimizer = AdamW([param], stochastic_rounding=True, seed=11, fused=True, **OPTIONS)
        generator = torch.Generator(device).manual_seed(2)
        for step in range(4):
            param.grad = torch.randn(2000, device=device, generator=generator).bfloat16()
            if scaled:
                optimizer.grad_scale = torch.ones((), device=device)
                optimizer.found_inf = torch.zeros((), device=device)
                if step == 2:  # a skipped step draws no bits
                    optimizer.found_inf += 1
                    optimizer.step()
                    optimizer.found_inf -= 1
            optimizer.step()
        results.append((param, optimizer.state[param]))
    (one, state), (other, other_state) = results
    # The scalars are the same to an fp32 rounding, which stochastic rounding can turn into one of bf16.
    assert (one != other).float().mean() < 0.01
    assert state["step"] == other_state["step"] == 4


@pytest.mark.parametrize("master", [None, 24, 32])
@pytest.mark.parametrize("exp_avg_dtype", [None, BF16, FP32, FP16, torch.int8])
@pytest.mark.parametrize("exp_avg_sq_dtype", [None, BF16, FP32, torch.uint8])
def test_options_combine(master, exp_avg_dtype, exp_avg_sq_dtype, device):
    """m and v independently, with maximize, a tensor lr, weight decay and, where v is a float, amsgrad."""
    options = {"exp_avg_dtype": exp_avg_dtype, "exp_avg_sq_dtype": exp_avg_sq_dtype, "master_weight_bits": master}
    param = nn.Parameter(torch.randn(700, device=device).bfloat16())
    exact = nn.Parameter(param.detach().double())
    amsgrad = exp_avg_sq_dtype != torch.uint8
    mine = AdamW([param], lr=torch.tensor(0.01), maximize=True, amsgrad=amsgrad, weight_decay=0.1, **options)
    reference = torch.optim.AdamW([exact], lr=0.01, maximize=True, amsgrad=amsgrad, weight_decay=0.1, foreach=False)
    for _ in range(3):
        param.grad = torch.randn_like(param)
        exact.grad = param.grad.double()
        mine.step()
        reference.step()
    torch.testing.assert_close(mine.master_params()[0].double(), exact, rtol=3 * 2.0**-7, atol=3e-3)


def test_mixed_models_through_groups(device, path):
    from adamw_triton import param_groups_master_weights, param_groups_weight_decay

    model = nn.Sequential(nn.Linear(8, 8).bfloat16(), nn.LayerNorm(8)).to(device)
    groups = param_groups_master_weights(
        param_groups_weight_decay(model, 0.1), 24, exp_avg_dtype=torch.int8, exp_avg_sq_dtype=torch.uint8
    )
    assert [(g["master_weight_bits"], g["weight_decay"], len(g["params"])) for g in groups] == [
        (24, 0.1, 1), (24, 0.0, 1), (None, 0.0, 2),
    ]  # fmt: skip
    optimizer = AdamW(groups)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[model[0].weight]["exp_avg"].dtype == torch.int8
    assert optimizer.state[model[1].weight]["exp_avg"].dtype == torch.float32
    named = param_groups_master_weights(model.named_parameters())
    assert [len(group["params"]) for group in named] == [2, 2] and AdamW(named)


def test_grad_scaler_and_layouts_with_coded_state(device, path):
    """A transposed parameter, a gradient in another order, one with gaps, a skipped and an unscaled step."""
    options = {"exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.uint8, "master_weight_bits": 24}
    values = torch.randn(40, 30, device=device).bfloat16()
    layouts = {
        "contiguous": values.clone(),
        "transposed": values.t().contiguous().t(),
        "gaps": torch.zeros(40, 64, device=device).bfloat16()[:, :30].copy_(values),
    }
    gradients = [torch.randn(40, 30, device=device).bfloat16() for _ in range(3)]
    results = {}
    for name, value in layouts.items():
        param = nn.Parameter(value)
        optimizer = AdamW([param], **OPTIONS, **options, fused=True)
        for step, gradient in enumerate(gradients):
            param.grad = gradient.t().contiguous().t() if name == "contiguous" else gradient * 4
            optimizer.grad_scale = torch.tensor(1.0 if name == "contiguous" else 4.0, device=device)
            optimizer.found_inf = torch.tensor(1.0 if step == 1 else 0.0, device=device)
            before = param.detach().clone()
            optimizer.step()
            assert torch.equal(before, param) == (step == 1)
        assert optimizer.state[param]["step"] == 2
        results[name] = param.detach().float()
    # Groups follow the order of memory, so that another layout has other scales.
    torch.testing.assert_close(results["contiguous"], results["gaps"], rtol=0, atol=2.0**-7 * 4)
    torch.testing.assert_close(results["contiguous"], results["transposed"], rtol=0.02, atol=4e-3)


# Options and parameters that change after construction


def test_amsgrad_switched_on_later_is_refused(device, path):
    param = nn.Parameter(torch.ones(200, device=device))
    optimizer = AdamW([param], exp_avg_sq_dtype=torch.uint8)
    param.grad = torch.full_like(param, 0.01)
    optimizer.step()
    before, state = param.detach().clone(), dict(optimizer.state[param])
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="amsgrad=True needs"):
        optimizer.step()
    assert torch.equal(param, before) and optimizer.state[param] == state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_parameter_that_a_group_cannot_have_is_refused_when_appended(dtype, device, path):
    param = nn.Parameter(torch.ones(3, device=device, dtype=BF16))
    optimizer = AdamW([param], master_weight_bits=32)
    fresh = nn.Parameter(torch.ones(3, device=device, dtype=dtype))
    for p in (param, fresh):
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.param_groups[0]["params"].append(fresh)
    with pytest.raises(ValueError, match=str(dtype)):
        optimizer.step()
    assert fresh not in optimizer.state and torch.equal(fresh, torch.ones_like(fresh))


@pytest.mark.parametrize(
    ("name", "value"),
    [("master_weight_bits", 16), ("master_weight_bits", 24.0), ("exp_avg_dtype", torch.int16), ("capturable", True)],
)
def test_option_changed_to_what_cannot_be_is_refused(name, value, device, path):
    param = nn.Parameter(torch.ones(3, device=device, dtype=BF16))
    param.grad = torch.ones_like(param)
    optimizer = AdamW([param])
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=name):
        optimizer.step()
    assert not optimizer.state and torch.equal(param, torch.ones_like(param))


def test_option_changed_to_what_can_be_converts_the_state(device, path):
    param = nn.Parameter(torch.randn(300, device=device).bfloat16())
    optimizer = AdamW([param])
    for options in ({}, {"exp_avg_dtype": torch.int8}, {"master_weight_bits": 24}, {"exp_avg_dtype": FP32}):
        optimizer.param_groups[0].update(options)
        param.grad = torch.randn_like(param)
        optimizer.step()
    state = optimizer.state[param]
    assert state["step"] == 4 and state["exp_avg"].dtype == FP32 and state["param_remainder"].dtype == torch.int8
    assert "exp_avg_scale" not in state


def test_strided_scales(device, path):
    """Refused where they are given, packed where they are loaded."""
    n = 512
    param, grad = torch.randn(n, device=device), torch.randn(n, device=device)
    codes = torch.zeros(n, dtype=torch.int8, device=device), torch.zeros(n, dtype=torch.uint8, device=device)
    both = torch.zeros(4, 2, device=device)
    before = param.clone()
    with pytest.raises(RuntimeError, match="contiguous"):
        adamw_(param, grad, *codes, step=1, lr=0.1, exp_avg_scale=both[:, 0], exp_avg_sq_scale=both[:, 1])
    assert torch.equal(param, before)

    params = [nn.Parameter(param.clone()) for _ in range(2)]
    optimizers = [AdamW([p], exp_avg_dtype=torch.int8, exp_avg_sq_dtype=torch.uint8) for p in params]
    params[0].grad = grad
    optimizers[0].step()
    params[1].data.copy_(params[0])
    state_dict = copy.deepcopy(optimizers[0].state_dict())
    entries = state_dict["state"][0]
    both = torch.stack([entries["exp_avg_scale"], entries["exp_avg_sq_scale"]], dim=1)
    entries.update(exp_avg_scale=both[:, 0], exp_avg_sq_scale=both[:, 1])
    optimizers[1].load_state_dict(state_dict)
    for p, optimizer in zip(params, optimizers, strict=True):
        p.grad = grad
        optimizer.step()
    assert torch.equal(*params)


def test_scale_on_another_device_is_refused(device, path):
    param, grad, v = (torch.ones(5, device=device) for _ in range(3))
    codes, scale = torch.zeros(5, dtype=torch.int8, device=device), torch.zeros(1, device="meta")
    with pytest.raises(RuntimeError, match="exp_avg_scale"):
        adamw_(param, grad, codes, v, step=1, lr=0.1, exp_avg_scale=scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_master_params_of_wide_parameters_lose_nothing(dtype, device):
    param = nn.Parameter(torch.randn(5, dtype=dtype, device=device))
    optimizer = AdamW([param])
    before = param.detach().clone()
    (master,) = optimizer.master_params()
    assert torch.equal(master, before)
    optimizer.load_master_params([master])
    assert torch.equal(param, before)


@pytest.mark.parametrize("master", [24, 32])
def test_checkpoint_of_masters_before_the_first_step(master, device, path):
    weights = torch.randn(300, device=device)
    params = [nn.Parameter(torch.zeros(300, device=device, dtype=BF16)) for _ in range(2)]
    optimizers = [AdamW([p], master_weight_bits=master) for p in params]
    optimizers[0].load_master_params([weights])
    params[1].data.copy_(params[0])
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    assert torch.equal(optimizers[0].master_params()[0], optimizers[1].master_params()[0])
    for p, optimizer in zip(params, optimizers, strict=True):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert torch.equal(*params)


@pytest.mark.parametrize("step", [None, "x", torch.ones(2)])
def test_a_step_that_is_no_number_is_refused_before_anything_changes(step, device):
    param = nn.Parameter(torch.ones(3, device=device))
    param.grad = torch.ones_like(param)
    optimizer = AdamW([param])
    optimizer.step()
    broken = copy.deepcopy(optimizer.state_dict())
    broken["state"][0]["step"] = step
    with pytest.raises(ValueError, match="'step' of parameter 0"):
        optimizer.load_state_dict(broken)
    assert optimizer.state[param]["step"] == 1
    optimizer.step()


def test_grad_scale_of_shape_one(device, path):
    tensors = [torch.tensor(value, device=device) for value in (1.0, 1.0, 0.0, 0.0)]
    adamw_(*tensors, step=1, lr=0.1, weight_decay=0.0, grad_scale=torch.tensor([2.0], device=device))
    assert tensors[2].item() == pytest.approx(0.05)


@pytest.mark.parametrize("name", ["seed", "stream", "element_offset"])
def test_numbers_of_stochastic_rounding_are_integers(name, device, path):
    tensors = [torch.ones(3, dtype=BF16, device=device) for _ in range(4)]
    with pytest.raises(ValueError, match=f"{name} must be an integer"):
        adamw_(*tensors, step=1, lr=0.1, stochastic_rounding=True, **{name: 1.5})
    assert all(torch.equal(t, torch.ones_like(t)) for t in tensors)


def test_a_group_may_leave_stochastic_rounding_out(device):
    low, wide = nn.Parameter(torch.ones(3, device=device, dtype=BF16)), nn.Parameter(torch.ones(3, device=device))
    AdamW([{"params": [low]}, {"params": [wide], "stochastic_rounding": False}], stochastic_rounding=True, seed=3)
    with pytest.raises(ValueError, match="seed=3"):
        AdamW([{"params": [wide], "seed": 3}])


def test_groups_of_a_single_tensor_are_refused():
    from adamw_triton import param_groups_master_weights

    with pytest.raises(TypeError, match=r"got a tensor of \(3, 2\)"):
        param_groups_master_weights(torch.ones(3, 2))
