"""The names and shapes of the state, which parameters have 8-bit moments, and how state moves between forms."""

import itertools
import math

import pytest
import torch
from helpers import bits
from torch import nn

from adamw_triton import AdamW, adamw_, storage

EIGHT_BITS = {"exp_avg_dtype": "int8", "exp_avg_sq_dtype": "uint8"}
BF16 = torch.bfloat16


def contiguous(*shape):
    return torch.randn(shape)


def channels_last(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


CASES = {
    "linear": (lambda: contiguous(5, 256), (5, 2)),
    "one group": (lambda: contiguous(1, 128), (1, 1)),
    "filter": (lambda: contiguous(3, 16, 4, 2), (3, 1)),
    "filter, channels last": (lambda: channels_last(3, 16, 4, 2), (3, 1)),
    "experts": (lambda: contiguous(2, 3, 128), (2, 3)),
    "rows of 1s": (lambda: contiguous(128, 1, 128), (128, 1)),
    "one row in any order": (lambda: contiguous(16, 8, 1).permute(2, 1, 0), (1, 1)),
    "rows with gaps": (lambda: contiguous(4, 300)[:, :128], (4, 1)),
    "no rows": (lambda: contiguous(0, 256), (0, 2)),
    "scalar": (lambda: torch.randn(()), None),
    "bias": (lambda: contiguous(1024), None),
    "column": (lambda: contiguous(1024, 1), None),
    "odd rows": (lambda: contiguous(128, 127), None),
    "rows of 64, a multiple in all": (lambda: contiguous(4, 64), None),
    "transposed": (lambda: contiguous(128, 256).t(), None),
    "transposed filters": (lambda: contiguous(16, 8, 128).permute(2, 0, 1), None),
    "rows of nothing": (lambda: contiguous(4, 0), None),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", CASES)
def test_which_parameters_have_8_bits(name, device, path):
    make, expected = CASES[name]
    param = nn.Parameter(make().to(device))
    optimizer = AdamW([param], lr=0.1, **EIGHT_BITS)
    param.grad = torch.randn_like(param)
    before = param.detach().clone()
    optimizer.step()
    state = optimizer.state[param]
    if expected is None:
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
        floats = dict.fromkeys(("exp_avg", "exp_avg_sq"), param.numel())
        assert optimizer.state_bytes().n_in_floats == floats
        assert "not in 8 bits" in str(optimizer.state_bytes())
    else:
        assert state.keys() == {"step", "exp_avg_codes", "exp_avg_scale", "exp_avg_sq_codes", "exp_avg_sq_scale"}
        assert state["exp_avg_codes"].dtype == torch.int8 and state["exp_avg_sq_codes"].dtype == torch.uint8
        for moment in ("exp_avg", "exp_avg_sq"):
            assert state[f"{moment}_codes"].shape == param.shape
            scale = state[f"{moment}_scale"]
            assert scale.shape == expected and scale.dtype == torch.float32 and scale.is_contiguous()
        # The scale of a row's group is the largest of that group: groups never cross a row.
        if param.numel():
            rows = (0.1 * param.grad).abs().cpu()
            rows = rows.permute(0, 2, 3, 1) if name == "filter, channels last" else rows
            rows = rows.permute(0, 2, 1) if name == "one row in any order" else rows
            largest = rows.reshape(*expected, 128).amax(-1)
            torch.testing.assert_close(state["exp_avg_scale"].cpu(), largest, rtol=1e-6, atol=0)
        assert not optimizer.state_bytes().n_in_floats
        assert "not in 8 bits" not in str(optimizer.state_bytes())
    step = before - param.detach()
    grad = param.grad
    torch.testing.assert_close(step, 0.1 * grad / (grad.abs() + 1e-8) + 1e-3 * before, rtol=1e-4, atol=1e-5)


def test_rows_that_change_their_length_or_order_are_converted(device, path):
    """Three forms of one parameter, back and forth; a moment is as it was, to what 8 bits can hold."""
    values = torch.randn(128, 256, device=device)
    param = nn.Parameter(values.clone())
    optimizer = AdamW([param], lr=0.0, betas=(0.9, 0.999), stochastic_rounding=False, **EIGHT_BITS)
    param.grad = torch.randn_like(param)
    optimizer.step()
    names = []
    for change in (lambda p: p.t().contiguous().t(), lambda p: p.contiguous(), lambda p: p.t().contiguous().t()):
        state = optimizer.state[param]
        m = storage.moment("exp_avg", state).clone()
        param.data = change(param.data)
        param.grad = torch.zeros_like(param)
        optimizer.step()
        names.append("exp_avg_codes" in optimizer.state[param])
        now = storage.moment("exp_avg", optimizer.state[param])
        assert now.stride() == param.stride()
        torch.testing.assert_close(now, 0.9 * m, rtol=0.02, atol=2e-3 * m.abs().max().item())
    assert names == [False, True, False] and torch.equal(param, values)


@pytest.mark.parametrize("bits_", [24, 32])
@pytest.mark.parametrize("name", [name for name in CASES if name != "rows of nothing"])
def test_remainders_are_bytes_and_exact(name, bits_, device, path):
    """Of every layout; weights of any bits come back, with their NaNs and infinities."""
    param = nn.Parameter(CASES[name][0]().to(device, BF16))
    weights = torch.randint(-(2**31), 2**31, param.shape, dtype=torch.int64, device=device).to(torch.int32)
    weights = weights.view(torch.float32)
    optimizer = AdamW([param], lr=0.0, weight_decay=0.0, master_weight_bits=bits_)
    optimizer.load_master_params([weights])
    param.grad = torch.zeros_like(param)
    optimizer.step()
    entry = optimizer.state[param]["param_remainder"]
    if bits_ == 32:
        assert entry.dtype == torch.uint8 and entry.shape == (*param.shape, 2)
        finite = ~weights.isnan()
        assert torch.equal(bits(optimizer.master_params()[0][finite]), bits(weights[finite]))
        assert optimizer.master_params()[0][~finite].isnan().all()
    else:
        assert entry.dtype == torch.int8 and entry.shape == param.shape
    # The memory is that of 16-bit numbers in the parameter's order.
    values = storage.remainder_of(entry)
    assert values.data_ptr() == entry.data_ptr() and values.shape == param.shape
    dense = torch.empty_like(param)
    assert all(a == b for a, b, n in zip(values.stride(), dense.stride(), param.shape, strict=True) if n > 1)


def test_the_function_takes_remainders_in_both_forms(device, path):
    """As int16, and as the bytes that the optimizer keeps; bytes that lie apart are refused."""
    start = [torch.randn(3, 5, device=device).to(BF16) for _ in range(2)]
    results = []
    for in_bytes in (False, True):
        param, grad = (t.clone() for t in start)
        m, v = torch.zeros(3, 5, device=device), torch.zeros(3, 5, device=device)
        remainder = torch.zeros(3, 5, dtype=torch.int16, device=device)
        entry = storage.remainder_entry(remainder) if in_bytes else remainder
        adamw_(param, grad, m, v, step=1, lr=0.1, param_remainder=entry)
        results.append((param, remainder))
    assert results[0][1].any()
    assert all(map(torch.equal, *results))
    apart = torch.zeros(2, 3, 5, dtype=torch.uint8, device=device).permute(1, 2, 0)
    with pytest.raises(RuntimeError, match="must lie together"):
        adamw_(param, grad, m, v, step=1, lr=0.1, param_remainder=apart)


PAIRS = list(itertools.permutations(["float32", "bfloat16", "int8"], 2))


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_a_moment_changes_its_form_where_the_option_changes(before, after, device, path):
    param = nn.Parameter(torch.randn(4, 256, device=device))
    optimizer = AdamW([param], lr=1e-3, exp_avg_dtype=before)
    param.grad = torch.randn_like(param)
    optimizer.step()
    m = storage.moment("exp_avg", optimizer.state[param]).float()
    optimizer.param_groups[0]["exp_avg_dtype"] = after
    param.grad = torch.zeros_like(param)
    optimizer.step()
    state = optimizer.state[param]
    assert ("exp_avg_codes" in state) == ("exp_avg_scale" in state) == (after == "int8")
    assert ("exp_avg" in state) == (after != "int8")
    now = storage.moment("exp_avg", state).float()
    torch.testing.assert_close(now, 0.9 * m, rtol=0.02, atol=2e-3 * m.abs().max().item())


def test_floats_beside_codes_are_two_launches(device, launches):
    """A launch has one mix of formats: weights with codes, and biases in floats."""
    model = nn.Sequential(nn.Linear(128, 4), nn.Linear(4, 128), nn.Linear(128, 4)).to(device)
    optimizer = AdamW(model.parameters(), **EIGHT_BITS)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    launches.clear()
    optimizer.step()
    assert [name for name, _ in launches] == ["scalars_kernel", "adamw_table_kernel", "adamw_table_kernel"]
    held = {name: n for name, n in optimizer.state_bytes().by_name.items() if name != "step"}
    n_coded, n_floats = 2 * 512, 512 + 4 + 128 + 4
    assert held == {
        "exp_avg_codes": n_coded,
        "exp_avg_sq_codes": n_coded,
        "exp_avg_scale": 4 * n_coded // 128,
        "exp_avg_sq_scale": 4 * n_coded // 128,
        "exp_avg": 4 * n_floats,
        "exp_avg_sq": 4 * n_floats,
    }


def test_floats_by_the_rule_are_not_rounded_stochastically(device, path):
    """An fp32 bias of a model with 8-bit moments is stepped as torch steps it."""
    bias = torch.randn(300, device=device)
    ours, theirs = nn.Parameter(bias.clone()), nn.Parameter(bias.clone())
    mine, reference = AdamW([ours], seed=5, **EIGHT_BITS), torch.optim.AdamW([theirs])
    for _ in range(3):
        ours.grad = torch.randn_like(ours)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-7)
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(mine.state[ours][name], reference.state[theirs][name], rtol=2e-6, atol=1e-7)


def test_stochastic_rounding_is_the_default_of_8_bits_only(device, path):
    def stepped(**options):
        torch.manual_seed(3)
        param = nn.Parameter(torch.randn(4, 128, device=device))
        optimizer = AdamW([param], **options)
        for _ in range(3):
            param.grad = torch.randn_like(param)
            optimizer.step()
        return torch.cat([bits(value) for value in (param, *optimizer.state[param].values())])

    assert torch.equal(stepped(**EIGHT_BITS), stepped(stochastic_rounding=True, **EIGHT_BITS))
    assert not torch.equal(stepped(**EIGHT_BITS), stepped(stochastic_rounding=False, **EIGHT_BITS))
    assert not torch.equal(stepped(**EIGHT_BITS), stepped(seed=1, **EIGHT_BITS))
    floats = {"exp_avg_dtype": BF16}
    assert torch.equal(stepped(**floats), stepped(stochastic_rounding=False, **floats))
    assert math.prod(stepped(**floats).shape) > 0


BROKEN_LIVE = {
    "codes under the name of floats": (lambda s: s.update(exp_avg=s.pop("exp_avg_codes")), "not supported"),
    "a moment twice": (lambda s: s.update(exp_avg=torch.zeros(2, 128)), "one of them"),
    "codes without a scale": (lambda s: s.pop("exp_avg_scale"), "'exp_avg_scale', which belongs to it"),
    "scale without codes": (lambda s: s.pop("exp_avg_codes"), "'exp_avg_codes', which belongs to it"),
    "codes of v for m": (lambda s: s.update(exp_avg_codes=s["exp_avg_sq_codes"]), "must be torch.int8"),
    "scale too short": (lambda s: s.update(exp_avg_scale=torch.ones(1, 1)), "of 2 elements"),
}


@pytest.mark.parametrize("name", BROKEN_LIVE)
def test_state_that_does_not_fit_is_refused(name, device, path):
    change, message = BROKEN_LIVE[name]
    param = nn.Parameter(torch.randn(2, 128, device=device))
    optimizer = AdamW([param], **EIGHT_BITS)
    param.grad = torch.randn_like(param)
    optimizer.step()
    before = param.detach().clone()
    change(optimizer.state[param])
    for key, value in optimizer.state[param].items():
        optimizer.state[param][key] = value.to(device) if isinstance(value, torch.Tensor) else value
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert torch.equal(param, before)
