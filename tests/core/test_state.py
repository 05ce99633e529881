"""`optimizer.state` behaves as any optimizer's, and every way to replace an entry of it is noticed."""

import copy
import io
import pickle
from collections import defaultdict

import pytest
import torch
from torch import nn

from adamw_triton import AdamW


def stepped(device, options=None):
    params = [nn.Parameter(torch.randn(n, device=device)) for n in (1, 37, 200)]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = AdamW(params, **(options or {}))
    optimizer.step()
    return params, optimizer


# An equal value in another tensor must be noticed as well: it is the other tensor that is the state from then on.
ENTRY_CHANGES = {
    "set": lambda s: s.__setitem__("exp_avg", s["exp_avg"].clone()),
    "set step": lambda s: s.__setitem__("step", s["step"].clone()),
    "update": lambda s: s.update(exp_avg=s["exp_avg"].clone()),
    "or": lambda s: s.__ior__({"exp_avg_sq": s["exp_avg_sq"].clone()}),
    "delete and set": lambda s: (s.__delitem__("exp_avg"), s.setdefault("exp_avg", torch.zeros_like(s["exp_avg_sq"]))),
    "pop": lambda s: s.pop("exp_avg_sq"),
    "popitem": lambda s: s.popitem(),
    "clear": lambda s: s.clear(),
}


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("change", ENTRY_CHANGES.values(), ids=ENTRY_CHANGES.keys())
def test_replaced_entries_are_the_state_of_the_next_step(change, index, device, path):
    params, optimizer = stepped(device)
    state = optimizer.state[params[index]]
    change(state)
    expected = nn.Parameter(params[index].detach().clone())
    reference = torch.optim.AdamW([expected], foreach=False)
    reference.state[expected] = {
        "step": torch.tensor(float(state.get("step", 0))),
        **{
            name: state[name].clone() if name in state else torch.zeros_like(expected)
            for name in ("exp_avg", "exp_avg_sq")
        },
    }
    held = dict(state)
    expected.grad = params[index].grad.clone()
    reference.step()
    optimizer.step()
    torch.testing.assert_close(params[index], expected, rtol=2e-6, atol=2e-7)
    now = optimizer.state[params[index]]
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(now[name], reference.state[expected][name], rtol=2e-6, atol=2e-7)
        assert name not in held or now[name] is held[name]
    assert now["step"] == reference.state[expected]["step"]


STATE_CHANGES = {
    "another defaultdict": lambda o, p: setattr(o, "state", defaultdict(dict)),
    "plain dict for one": lambda o, p: o.state.__setitem__(p, {}),
    "delete one": lambda o, p: o.state.__delitem__(p),
    "pop one": lambda o, p: o.state.pop(p),
    "clear": lambda o, p: o.state.clear(),
    "moved from another optimizer": lambda o, p: setattr(o, "state", AdamW([p]).state),
}


@pytest.mark.parametrize("change", STATE_CHANGES.values(), ids=STATE_CHANGES.keys())
def test_state_without_entries_starts_again(change, device, path):
    params, optimizer = stepped(device)
    known = [optimizer.state[p]["exp_avg"] for p in params]
    before = [m.clone() for m in known]
    change(optimizer, params[1])
    optimizer.step()
    assert optimizer.state[params[1]]["step"] == 1
    assert torch.equal(known[1], before[1])
    assert optimizer.state[params[1]]["exp_avg"] is not known[1]
    optimizer.step()  # the new state is watched as well
    optimizer.state[params[1]]["step"] = torch.tensor(7.0)
    optimizer.step()
    assert optimizer.state[params[1]]["step"] == 8


def test_a_reference_to_the_state_stays_valid(device):
    param = nn.Parameter(torch.ones(3, device=device))
    optimizer = AdamW([param])
    state, of_param = optimizer.state, optimizer.state[param]
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.state is state and state[param] is of_param and of_param["step"] == 1


def test_state_for_a_parameter_without_any(device):
    _params, optimizer = stepped(device)
    fresh = nn.Parameter(torch.ones(3, device=device))
    assert optimizer.state[fresh] == {}  # as with torch's defaultdict
    optimizer.state[fresh]["note"] = 1
    assert optimizer.state[fresh] == {"note": 1}


@pytest.mark.parametrize("convert", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_are_plain(convert, device):
    params, optimizer = stepped(device)
    copied = convert(optimizer.state)
    assert type(copied) is defaultdict and copied.default_factory is dict and len(copied) == 3
    assert type(convert(optimizer.state[params[0]])) is dict
    copied = copy.deepcopy(optimizer)
    assert copied.state is not optimizer.state


@pytest.mark.fast
def test_state_dicts_are_plain_and_load_as_weights_only(device):
    params, optimizer = stepped(device)
    state_dict = optimizer.state_dict()
    assert type(state_dict["state"]) is dict and {type(entries) for entries in state_dict["state"].values()} == {dict}
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert torch.equal(loaded["state"][1]["exp_avg"], optimizer.state[params[1]]["exp_avg"])


def test_a_deep_copied_optimizer_goes_on_alone(device, path):
    params, optimizer = stepped(device)
    model = nn.ParameterList(params)
    other_model, other = copy.deepcopy((model, optimizer))
    for p, q in zip(model, other_model, strict=True):
        q.grad = p.grad.clone()
    for _ in range(2):
        optimizer.step()
        other.step()
    assert all(map(torch.equal, model, other_model))
    other.step()
    assert not any(map(torch.equal, model, other_model))


def test_state_of_the_whole_optimizer_through_a_file(device, path):
    params, optimizer = stepped(device)
    loaded = pickle.loads(pickle.dumps(optimizer))
    twins = loaded.param_groups[0]["params"]
    for p, q in zip(params, twins, strict=True):
        q.grad = p.grad.clone()
    optimizer.step()
    loaded.step()
    assert all(map(torch.equal, params, twins))
