"""`optimizer.state` is the plain dict of dicts that torch's is: frameworks rebuild it, share it and own it."""

import copy
import pickle
from collections import defaultdict

import numpy as np
import pytest
import torch
from helpers import step_both
from torch import nn

from adamw_triton import AdamW

OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}
SHAPES = [(40, 30), (7,), (1100,)]
MOMENTS = ("exp_avg", "exp_avg_sq")


@pytest.fixture(params=[None, False], ids=["foreach=None", "foreach=False"])
def options(request):
    return {**OPTIONS, "foreach": request.param}


def make(device, options):
    """Equal parameters with our optimizer and with torch's."""
    ours = [nn.Parameter(torch.randn(shape, device=device)) for shape in SHAPES]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    return ours, theirs, AdamW(ours, **options), torch.optim.AdamW(theirs, **{**options, "foreach": False})


def stepped(device, options):
    run = make(device, options)
    step_both(*run)
    return run


def assert_same_state(ours, theirs, mine, reference):
    for p, q in zip(ours, theirs, strict=True):
        for name in MOMENTS:
            torch.testing.assert_close(mine.state[p][name], reference.state[q][name], rtol=2e-6, atol=2e-7)
        assert float(mine.state[p]["step"]) == float(reference.state[q]["step"])


def assert_plain(optimizer):
    assert type(optimizer.state) is defaultdict and optimizer.state.default_factory is dict
    assert [type(entry) for entry in optimizer.state.values()] == [dict] * len(SHAPES)
    assert {type(value) for entry in optimizer.state.values() for value in entry.values()} == {torch.Tensor}


@pytest.mark.fast
def test_types(device, options, path):
    ours, _, mine, _ = make(device, options)
    assert type(mine.state) is defaultdict and type(mine.state[ours[0]]) is dict
    mine.state.clear()
    for p in ours:
        p.grad = torch.randn_like(p)
    mine.step()
    assert_plain(mine)
    mine.load_state_dict(copy.deepcopy(mine.state_dict()))
    assert_plain(mine)
    mine.step()
    assert_plain(mine)
    mine.state.clear()
    mine.step()
    assert_plain(mine)


COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda value: pickle.loads(pickle.dumps(value))}


@pytest.mark.parametrize("convert", COPIES.values(), ids=COPIES.keys())
def test_types_of_copies(convert, device, options, path):
    _, _, mine, _ = stepped(device, options)
    copied = convert(mine)
    assert_plain(copied)
    assert type(convert(mine.state)) is defaultdict
    copied.step()
    assert_plain(copied)


def test_state_dict_has_plain_types(device, options, path):
    _, _, mine, reference = stepped(device, options)
    packed, expected = mine.state_dict(), reference.state_dict()
    assert type(packed) is type(expected) and type(packed["state"]) is type(expected["state"]) is dict
    assert {type(entry) for entry in packed["state"].values()} == {dict}
    assert {type(group) for group in packed["param_groups"]} == {dict}
    assert packed["state"][0].keys() == expected["state"][0].keys()


def rebuilt(value):
    """As Lightning and Accelerate move anything to a device: with the constructor of its own type."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return type(value)({key: rebuilt(item) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(rebuilt(item) for item in value)
    return value


def test_rebuilt_state_dict_loads(device, options, path):
    run = stepped(device, options)
    mine = run[2]
    mine.load_state_dict(rebuilt(mine.state_dict()))
    step_both(*run)
    assert_same_state(*run)


def test_rebuilt_entries_go_on(device, options, path):
    run = stepped(device, options)
    ours, _, mine, _ = run
    for p in ours:
        mine.state[p] = rebuilt(mine.state[p])
    for _ in range(2):
        step_both(*run)
    assert_same_state(*run)


def step_in_turns(optimizers, ours, theirs, reference):
    for index in (0, 1, 0, 0, 1, 1, 0):
        step_both(ours, theirs, optimizers[index], reference)


def same_state(first, params, options):
    second = AdamW(params, **options)
    second.state = first.state
    return second


SHARING = {"assigned": same_state, "copy.copy": lambda first, params, options: copy.copy(first)}


@pytest.mark.parametrize("when", ["before the first step", "between steps"])
@pytest.mark.parametrize("share", SHARING.values(), ids=SHARING.keys())
def test_two_optimizers_of_one_state_step_in_turns(share, when, device, options, path):
    ours, theirs, mine, reference = make(device, options)
    if when == "between steps":
        step_both(ours, theirs, mine, reference)
    other = share(mine, ours, options)
    assert other.state is mine.state
    step_in_turns([mine, other], ours, theirs, reference)
    assert other.state is mine.state
    assert_same_state(ours, theirs, mine, reference)


def test_an_optimizer_and_torchs_of_one_state_step_in_turns(device, options, path):
    """Nothing that ours remembers may take the place of what is in the state."""
    ours, theirs, mine, reference = stepped(device, options)
    torchs = torch.optim.AdamW(ours, **OPTIONS, foreach=False)
    torchs.state = mine.state
    step_in_turns([mine, torchs], ours, theirs, reference)
    assert_same_state(ours, theirs, mine, reference)


@pytest.mark.parametrize("filled", [False, True], ids=["empty", "filled"])
def test_an_assigned_dict_stays_its_owners(filled, device, options, path):
    run = stepped(device, options)
    ours, _, mine, reference = run
    owned = {p: dict(entry) for p, entry in mine.state.items()} if filled else {}
    entries = dict(owned)
    if not filled:
        reference.state.clear()
    mine.state = owned
    for _ in range(2):
        step_both(*run)
    assert mine.state is owned and type(owned) is dict
    assert owned.keys() == set(ours) and all(owned[p] is entry for p, entry in entries.items())
    assert_same_state(*run)


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "own memory"])
def test_a_step_is_counted_where_it_is(shared, device, options, path):
    """As in Hogwild training, where other processes read and write the same count."""
    run = make(device, options)
    ours, _, mine, _ = run
    steps = [torch.zeros(()) for _ in ours]
    for p, step in zip(ours, steps, strict=True):
        if shared:
            step.share_memory_()
        mine.state[p] = {"step": step, **{name: torch.zeros_like(p) for name in MOMENTS}}
    addresses = [step.data_ptr() for step in steps]
    for count in (1.0, 2.0, 3.0):
        step_both(*run)
        assert [float(step) for step in steps] == [count] * len(steps)
    assert all(mine.state[p]["step"] is step for p, step in zip(ours, steps, strict=True))
    assert [step.data_ptr() for step in steps] == addresses
    assert not shared or all(step.is_shared() for step in steps)


def test_a_count_written_by_somebody_else_is_counted_on(device, options, path):
    """Another process, or another view of the memory, changes a count without a trace at the tensor."""
    run = stepped(device, options)
    ours, theirs, mine, reference = run
    step = mine.state[ours[2]]["step"]
    assert step.device.type == "cpu"
    step.detach().numpy()[...] = 9
    reference.state[theirs[2]]["step"].fill_(9)
    for _ in range(2):
        step_both(*run)
    assert_same_state(*run)
    assert mine.state[ours[2]]["step"] == 11


COUNTS = {
    "numpy": np.float32,
    "int": int,
    "float": float,
    "int64": lambda value: torch.tensor(int(value)),
    "float64": lambda value: torch.tensor(value, dtype=torch.float64),
    "one element": lambda value: torch.tensor([value]),
}


@pytest.mark.parametrize("convert", COUNTS.values(), ids=COUNTS.keys())
def test_loaded_counts_of_any_kind(convert, device, options, path):
    run = stepped(device, options)
    for _ in range(2):
        step_both(*run)
    for optimizer in run[2:]:
        packed = copy.deepcopy(optimizer.state_dict())
        for entry in packed["state"].values():
            entry["step"] = convert(float(entry["step"]))
        optimizer.load_state_dict(packed)
    for _ in range(2):
        step_both(*run)
    assert_same_state(*run)
    assert [float(entry["step"]) for entry in run[2].state.values()] == [5.0] * len(SHAPES)


@pytest.mark.parametrize("how", ["in the state", "in a state dict"])
def test_one_step_tensor_for_all_parameters(how, device, options, path):
    """Each update of a parameter is one. torch's loop counts such a tensor once for each parameter."""
    run = stepped(device, options)
    ours, _, mine, _ = run
    one = mine.state[ours[0]]["step"].clone()
    if how == "in the state":
        for p in ours:
            mine.state[p]["step"] = one
    else:
        packed = mine.state_dict()
        for entry in packed["state"].values():
            entry["step"] = one
        mine.load_state_dict(packed)
    for _ in range(2):
        step_both(*run)
    assert_same_state(*run)
    assert [float(mine.state[p]["step"]) for p in ours] == [3.0] * len(SHAPES)
