"""8-bit codes: the smallest ones, and stochastic rounding that is unbiased in the decoded value."""

import itertools

import pytest
import torch
from torch import nn

from adamw_triton import AdamW, adamw_, launch, storage

triton = pytest.importorskip("triton")
tl = triton.language

from adamw_triton.kernels import storage as kernels  # noqa: E402

MOMENTS = ("exp_avg", "exp_avg_sq")
LARGEST = {"exp_avg": 127, "exp_avg_sq": 255}
SMALLEST = {"exp_avg": 0, "exp_avg_sq": 4}
ALL_NOISE = torch.arange(2**16, dtype=torch.int32)
BLOCK = 1024
EIGHT_BITS = {"exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.uint8}


@triton.jit
def encode_kernel(
    value_ptr, root_ptr, noise_ptr, codes_ptr, scale_ptr, n, IS_M: tl.constexpr, BLOCK_SIZE: tl.constexpr
):  # fmt: skip
    start = tl.program_id(0) * BLOCK_SIZE
    offsets = tl.arange(0, BLOCK_SIZE)
    mask = start + offsets < n
    value = tl.load(value_ptr + start + offsets, mask=mask)
    noise = tl.load(noise_ptr + start + offsets, mask=mask)
    scale_ptr += start // 128
    if IS_M:
        kernels.store_exp_avg(codes_ptr + start, scale_ptr, offsets, value, noise, mask, n - start, "")
    else:
        root = tl.load(root_ptr + start + offsets, mask=mask)
        kernels.store_exp_avg_sq(codes_ptr + start, scale_ptr, offsets, value, root, noise, mask, n - start, "")


def encode(name, value, noise, path):
    """Codes and scales of the kernels' or the eager encoding."""
    if path == "reference":
        return storage.encode(name, value, noise)
    n = value.numel()
    codes = torch.full((n,), 77, dtype=storage.CODED[name].dtype, device=value.device)
    scale = torch.full((-(-n // 128),), torch.nan, device=value.device)
    encode_kernel[(-(-n // BLOCK),)](
        value, value.sqrt(), noise, codes, scale, n, name == "exp_avg", BLOCK, num_warps=launch.NUM_WARPS
    )
    return codes, scale


def decoded(name, code, largest):
    """In double precision, of codes and the largest value of the group."""
    code = code.double()
    if name == "exp_avg":
        return code * code.abs() / 127**2 * largest
    return (code / 255) ** 4 * largest


def groups_of(name, values, largest, device):
    """Groups whose first element is the largest, and whose others are the value, one for each possible noise."""
    n_groups = -(-(2**16) // 127)
    noise = torch.zeros(n_groups * 127, dtype=torch.int32)
    noise[: 2**16] = ALL_NOISE
    groups = torch.full((n_groups, 128), float(values))
    groups[:, 0] = largest
    all_noise = torch.zeros(n_groups, 128, dtype=torch.int32)
    all_noise[:, 1:] = noise.view(n_groups, 127)
    all_noise[:, 0] = torch.arange(n_groups, dtype=torch.int32) * 127
    return groups.flatten().to(device), all_noise.flatten().to(device)


def codes_of_all_noise(name, value, largest, device, path):
    groups, noise = groups_of(name, value, largest, device)
    codes, scale = encode(name, groups, noise, path)
    if name == "exp_avg":
        assert (scale == abs(largest)).all()
    else:
        torch.testing.assert_close(scale, torch.full_like(scale, largest**0.5), rtol=1e-6, atol=0.0)
    codes = codes.view(-1, 128)
    sign = -1 if largest < 0 else 1
    assert (codes[:, 0].int() == sign * LARGEST[name]).all(), "the largest element keeps its code"
    return codes[:, 1:].flatten()[: 2**16].cpu()


@pytest.mark.parametrize("largest", [3.7e-24, 7.7e11])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        *(("exp_avg", p) for p in (0.001, 0.3, 0.97, 1.5, 2.02, 5.9, 9.1, 9.99, 40.6, 126.04, 126.7)),
        *(("exp_avg_sq", p) for p in (4.003, 4.5, 4.97, 5.02, 6.3, 9.99, 17.5, 100.2, 254.03, 254.8)),
    ],
)
def test_the_mean_of_all_random_bits_is_the_value(name, place, largest, device, path):
    """The mean over all 2^16 random numbers, which are equally likely, and none but the two neighbours."""
    for sign in (1, -1) if name == "exp_avg" else (1,):
        value = (sign * decoded(name, torch.tensor(place), largest)).float().item()
        codes = codes_of_all_noise(name, value, largest, device, path)
        low, high = int(place), int(place) + 1
        assert set((sign * codes.int()).tolist()) <= {low, high}
        neighbours = decoded(name, torch.tensor([low, high]), largest)
        up = (sign * codes.int() == high).double().mean()
        expected = (abs(value) - neighbours[0]) / (neighbours[1] - neighbours[0])
        # Half of 2^-16 for m; what is written of v's approximation at the smallest codes, and its scale's last bits.
        arithmetic = 4e-7 * place * (4 if name == "exp_avg_sq" else 2)
        fitted = 4e-4 * (4 / place) ** 1.4 if name == "exp_avg_sq" else 0.0
        assert (up - expected).abs() < 2.0**-16 + fitted + arithmetic


def test_what_is_below_the_resolution_is_zero(device, path):
    """Of 2^16 random numbers none may round up what is a millionth of a code: it would move ten times too far."""
    assert codes_of_all_noise("exp_avg", 16e-6 / 127**2, 1.0, device, path).count_nonzero() <= 1
    assert not codes_of_all_noise("exp_avg", 1e-6 / 127**2, 1.0, device, path).any()


@pytest.mark.parametrize("name", MOMENTS)
def test_mean_over_seeds(name, device, path):
    """Four standard errors, with the random bits that a step draws, of the values that a step makes."""
    n, seeds = 1280, 150
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(n, generator=generator) * torch.logspace(-4, 0, n)
    old = (old if name == "exp_avg" else old.square()).to(device)
    kept = {"exp_avg": old, "exp_avg_sq": torch.ones(n, device=device)}
    if name == "exp_avg_sq":
        kept = {"exp_avg": torch.ones(n, device=device), "exp_avg_sq": old}
    start, start_scale = storage.encode(name, old)
    value = 0.9 * storage.decode(name, start, start_scale).double()  # what the step makes of it
    total = torch.zeros(n, dtype=torch.float64, device=device)
    param, grad = torch.zeros(n, device=device), torch.zeros(n, device=device)
    for seed in range(seeds):
        codes, scale = start.clone(), start_scale.clone()
        moments = {**kept, name: codes}
        adamw_(
            param, grad, **moments, step=3, lr=0.0, betas=(0.9, 0.9), weight_decay=0.0, seed=seed,
            stochastic_rounding=True, **{f"{name}_scale": scale},
        )  # fmt: skip
        total += storage.decode(name, codes, scale).double()
    largest = scale.repeat_interleave(128).double()
    largest = largest if name == "exp_avg" else largest.square()
    power = 0.5 if name == "exp_avg" else 0.25
    place = LARGEST[name] * (value.abs() / largest) ** power
    gap = decoded(name, place.floor() + 1, largest) - decoded(name, place.floor(), largest)
    within = (place > SMALLEST[name] + 1e-4) & (place < LARGEST[name] - 1e-3)  # smaller v have the smallest code
    assert within.sum() > n // 3
    errors = ((total / seeds - value) / gap)[within]
    assert errors.mean().abs() < 4 * 0.5 / (within.sum() * seeds) ** 0.5
    assert errors.abs().max() < 6 * 0.5 / seeds**0.5


@pytest.mark.fast
@pytest.mark.parametrize("name", MOMENTS)
def test_kernel_and_eager_codes_are_the_same_bits(name, device):
    """On a GPU reciprocal roots are approximate: a code may differ where it is a matter of the last bit."""
    generator = torch.Generator().manual_seed(1)
    n = 128 * 300 + 17
    value = torch.randn(n, generator=generator) * 10 ** (torch.rand(n, generator=generator) * 12 - 9)
    value[128:256] = 0.0
    value[256:300] = 0.0
    value[-17:] *= 1e-20
    value = (value if name == "exp_avg" else value.square()).to(device)
    noise = torch.randint(0, 2**16, (n,), generator=generator, dtype=torch.int32).to(device)
    codes, scale = encode(name, value, noise, "kernel")
    expected, expected_scale = encode(name, value, noise, "reference")
    if launch.INTERPRETED:
        assert torch.equal(codes, expected) and torch.equal(scale, expected_scale)
    else:
        torch.testing.assert_close(scale, expected_scale, rtol=3e-7, atol=0.0)
        assert (codes.int() - expected.int()).abs().max() <= 1
        assert (codes != expected).float().mean() < 1e-3


@pytest.mark.parametrize("name", MOMENTS)
@pytest.mark.parametrize("rounded", [False, True])
def test_zero_stays_zero_and_the_smallest_code_holds(name, rounded, device, path):
    """Among others, and a whole group of zeros, for all random bits."""
    noise = ALL_NOISE.to(device)
    value = torch.zeros(2**16, device=device)
    for scale_of in (0.0, 1e-30, 1.0):
        value[::128] = scale_of
        codes, scale = storage.encode(name, value, noise if rounded else None)
        if rounded and path == "kernel":
            codes, scale = encode(name, value, noise, path)
        others = torch.ones(2**16, dtype=torch.bool, device=device)
        others[::128] = False
        if rounded and name == "exp_avg_sq":  # what is below the smallest code is as 4.5: either neighbour
            assert set(codes[others].tolist()) == {4, 5}
        else:
            assert (codes[others] == SMALLEST[name]).all()
        assert (storage.decode(name, codes, scale)[others] <= 1.001 * scale_of * (25 / 255**2) ** 2).all()


def test_nan_and_infinity_stay_in_their_group(device, path):
    for bad in (float("nan"), float("inf"), float("-inf")):
        value = torch.randn(384, device=device, generator=torch.Generator(device).manual_seed(2))
        noise = torch.full((384,), 12345, dtype=torch.int32, device=device)
        for name in MOMENTS:
            clean = value if name == "exp_avg" else value.square()
            expected = encode(name, clean, noise, path)
            dirty = clean.clone()
            dirty[130] = abs(bad) if name == "exp_avg_sq" else bad
            codes, scale = encode(name, dirty, noise, path)
            for got, want, width in ((codes, expected[0], 128), (scale, expected[1], 1)):
                assert torch.equal(got[:width], want[:width]) and torch.equal(got[2 * width :], want[2 * width :])


def params_of(sizes, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(n, generator=generator).to(device, dtype)) for n in sizes]


def train(params, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        optimizer.step()


@pytest.mark.parametrize("master", [None, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_for_every_launch(dtype, master, device, path):
    if master is not None and dtype == torch.float32:
        dtype = torch.bfloat16
    options = {"lr": 1e-2, "stochastic_rounding": True, "seed": 5, "master_weight_bits": master, **EIGHT_BITS}
    sizes = (5, (1, 128), (12, 128), (3, 1024 + 384))
    several = {foreach: params_of(sizes, device, dtype) for foreach in (True, False, None)}
    optimizers = {foreach: AdamW(params, foreach=foreach, **options) for foreach, params in several.items()}
    for foreach, params in several.items():
        train(params, optimizers[foreach], range(3))
    for foreach in (False, None):
        assert all(map(torch.equal, several[True], several[foreach]))
        for p, q in zip(several[True], several[foreach], strict=True):
            mine, other = optimizers[True].state[p], optimizers[foreach].state[q]
            assert mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)


def test_slices_at_multiples_of_128_are_the_whole(device, path):
    n = 128 * 20 + 40
    [param] = params_of([n], device)
    tensors = {
        "param": param.data,
        "grad": torch.randn(n, generator=torch.Generator().manual_seed(4)).to(device),
        "exp_avg": torch.zeros(n, dtype=torch.int8, device=device),
        "exp_avg_sq": torch.zeros(n, dtype=torch.uint8, device=device),
        "exp_avg_scale": torch.zeros(21, device=device),
        "exp_avg_sq_scale": torch.zeros(21, device=device),
    }
    options = {"lr": 0.01, "stochastic_rounding": True, "seed": 2**40 + 5, "stream": 7}
    whole = {name: t.clone() for name, t in tensors.items()}
    sliced = {name: t.clone() for name, t in tensors.items()}
    for step in (1, 2, 3):
        adamw_(**whole, step=step, **options)
        for start, end in itertools.pairwise((0, 128, 1024 + 256, n)):
            part = {
                name: t[start // 128 : -(-end // 128)] if "scale" in name else t[start:end]
                for name, t in sliced.items()
            }
            adamw_(**part, step=step, element_offset=start, **options)
    for name, expected in whole.items():
        assert torch.equal(sliced[name], expected), name


def test_both_moments_are_rounded_by_the_same_bits(device, path):
    """Those of exp_avg, so that errors of one sign cancel in m / sqrt(v); alone, exp_avg_sq has bits of its own."""
    n = 128 * 20
    grad = torch.randn(n, generator=torch.Generator().manual_seed(4)).to(device)
    key = storage.NoiseKey(seed=9, param_index=0)
    _, of_exp_avg, of_exp_avg_sq = storage.noise(key, 1, n, None, device)
    v = 0.5 * grad * grad
    for m_dtype, noise in ((torch.int8, of_exp_avg), (torch.float32, of_exp_avg_sq)):
        m, m_scale = torch.zeros(n, dtype=m_dtype, device=device), torch.zeros(20, device=device)
        codes, scale = torch.zeros(n, dtype=torch.uint8, device=device), torch.zeros(20, device=device)
        scales = {"exp_avg_sq_scale": scale, **({"exp_avg_scale": m_scale} if m_dtype == torch.int8 else {})}
        adamw_(
            torch.zeros(n, device=device), grad, m, codes, step=1, lr=0.0, betas=(0.5, 0.5), weight_decay=0.0,
            stochastic_rounding=True, seed=9, **scales,
        )  # fmt: skip
        expected, _ = storage.encode("exp_avg_sq", v, noise)
        assert (codes != expected).float().mean() < 1e-3
        other, _ = storage.encode("exp_avg_sq", v, of_exp_avg_sq if m_dtype == torch.int8 else of_exp_avg)
        assert (codes != other).float().mean() > 0.1
        if m_dtype == torch.int8:
            expected, _ = storage.encode("exp_avg", 0.5 * grad, of_exp_avg)
            assert (m != expected).float().mean() < 1e-3


def test_one_moment_alone(device, path):
    """Each moment in 8 bits beside the other in floats, which is as without stochastic rounding."""
    for name, wish in EIGHT_BITS.items():
        params = params_of([(12, 128)], device)
        optimizer = AdamW(params, lr=1e-2, stochastic_rounding=True, **{name: wish})
        train(params, optimizer, range(3))
        plain = params_of([(12, 128)], device)
        train(plain, AdamW(plain, lr=1e-2), range(3))
        torch.testing.assert_close(params[0], plain[0], rtol=0.0, atol=4e-3)
        assert not torch.equal(params[0], plain[0])


# What training needs


def movement(options, beta2, seed, device):
    """Largest movement, and largest single step, in learning rates; magnitudes of 1e-9 to 1 within each group."""
    n, lr, steps = 1280, 1e-3, 300
    generator = torch.Generator().manual_seed(seed)
    magnitude = 10 ** (torch.rand(n, generator=generator) * 9 - 9)
    param = nn.Parameter(torch.zeros(n // 128, 128, device=device))
    optimizer = AdamW([param], lr=lr, betas=(0.9, beta2), weight_decay=0.0, **options)
    largest_step = 0.0
    for _ in range(steps):
        before = param.detach().clone()
        param.grad = (torch.randn(n, generator=generator) * magnitude).view_as(param).to(device)
        optimizer.step()
        largest_step = max(largest_step, (param.detach() - before).abs().max().item() / lr)
    return param.detach().abs().max().item() / lr, largest_step


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_mixed_magnitudes_do_not_run_away(beta2, seed, device, path):
    """With a smallest v code of 1, elements moved 7.9 learning rates in a step."""
    if path == "kernel" and launch.INTERPRETED:
        pytest.skip("900 launches take a minute in the interpreter; its codes are the eager ones, bit for bit")
    reference, _ = movement({}, beta2, seed, device)
    moved, step = movement(EIGHT_BITS, beta2, seed, device)
    assert moved <= 1.5 * reference and step <= 2.5
    moved, step = movement({**EIGHT_BITS, "stochastic_rounding": False}, beta2, seed, device)
    assert moved <= 2.2 * reference and step <= 2.5, "to the nearest, v stands still below what it should be"


def test_moments_do_not_stand_still(device, path):
    """Rounded to the nearest, a v that shrinks by a thousandth and an m of few codes are rounded back for ever."""
    n, steps = 1280, 100
    start = torch.full((n,), 0.003, device=device)
    start[::128] = 1.0

    def ends(**options):
        param, grad = torch.zeros(n, device=device), torch.zeros(n, device=device)
        exp_avg, m_scale = storage.encode("exp_avg", start)
        exp_avg_sq, v_scale = storage.encode("exp_avg_sq", start)
        first = [storage.decode("exp_avg", exp_avg, m_scale), storage.decode("exp_avg_sq", exp_avg_sq, v_scale)]
        for step in range(1, steps + 1):
            grad[::128] = 1.0  # the largest stays
            adamw_(
                param, grad, exp_avg, exp_avg_sq, exp_avg_scale=m_scale, exp_avg_sq_scale=v_scale, step=step, lr=0.0,
                betas=(0.98, 0.999), weight_decay=0.0, **options,
            )  # fmt: skip
        last = [storage.decode("exp_avg", exp_avg, m_scale), storage.decode("exp_avg_sq", exp_avg_sq, v_scale)]
        others = torch.ones(n, dtype=torch.bool, device=device)
        others[::128] = False
        return [
            (b[others].double().mean() / a[others].double().mean()).item() for a, b in zip(first, last, strict=True)
        ]

    m, v = ends()
    assert m == v == 1.0, "what is to be mended"
    m, v = ends(stochastic_rounding=True, seed=1)
    assert m == pytest.approx(0.98**steps, rel=0.1)
    assert v == pytest.approx(0.999**steps, rel=0.05)
