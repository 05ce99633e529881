"""A float16 parameter that is written from outside takes its float32 master along; others keep theirs to the bit."""

import copy

import pytest
import torch
from helpers import bits
from torch import nn

from adamw_triton import AdamW

OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}
MOMENTS = ("exp_avg", "exp_avg_sq")


@pytest.fixture(params=[None, False], ids=["foreach=None", "foreach=False"])
def options(request):
    return {**OPTIONS, "foreach": request.param, "master_weight_bits": 32}


class Model(nn.Module):
    def __init__(self, device):
        super().__init__()
        self.weights = nn.ParameterList(
            torch.randn(shape, device=device).half() for shape in ((40, 30), (7,), (33, 33), (1100,))
        )


def give_grads(model):
    for p in model.weights:
        p.grad = torch.randn(p.shape, device=p.device).half()


def stepped(device, options):
    model = Model(device)
    optimizer = AdamW(model.parameters(), **options)
    for _ in range(2):
        give_grads(model)
        optimizer.step()
    for p in model.weights:  # or else there would be nothing to lose
        assert not torch.equal(optimizer.state[p]["master_param"], p.float())
    return model, optimizer


def masters_of(model, optimizer):
    return [optimizer.state[p]["master_param"].clone() for p in model.weights]


def assert_steps_from(masters, model, optimizer):
    """Two steps, against torch's in float32 from these masters and the same moments and counts."""
    weights = [nn.Parameter(master) for master in masters]
    reference = torch.optim.AdamW(weights, **OPTIONS, foreach=False)
    for p, q in zip(model.weights, weights, strict=True):
        reference.state[q] = {name: optimizer.state[p][name].clone() for name in (*MOMENTS, "step")}
    for _ in range(2):
        give_grads(model)
        for p, q in zip(model.weights, weights, strict=True):
            q.grad = p.grad.float()
        optimizer.step()
        reference.step()
        for p, q in zip(model.weights, weights, strict=True):
            master = optimizer.state[p]["master_param"]
            torch.testing.assert_close(master, q.detach(), rtol=2e-6, atol=2e-7)
            assert torch.equal(p, master.half())


def other_weights(model):
    """Of a model of which no element is the same."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p, q in zip(model.weights, other.weights, strict=True):
            q.copy_(torch.where(p.abs() < 1, p + 1.5, p * 0.25))
            assert (p != q).all()
    return other


def load(model, other, indices):
    state_dict = other.state_dict()
    kept = {name: state_dict[name] for i, name in enumerate(state_dict) if i in indices}
    model.load_state_dict(kept, strict=False)


def copy_values(model, other, indices):
    with torch.no_grad():
        for i in indices:
            model.weights[i].copy_(other.weights[i])


def copy_data(model, other, indices):
    """`.data` has a version counter of its own: nothing at the parameter tells."""
    for i in indices:
        model.weights[i].data.copy_(other.weights[i])


def repoint(model, other, indices):
    for i in indices:
        model.weights[i].data = other.weights[i].detach().clone()


WRITES = {"load_state_dict": load, "copy_": copy_values, ".data.copy_": copy_data, ".data =": repoint}
INDICES = {"all": (0, 1, 2, 3), "the first": (0,), "another": (2,)}


@pytest.mark.parametrize("indices", INDICES.values(), ids=INDICES.keys())
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_written_weights_are_what_the_next_step_starts_from(write, indices, device, options, path):
    model, optimizer = stepped(device, options)
    masters = masters_of(model, optimizer)
    other = other_weights(model)
    write(model, other, indices)
    for i in indices:
        masters[i] = other.weights[i].detach().float()
    assert_steps_from(masters, model, optimizer)


def test_unwritten_weights_keep_their_masters(device, options, path):
    """To the bit, as in a run where nothing was written."""
    model, optimizer = stepped(device, options)
    twin, twins = copy.deepcopy((model, optimizer))
    copy_values(model, other_weights(model), (1,))
    for _ in range(2):
        give_grads(model)
        for p, q in zip(model.weights, twin.weights, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        twins.step()
    same = [
        torch.equal(bits(optimizer.state[p]["master_param"]), bits(twins.state[q]["master_param"]))
        for p, q in zip(model.weights, twin.weights, strict=True)
    ]
    assert same == [True, False, True, True]


@pytest.mark.fast
def test_elements_written_in_place(device, options, path):
    model, optimizer = stepped(device, options)
    masters = masters_of(model, optimizer)
    other = other_weights(model)
    with torch.no_grad():
        model.weights[2][:5].copy_(other.weights[2][:5])
    give_grads(model)
    optimizer.step()
    moved = (optimizer.state[model.weights[2]]["master_param"] - other.weights[2].detach().float())[:5]
    assert moved.abs().max() < 0.1  # a few learning rates, where the old weights are 1 or so away
    rest = (optimizer.state[model.weights[2]]["master_param"] - masters[2])[5:]
    assert rest.abs().max() < 0.1


def resumed(model, optimizer, device, options, *, weights_first):
    """Model and optimizer from checkpoints of others."""
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    fresh = Model(device)
    again = AdamW(fresh.parameters(), **options)
    if weights_first:
        fresh.load_state_dict(weights)
    again.load_state_dict(state)
    if not weights_first:
        fresh.load_state_dict(weights)
    return fresh, again


@pytest.mark.parametrize("weights_first", [True, False], ids=["weights first", "state first"])
def test_a_resumed_run_keeps_its_masters(weights_first, device, options, path):
    model, optimizer = stepped(device, options)
    fresh, again = resumed(model, optimizer, device, options, weights_first=weights_first)
    for _ in range(2):
        give_grads(model)
        for p, q in zip(model.weights, fresh.weights, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        again.step()
    for p, q in zip(model.weights, fresh.weights, strict=True):
        assert torch.equal(bits(p), bits(q))
        assert torch.equal(bits(optimizer.state[p]["master_param"]), bits(again.state[q]["master_param"]))


@pytest.mark.parametrize("write", [load, copy_values], ids=["load_state_dict", "copy_"])
def test_weights_written_directly_after_loading_state(write, device, options, path):
    model, optimizer = stepped(device, options)
    fresh, again = resumed(model, optimizer, device, options, weights_first=True)
    masters = masters_of(fresh, again)
    other = other_weights(fresh)
    write(fresh, other, (0, 2))
    for i in (0, 2):
        masters[i] = other.weights[i].detach().float()
    assert_steps_from(masters, fresh, again)
