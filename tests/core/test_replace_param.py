"""Parameters that grow, shrink and are cut up, and the state that they keep."""

import copy

import pytest
import torch
from helpers import bits
from torch import nn

from adamw_triton import AdamW, register_gradient_release, replace_param, storage

STORAGE = {
    "fp32": (torch.float32, {}),
    "amsgrad": (torch.float32, {"amsgrad": True}),
    "8 bits": (torch.float32, {"exp_avg_dtype": "int8", "exp_avg_sq_dtype": "uint8"}),
    "m of 8 bits": (torch.bfloat16, {"exp_avg_dtype": "int8", "master_weight_bits": 32}),
    "smallest": (
        torch.bfloat16,
        {"exp_avg_dtype": "int8", "exp_avg_sq_dtype": "uint8", "master_weight_bits": 24},
    ),
    "fp16 masters": (torch.float16, {"master_weight_bits": 32}),
}
EIGHT = [name for name in STORAGE if "8 bits" in name or name == "smallest"]


def stepped(shapes, name, device, steps=2):
    dtype, options = STORAGE[name]
    params = [nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]
    optimizer = AdamW(params, **options)
    for _ in range(steps):
        for p in params:
            sizes = torch.logspace(-2, 0, p.shape[0], device=device).view(-1, *[1] * (p.dim() - 1))
            p.grad = torch.randn_like(p) * sizes.to(dtype)
        optimizer.step()
    return params, optimizer


def moments(optimizer, param):
    """Every number that the state stands for, in floats of the parameter's shape."""
    state = optimizer.state[param]
    found = {name: storage.moment(name, state) for name in ("exp_avg", "exp_avg_sq")}
    if "max_exp_avg_sq" in state:
        found["max_exp_avg_sq"] = state["max_exp_avg_sq"]
    return {name: value.detach().clone() for name, value in found.items()}


CUTS = {
    "slice": ([slice(2, 7)], lambda t: t[2:7]),
    "mask": (["mask"], lambda t: t[torch.arange(9) % 2 == 0]),
    "indices in another order": ([torch.tensor([8, 0, 3, 3])], lambda t: t[[8, 0, 3, 3]]),
    "grown": ([slice(None), 5], lambda t: torch.cat([t, t.new_zeros(5, *t.shape[1:])])),
    "grown in the middle": (
        [slice(0, 4), 2, slice(4, None)],
        lambda t: torch.cat([t[:4], t.new_zeros(2, *t.shape[1:]), t[4:]]),
    ),
    "nothing left": ([slice(0, 0)], lambda t: t[:0]),
}


@pytest.mark.parametrize("name", STORAGE)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("shape", [(9, 256), (9, 8, 4, 4), (9, 7), (9,)], ids=str)
def test_rows(name, cut, shape, device, path):
    """What is kept is kept to the bit, what is new has moments of 0, and nothing else changes."""
    pieces, function = CUTS[cut]
    pieces = [torch.arange(9, device=device) % 2 == 0] if cut == "mask" else pieces
    (param, other), optimizer = stepped([shape, (3, 128)], name, device)
    before, master = moments(optimizer, param), optimizer.master_params()[0]
    kept = {k: bits(v) for k, v in optimizer.state[other].items()}
    step = optimizer.state[param]["step"].item()
    new = nn.Parameter(function(param.detach().cpu()).to(device))
    replace_param(optimizer, param, new, pieces)
    assert optimizer.param_groups[0]["params"][0] is new and param not in optimizer.state
    assert optimizer.state[new]["step"] == step
    for key, value in moments(optimizer, new).items():
        assert torch.equal(bits(value), bits(function(before[key].cpu()))), key
    if optimizer.group_options[0]["master_weight_bits"]:
        expected = function(master.cpu())
        fresh = function(torch.ones(shape)) == 0
        assert torch.equal(optimizer.master_params()[0].cpu()[~fresh], expected[~fresh])
        assert torch.equal(optimizer.master_params()[0].cpu()[fresh], new.detach().float().cpu()[fresh])
    assert all(torch.equal(bits(v), kept[k]) for k, v in optimizer.state[other].items())
    for p in (new, other):
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert optimizer.state[new]["step"] == step + 1 and new.isfinite().all()


@pytest.mark.fast
@pytest.mark.parametrize("name", EIGHT)
def test_kept_rows_step_as_if_nothing_had_happened(name, device, path):
    (param,), optimizer = stepped([(8, 256)], name, device)
    for group in optimizer.param_groups:
        group["stochastic_rounding"] = False
    twin = nn.Parameter(param.detach().clone())
    other = AdamW([twin], **STORAGE[name][1])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.param_groups[0]["stochastic_rounding"] = False
    new = nn.Parameter(param.detach()[3:].clone())
    replace_param(optimizer, param, new, [slice(3, None)])
    twin.grad = torch.randn_like(twin)
    new.grad = twin.grad[3:].clone()
    optimizer.step()
    other.step()
    assert torch.equal(bits(new), bits(twin[3:]))
    for key, value in optimizer.state[new].items():
        if key != "step":
            assert torch.equal(bits(value), bits(other.state[twin][key][3:])), key


@pytest.mark.parametrize("name", STORAGE)
def test_two_parameters_become_one_and_one_two(name, device, path):
    (a, b), optimizer = stepped([(4, 128), (6, 128)], name, device)
    before = [moments(optimizer, p) for p in (a, b)]
    joined = nn.Parameter(torch.cat([a.detach(), b.detach()[2:]]))
    replace_param(optimizer, a, joined, [slice(None), (b, slice(2, None))])
    for key, value in moments(optimizer, joined).items():
        assert torch.equal(value, torch.cat([before[0][key], before[1][key][2:]])), key
    assert optimizer.param_groups[0]["params"][1] is b and b in optimizer.state, "which keeps its own"


@pytest.mark.parametrize("name", EIGHT)
def test_columns_are_cut_between_groups(name, device, path):
    (param,), optimizer = stepped([(4, 512)], name, device)
    before = moments(optimizer, param)
    new = nn.Parameter(torch.cat([param.detach()[:, 128:384], torch.zeros_like(param[:, :128])], 1))
    replace_param(optimizer, param, new, [slice(128, 384), 128], dim=1)
    for key, value in moments(optimizer, new).items():
        expected = torch.cat([before[key][:, 128:384], torch.zeros_like(before[key][:, :128])], 1)
        assert torch.equal(value, expected), key


@pytest.mark.parametrize("name", EIGHT)
@pytest.mark.parametrize(
    ("pieces", "width"),
    [
        ([slice(0, 100)], 100),
        ([slice(64, 320)], 256),
        ([slice(0, 64), slice(128, 192)], 128),
        ([torch.arange(0, 512, 2)], 256),
        ([slice(None), 1], 513),
    ],
    ids=str,
)
def test_columns_cut_within_groups_are_refused(name, pieces, width, device, path):
    (param,), optimizer = stepped([(4, 512)], name, device)
    saved = copy.deepcopy(optimizer.state_dict())
    new = nn.Parameter(torch.zeros(4, width, device=device, dtype=param.dtype))
    with pytest.raises(ValueError, match=r"Cut at multiples of 128, pad .* exp_avg_dtype='float32'"):
        replace_param(optimizer, param, new, pieces, dim=1)
    assert optimizer.param_groups[0]["params"] == [param] and new not in optimizer.state
    now = optimizer.state_dict()["state"][0]
    assert all(torch.equal(now[key], value) for key, value in saved["state"][0].items())
    # The remedy.
    before = moments(optimizer, param)
    optimizer.param_groups[0].update(exp_avg_dtype="float32", exp_avg_sq_dtype="float32")
    replace_param(optimizer, param, new, pieces, dim=1)
    for key, value in moments(optimizer, new).items():
        parts = [before[key].new_zeros(4, p) if isinstance(p, int) else before[key][:, p] for p in pieces]
        assert torch.equal(value, torch.cat(parts, 1)), key


def test_padding_completes_a_group(device, path):
    """100 columns of a group and 28 zeros have the group's scale."""
    (param,), optimizer = stepped([(4, 128)], "8 bits", device)
    before = moments(optimizer, param)
    new = nn.Parameter(torch.zeros(4, 128, device=device))
    replace_param(optimizer, param, new, [slice(0, 100), 28], dim=-1)
    for key, value in moments(optimizer, new).items():
        assert torch.equal(value[:, :100], before[key][:, :100]) and not value[:, 100:].any()


def test_a_filter_in_another_memory_order(device, path):
    """The old one is contiguous, the new one has its channels last: groups of other elements, and refused."""
    (param,), optimizer = stepped([(4, 16, 4, 4)], "8 bits", device)
    new = nn.Parameter(param.detach().to(memory_format=torch.channels_last))
    with pytest.raises(ValueError, match="share a scale"):
        replace_param(optimizer, param, new, [slice(None)])
    assert optimizer.param_groups[0]["params"] == [param]


MIXED = {
    "codes and floats": ((64, 128), (64, 100), (64, 256), [slice(None), "b", 28], 1),
    "floats and codes": ((64, 100), (64, 128), (64, 228), [slice(None), "b"], 1),
    "codes and another order of memory": ((64, 128), "transposed", (96, 128), [slice(None), "b"], 0),
}


@pytest.mark.parametrize("name", EIGHT)
@pytest.mark.parametrize("mix", MIXED)
def test_sources_of_different_forms(mix, name, device, path):
    """The values of each; those that get codes are rounded once."""
    first, second, shape, pieces, dim = MIXED[mix]
    (a, b), optimizer = stepped([first, (32, 128) if second == "transposed" else second], name, device, steps=0)
    if second == "transposed":
        b.data = b.detach().t().contiguous().t()
    for p in (a, b):
        p.grad = torch.randn_like(p)
    optimizer.step()
    before = [moments(optimizer, p) for p in (a, b)]
    new = nn.Parameter(torch.zeros(shape, device=device, dtype=a.dtype))
    replace_param(optimizer, a, new, [(b, slice(None)) if piece == "b" else piece for piece in pieces], dim=dim)
    for key, value in moments(optimizer, new).items():
        expected = torch.cat([before[0][key], before[1][key]], dim).float()
        got = value.float().narrow(dim, 0, expected.shape[dim])
        torch.testing.assert_close(got, expected, rtol=0.02, atol=2e-3 * expected.abs().max().item())


def test_a_parameter_that_is_listed_twice(device, path):
    param = nn.Parameter(torch.randn(4, 128, device=device))
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = AdamW([param, param])
    param.grad = torch.randn_like(param)
    optimizer.step()
    new = nn.Parameter(param.detach()[:2].clone())
    replace_param(optimizer, param, new, [slice(0, 2)])
    assert all(p is new for p in optimizer.param_groups[0]["params"])
    new.grad = torch.randn_like(new)
    optimizer.step()
    assert list(optimizer.state) == [new] and optimizer.state[new]["step"] == 2


def test_nothing_of_the_old_but_its_count(device, path):
    (param, other), optimizer = stepped([(4, 128), (4, 128)], "smallest", device)
    del optimizer.state[other]
    new = nn.Parameter(torch.zeros(3, 128, device=device, dtype=param.dtype))
    replace_param(optimizer, param, new, [3, slice(0, 0), (param, slice(4, 4))])
    assert optimizer.state[new]["step"] == 2
    assert not any(value.any() for value in moments(optimizer, new).values())


def test_what_has_no_state_is_just_replaced(device):
    (param,), optimizer = stepped([(4, 128)], "8 bits", device, steps=0)
    new = nn.Parameter(torch.zeros(5, 128, device=device))
    replace_param(optimizer, param, new, [slice(None), 1])
    assert optimizer.param_groups[0]["params"] == [new] and not optimizer.state


def test_what_is_refused(device):
    (param, late), optimizer = stepped([(4, 128), (4, 128)], "fp32", device)
    del optimizer.state[late]
    good = nn.Parameter(torch.zeros(4, 128, device=device))
    stranger = nn.Parameter(torch.zeros(4, 128, device=device))
    cases = [
        (stranger, good, [slice(None)], {}, "no such parameter"),
        (param, late, [slice(None)], {}, "in the optimizer already"),
        (param, good, [slice(None)], {"dim": 2}, "dim=2"),
        (param, good, [slice(0, 3)], {}, r"pieces of \[3\] make up 3"),
        (param, good, [(stranger, slice(None))], {}, "no such parameter"),
        (param, good, [slice(0, 2), (late, slice(0, 2))], {}, "different numbers of steps"),
        (param, good, ["all"], {}, "a piece must be"),
        (param, good, [True], {}, "a piece must be"),
        (param, good, [-4], {}, "a piece must be"),
        (param, good, [torch.tensor([0, 1, 2, 9])], {}, "replace_param: index"),
        (param, good, [torch.ones(3, dtype=torch.bool)], {}, "replace_param: "),
        (param, torch.cat([good, good])[:4], [slice(None)], {}, "no leaf"),
        (param, nn.Parameter(good.detach().double()), [4], {}, "along dim 0 only"),
        (param, nn.Parameter(torch.zeros(4, device=device)), [4], {"dim": 1}, "along dim 1 only"),
        (param, nn.Parameter(torch.zeros(4, 64, device=device)), [slice(None)], {}, "along dim 0 only"),
        (param, nn.Parameter(good.detach().double()), [slice(None)], {}, "along dim 0 only"),
    ]
    for old, new, pieces, options, message in cases:
        with pytest.raises(ValueError, match=message):
            replace_param(optimizer, old, new, pieces, **options)
        assert optimizer.param_groups[0]["params"] == [param, late] and len(optimizer.state) == 1


def test_gradient_release_keeps_its_parameters(device):
    model = nn.Linear(128, 4).to(device)
    optimizer = AdamW(model.parameters())
    handle = register_gradient_release(model, optimizer)
    new = nn.Parameter(torch.zeros(2, 128, device=device))
    with pytest.raises(ValueError, match=r"remove\(\) its handle first"):
        replace_param(optimizer, model.weight, new, [slice(0, 2)])
    handle.remove()
    replace_param(optimizer, model.weight, new, [slice(0, 2)])
