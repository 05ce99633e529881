"""Param groups have torch's keys and no more; what AdamW adds is kept beside them."""

import copy
import io
import json
import pickle

import pytest
import torch
from torch import nn

from adamw_triton import AdamW, register_gradient_release
from adamw_triton.group_options import OptionsOfGroups

ALL = {
    "exp_avg_dtype": "int8",
    "exp_avg_sq_dtype": torch.bfloat16,
    "master_weight_bits": 24,
    "stochastic_rounding": True,
    "seed": 7,
    "cautious": True,
    "decouple_lr": True,
}
AS_JSON = {**ALL, "exp_avg_sq_dtype": "bfloat16", "decay_lr": 1e-3}
DEFAULTS = {
    "exp_avg_dtype": None,
    "exp_avg_sq_dtype": None,
    "master_weight_bits": None,
    "stochastic_rounding": None,
    "seed": 0,
    "cautious": False,
    "decouple_lr": False,
    "decay_lr": None,
}


def bf16_params(n=2):
    return [nn.Parameter(torch.randn(2, 128).bfloat16()) for _ in range(n)]


def torch_keys(**options):
    return list(torch.optim.AdamW([torch.zeros(1)], **options).param_groups[0])


@pytest.mark.parametrize("options", [{}, ALL], ids=["defaults", "all options"])
def test_groups_have_torch_s_keys(options):
    optimizer = AdamW([{"params": bf16_params(1)}, {"params": bf16_params(1), "lr": 0.1}], **options)
    for group in (*optimizer.param_groups, *optimizer.state_dict()["param_groups"]):
        assert set(group) == set(torch_keys())
        assert not any(isinstance(value, torch.dtype) for value in group.values())
    assert all(group["decoupled_weight_decay"] is True for group in optimizer.param_groups)
    assert set(optimizer.defaults) == set(torch.optim.AdamW([torch.zeros(1)]).defaults)
    json.dumps(optimizer.state_dict()["param_groups"])


def test_options_are_told_by_name():
    optimizer = AdamW([{"params": bf16_params(1)}, {"params": bf16_params(1), "lr": 0.1, "cautious": False}], **ALL)
    optimizer.add_param_group({"params": bf16_params(1), **DEFAULTS})
    first, second, third = optimizer.group_options
    assert first == AS_JSON
    assert second == {**AS_JSON, "cautious": False, "decay_lr": 0.1}
    assert third == DEFAULTS
    json.dumps(optimizer.group_options)
    first["seed"] = 99  # a copy
    assert optimizer.group_options[0]["seed"] == 7


@pytest.mark.parametrize("name", ["int9", "torch.int7", "", "double", "int16"])
def test_names_that_are_no_storage_are_refused(name):
    for options in ({"exp_avg_dtype": name}, {"exp_avg_sq_dtype": name}):
        with pytest.raises(ValueError, match="must be None or one of"):
            AdamW(bf16_params(), **options)


def test_a_group_dict_is_left_to_its_owner():
    """It can make a second optimizer with the same options."""
    groups = [{"params": bf16_params(1), "exp_avg_dtype": "int8", "cautious": True}]
    options = [AdamW(groups).group_options[0] for _ in range(2)]
    assert options[0] == options[1] == {**DEFAULTS, "exp_avg_dtype": "int8", "cautious": True}
    plain = {"params": bf16_params(1)}
    optimizer = AdamW([plain])
    assert optimizer.param_groups[0] is plain, "as in torch, where an owner changes lr through it"


def test_a_group_that_is_refused_leaves_nothing(device):
    optimizer = AdamW(bf16_params())
    before = optimizer.group_options
    for wrong in ({"master_weight_bits": 5}, {"seed": 3}, {"decouple_lr": True, "lr": 0.0}):
        with pytest.raises(ValueError, match=r"master_weight_bits|seed|initial lr"):
            optimizer.add_param_group({"params": bf16_params(1), **wrong})
    assert optimizer.group_options == before and len(optimizer.param_groups) == 1


def step(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)
    optimizer.step()


def test_an_option_written_to_a_group_counts_and_is_taken_from_there(path):
    optimizer = AdamW([{"params": [p]} for p in bf16_params()])
    optimizer.param_groups[1]["exp_avg_dtype"] = "int8"
    step(optimizer)
    assert [options["exp_avg_dtype"] for options in optimizer.group_options] == [None, "int8"]
    assert "exp_avg_dtype" not in optimizer.param_groups[1]
    assert "exp_avg_codes" in optimizer.state[optimizer.param_groups[1]["params"][0]]
    optimizer.param_groups[0]["cautious"] = True
    assert set(optimizer.state_dict()["param_groups"][0]) == set(torch_keys()), "taken before it is saved"
    optimizer.param_groups[0].update(decouple_lr=True, lr=0.0)
    with pytest.raises(ValueError, match="initial lr must be above 0"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 1e-3
    step(optimizer)
    assert optimizer.group_options[0]["decay_lr"] == 1e-3


def test_options_follow_their_groups(path):
    """Removed, reordered and replaced by copies."""
    params = bf16_params(3)
    optimizer = AdamW([{"params": [p], "seed": i, "stochastic_rounding": True} for i, p in enumerate(params)])

    def seeds():
        return [options["seed"] for options in optimizer.group_options]

    optimizer.param_groups.reverse()
    assert seeds() == [2, 1, 0]
    del optimizer.param_groups[1]
    assert seeds() == [2, 0]
    optimizer.param_groups[:] = [dict(group) for group in optimizer.param_groups]
    assert seeds() == [2, 0]
    optimizer.param_groups[:] = [dict(group) for group in reversed(optimizer.param_groups)]
    assert seeds() == [0, 2]
    optimizer.param_groups[:] = [dict(group) for group in reversed(optimizer.param_groups) if group["params"]]
    assert seeds() == [2, 0]
    optimizer.add_param_group({"params": [params[1]], "seed": 9, "stochastic_rounding": True})
    assert seeds() == [2, 0, 9]
    step(optimizer)


@pytest.mark.parametrize("with_step", [False, True])
@pytest.mark.parametrize("back", ["append", "add_param_group", "all at once"])
def test_groups_that_leave_for_a_while_keep_their_options(back, with_step, path):
    params = bf16_params(2)
    optimizer = AdamW([{"params": [params[0]], "exp_avg_dtype": "int8"}, {"params": [params[1]], "cautious": True}])
    before = optimizer.group_options
    everything = list(optimizer.param_groups)
    away = [optimizer.param_groups.pop(1)] if back != "all at once" else [optimizer.param_groups.pop(0)]
    if with_step:
        step(optimizer)
    if back == "append":
        optimizer.param_groups.append(*away)
    elif back == "add_param_group":
        optimizer.add_param_group(*away)
    else:
        optimizer.param_groups = everything
    assert optimizer.group_options == before
    step(optimizer)
    assert "exp_avg_codes" in optimizer.state[params[0]]


def test_a_new_group_does_not_inherit_from_one_that_is_gone(path):
    """Not by its place, nor by the address of a dict that was freed."""
    for _ in range(20):
        optimizer = AdamW([{"params": [p], "cautious": i == 0} for i, p in enumerate(bf16_params(2))])
        optimizer.group_options  # noqa: B018
        like = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
        del optimizer.param_groups[0]
        optimizer.param_groups.append({"params": bf16_params(1), **like})
        assert [options["cautious"] for options in optimizer.group_options] == [False, False]


def test_a_group_that_is_put_in_by_hand_has_the_defaults(path):
    """`decouple_lr` too, with the learning rate of the group."""
    optimizer = AdamW(bf16_params(1), lr=0.1, decouple_lr=True)
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": bf16_params(1), "lr": 0.3})
    step(optimizer)
    assert [options["decay_lr"] for options in optimizer.group_options] == [0.1, 0.3]


def test_a_refused_option_leaves_the_old_one(path):
    optimizer = AdamW(bf16_params(), master_weight_bits=32)
    step(optimizer)
    for name, wrong in (("master_weight_bits", 16), ("cautious", "no"), ("exp_avg_dtype", "int9"), ("seed", -1)):
        optimizer.param_groups[0][name] = wrong
        with pytest.raises(ValueError, match=f"{name} must be"):
            optimizer.step()
        del optimizer.param_groups[0][name]
        assert optimizer.group_options == [{**DEFAULTS, "master_weight_bits": 32}]
    step(optimizer)


def test_what_is_not_adamw_is_refused():
    with pytest.raises(ValueError, match="decoupled_weight_decay=False"):
        AdamW([{"params": bf16_params(1), "decoupled_weight_decay": False}])


@pytest.mark.parametrize("saved", ["[1]", "null", '"x"', '{"foo": 1}', "cautious", '{"decay_lr": 0}'])
def test_a_saved_decay_that_is_none_is_refused(saved):
    optimizer = AdamW(bf16_params(), lr=0.5)
    state_dict = optimizer.state_dict()
    state_dict["param_groups"][0].update(decoupled_weight_decay=saved, lr=0.25)
    with pytest.raises(ValueError, match=r"decoupled_weight_decay|decouple_lr=True"):
        optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] == 0.5 and optimizer.group_options == [DEFAULTS]


def copies(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    buffer.seek(0)
    return {
        "copy": copy.copy(optimizer),
        "deepcopy": copy.deepcopy(optimizer),
        "pickle": pickle.loads(pickle.dumps(optimizer)),
        "torch.save": torch.load(buffer, weights_only=False),
    }


@pytest.mark.fast
def test_copies_have_the_options(path):
    optimizer = AdamW([{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(bf16_params())], **ALL)
    step(optimizer)
    for name, twin in copies(optimizer).items():
        assert twin.group_options == optimizer.group_options, name
        if name == "copy":  # which shares its groups
            twin.param_groups = [dict(group) for group in twin.param_groups]
        twin.param_groups[0]["seed"] = 5
        assert twin.group_options[0]["seed"] == 5 and optimizer.group_options[0]["seed"] == 7
        step(twin)


SAVED = {
    "neither": ({}, True),
    "cautious": ({"cautious": True}, '{"cautious": true}'),
    "decouple_lr": ({"decouple_lr": True}, '{"decay_lr": 0.3}'),
    "both": ({"cautious": True, "decouple_lr": True}, '{"cautious": true, "decay_lr": 0.3}'),
}


@pytest.mark.parametrize("name", SAVED)
def test_what_changes_results_is_saved_where_torch_has_room(name, path):
    options, saved = SAVED[name]
    params = [nn.Parameter(torch.randn(5, 3)) for _ in range(4)]
    source = AdamW(params[:1], lr=0.3, **options)
    step(source)
    source.param_groups[0]["lr"] = 0.03
    state_dict = json_copy(source.state_dict())
    assert state_dict["param_groups"][0]["decoupled_weight_decay"] == saved
    target = AdamW(params[1:2], lr=0.7)
    target.load_state_dict(copy.deepcopy(state_dict))
    keys = ("cautious", "decouple_lr", "decay_lr")
    assert [target.group_options[0][k] for k in keys] == [source.group_options[0][k] for k in keys]
    assert target.param_groups[0]["decoupled_weight_decay"] is True
    assert set(target.param_groups[0]) == set(torch_keys())

    theirs = torch.optim.AdamW(params[2:3])
    theirs.load_state_dict(copy.deepcopy(state_dict))
    assert theirs.param_groups[0]["decoupled_weight_decay"] is True
    step(theirs)
    again = AdamW(params[3:], lr=0.7, cautious=True)
    again.load_state_dict(theirs.state_dict())
    assert again.group_options[0]["cautious"] is True, "which torch's checkpoint says nothing about"
    step(again)


def json_copy(state_dict):
    """As a checkpoint that keeps groups as text has it; tuples become lists."""
    return {**state_dict, "param_groups": json.loads(json.dumps(state_dict["param_groups"]))}


def test_gradient_release_has_the_options(device, path):
    model = nn.Linear(128, 3).to(device)
    optimizer = AdamW([{"params": [p]} for p in model.parameters()], exp_avg_dtype="int8")
    register_gradient_release(model, optimizer)
    model(torch.ones(2, 128, device=device)).sum().backward()
    assert "exp_avg_codes" in optimizer.state[model.weight] and "exp_avg" in optimizer.state[model.bias]


def test_tools_that_write_all_options_to_groups_at_every_step(path):
    """As ZeroRedundancyOptimizer does, whose own groups keep the constructor's arguments."""
    optimizer = AdamW(bf16_params(), **ALL)
    for _ in range(3):
        optimizer.param_groups[0].update(ALL)
        step(optimizer)
        assert set(optimizer.param_groups[0]) == set(torch_keys())
    assert optimizer.group_options == [AS_JSON]


def test_many_groups_cost_what_each_of_them_costs(monkeypatch):
    """Building, and writing an option to all of them, handles each group once."""
    handled = []
    note = OptionsOfGroups._note
    monkeypatch.setattr(OptionsOfGroups, "_note", lambda self, *args: handled.append(1) or note(self, *args))
    optimizer = AdamW([{"params": [p]} for p in bf16_params(50)])
    assert len(handled) == 50
    for group in optimizer.param_groups:
        group["cautious"] = True
    assert all(options["cautious"] for options in optimizer.group_options) and len(handled) == 100
