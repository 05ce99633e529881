"""Storage policies: every format against its definition, in both entries and both paths."""

import itertools

import numpy as np
import pytest
import torch
from helpers import Guarded, bits, fp32_from_bits, truncates_bf16
from torch import nn

from adamw_triton import AdamW, adamw_, launch, storage
from adamw_triton.storage import rounding
from adamw_triton.storage.policies import POLICIES

OPTIONS = {"lr": 3e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
CODED = [policy for policy in POLICIES if not policy.is_plain]
EIGHT = [policy for policy in CODED if policy.exp_avg == torch.int8]
# Shorter than a group, around a group and a block, and several blocks with a tail.
SIZES = (1, 7, 127, 128, 129, 511, 512, 1023, 1024, 1025, 3 * 1024 + 5)
# Likewise; moments of 8 bits have rows of whole groups.
SHAPES = [*((n,) for n in SIZES), (1, 128), (3, 128), (2, 256), (8, 128), (2, 1024), (17, 128), (3, 2048 + 384)]


# The formats


@pytest.mark.fast
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


@pytest.mark.fast
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("size", SIZES)
def test_codes_decode_to_what_they_say(name, size):
    """Against the definition in float64: the code is the nearest, and the decoded value that code's."""
    value = torch.randn(size) * torch.logspace(-6, 3, size)
    value = value if name == "exp_avg" else value * value
    codes, scale = storage.encode(name, value)
    assert scale.shape == (-(-size // 128),) and codes.dtype == storage.CODED[name].dtype
    magnitude = value.double().abs().numpy()
    magnitude = magnitude if name == "exp_avg" else np.sqrt(magnitude)
    largest = 127 if name == "exp_avg" else 255
    starts = range(0, size, 128)
    exact_scale = np.concatenate([np.full(len(magnitude[s : s + 128]), magnitude[s : s + 128].max()) for s in starts])
    expected = largest * np.sqrt(magnitude / exact_scale)
    assert np.abs(codes.long().abs().numpy() - np.maximum(expected, 4 * (name == "exp_avg_sq"))).max() < 0.5 + 1e-3
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
    assert codes[3] == 255 and codes[70] == codes.min() == 4, "a v > 0 is never coded 0"
    assert storage.decode("exp_avg_sq", codes, scale)[3].item() == pytest.approx(1e30, rel=1e-6)
    tiny = torch.full((200,), 1e-27)  # v of gradients of 1e-12
    codes, scale = storage.encode("exp_avg_sq", tiny)
    torch.testing.assert_close(storage.decode("exp_avg_sq", codes, scale), tiny)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("rounds", "words"),
    [
        (7, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (10, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ],
)
def test_philox_known_answers(rounds, words, monkeypatch):
    """Of Random123, for a counter and a key of zeros."""
    monkeypatch.setattr(rounding, "PHILOX_ROUNDS", rounds)
    assert tuple(map(int, rounding._philox(0, torch.tensor([0]), step=0, param_index=torch.tensor(0)))) == words


# The step


@pytest.mark.parametrize("policy", CODED, ids=lambda policy: policy.name)
@pytest.mark.parametrize("offset", [0, 1])
def test_both_entries_and_the_reference_agree(policy, offset, device, monkeypatch):
    """Over several steps; the reference is the specification, on the CPU."""
    results = []
    start = [torch.randn(shape, device=device).to(policy.param) for shape in SHAPES]
    gradients = [[torch.randn_like(p).to(policy.grad) for p in start] for _ in range(2)]
    for foreach, kernels in ((True, True), (False, True), (None, False)):
        guard = Guarded()
        params = [nn.Parameter(guard.place(p, offset)) for p in start]
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
            if name.endswith("_codes"):
                apart = (value.long() - other.long()).abs()  # ties, and what they entail
                assert apart.max() <= 2 and (apart > 0).float().mean() < 0.02, (name, apart.max())


def tolerance(policy):
    """Of weights after 2 steps of about 0.03: a code apart here and there, or a rounding."""
    if policy.exp_avg == torch.int8:
        return 2e-3
    if policy.master_weight_bits is None or policy.exp_avg == torch.bfloat16:
        return 2.0**-7 if truncates_bf16() or policy.stochastic_rounding else 2.0**-8
    return 1e-6


@pytest.mark.fast
@pytest.mark.parametrize("policy", EIGHT, ids=lambda policy: policy.name)
def test_one_step_of_8_bit_moments_is_the_definition(policy, device, path):
    """Decode in float64, step, and compare the decoded result within half a code, or one if rounded stochastically."""
    shape = (5, 128 * 7)
    param = nn.Parameter(torch.randn(shape, device=device).to(policy.param))
    optimizer = AdamW([param], **OPTIONS, **policy.options)
    for _ in range(3):
        param.grad = torch.randn(shape, device=device).to(policy.grad)
        optimizer.step()
    state = optimizer.state[param]
    m, v = (storage.moment(name, state).double().cpu() for name in ("exp_avg", "exp_avg_sq"))
    p = optimizer.master_params()[0].double().cpu()
    param.grad = torch.randn(shape, device=device).to(policy.grad)
    g = param.grad.double().cpu()
    optimizer.step()
    beta1, beta2 = OPTIONS["betas"]
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    denominator = (v / (1 - beta2**4)).sqrt() + OPTIONS["eps"]
    p = p * (1 - OPTIONS["lr"] * OPTIONS["weight_decay"]) - OPTIONS["lr"] / (1 - beta1**4) * m / denominator
    rounding = 2 if policy.stochastic_rounding else 1
    atol = rounding * 2.0**-15 if policy.master_weight_bits == 24 else 0
    torch.testing.assert_close(optimizer.master_params()[0].double().cpu(), p, rtol=2e-6, atol=max(atol, 2e-6))
    for name, value, largest in (("exp_avg", m, 127), ("exp_avg_sq", v.sqrt(), 255)):
        scale = state[f"{name}_scale"].double().cpu().repeat_interleave(128, dim=1)
        decoded = storage.moment(name, state).double().cpu()
        decoded = decoded if name == "exp_avg" else decoded.sqrt()
        code = largest * (decoded.abs() / scale).sqrt()
        exact = largest * (value.abs() / scale).sqrt()
        assert (code - exact.clamp(min=4.0 * (name == "exp_avg_sq"))).abs().max() < 0.5 * rounding + 0.01
        assert (decoded.sign() * value.sign() >= 0).all()


@pytest.mark.parametrize("policy", CODED, ids=lambda policy: policy.name)
def test_nothing_around_the_tensors_is_written(policy, device, path):
    guard = Guarded()
    for shape, offset in itertools.product([(1,), (127,), (129,), (1025,), (1, 128), (3, 384)], (0, 1, 3)):
        param = nn.Parameter(guard.place(torch.randn(shape, device=device).to(policy.param), offset))
        optimizer = AdamW([param], **policy.options)
        param.grad = guard.place(torch.randn(shape, device=device).to(policy.grad), offset)
        optimizer.step()
        state = optimizer.state[param]
        edges = {}
        for name in list(state):
            if name != "step":
                entry = state[name]
                buffer = torch.full((entry.numel() + 200,), 77, dtype=entry.dtype, device=device)
                start = 100 + (2 * offset if entry.dim() > param.dim() else offset)  # two bytes are one number
                inside = slice(start, start + entry.numel())
                buffer[inside] = entry.flatten()
                state[name] = buffer[inside].view(entry.shape)
                edges[name] = buffer[: inside.start], buffer[inside.stop :]
        optimizer.step()
        guard.assert_untouched()
        for name, (before, after) in edges.items():
            assert (before == 77).all() and (after == 77).all(), name


def test_32_bit_master_is_the_fp32_optimizer_bit_for_bit(device, path):
    """1000 steps of the same gradients (200 in the interpreter): bf16 with a remainder, fp16 with a master, fp32."""
    steps = 200 if path == "kernel" and launch.INTERPRETED else 1000
    n = 700 if path == "kernel" else 704  # torch rounds what is left over of a CPU's vectors otherwise
    for low in (torch.bfloat16, torch.float16):
        start = torch.randn(n, device=device).to(low)
        ours, fp32 = nn.Parameter(start.clone()), nn.Parameter(start.float())
        mine, reference = AdamW([ours], master_weight_bits=32, **OPTIONS), AdamW([fp32], **OPTIONS)
        generator = torch.Generator(device).manual_seed(1)
        for _ in range(steps):
            ours.grad = torch.randn(n, device=device, generator=generator).to(low)
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
