"""Gradient release next to everything else in a training loop: accumulation, schedules, checkpoints, edits, refusals.

The oracle is the same optimizer without release, to the bit.
"""

import copy
import warnings
from collections import defaultdict

import pytest
import torch
from helpers import bits
from pairs import OPTIONS, contents, differences, set_grads
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from weights import SHAPES, Released

from adamw_triton import AdamW, register_gradient_release
from adamw_triton.storage.policies import BY_NAME

# Accumulation, and step() next to it


def test_accumulation(device, path):
    pair = Released.of_weights(device, torch.bfloat16)
    for n in (3, 1, 2):
        batches = [pair.plain.random_grads() for _ in range(n)]
        for grads in batches:
            pair.plain(grads).backward()
        pair.optimizers[0].step()
        pair.optimizers[0].zero_grad()
        before = contents(pair.optimizer)
        with pair.handle.accumulate():
            for i, grads in enumerate(batches[:-1]):
                with pair.handle.accumulate():  # one within the other ends nothing
                    pair.released(grads).backward()
                assert all(torch.equal(w.grad, g) or i for w, g in zip(pair.released.weights, grads, strict=True))
        assert not differences(before, contents(pair.optimizer))
        pair.released(batches[-1]).backward()
        assert all(p.grad is None for p in pair.released.parameters())
        pair.assert_same()
    assert pair.counts() == [3.0] * len(SHAPES)


def test_accumulation_ends_with_an_exception(device):
    pair = Released.of_weights(device)
    with pytest.raises(KeyError), pair.handle.accumulate():
        raise KeyError
    pair.step()


def test_step_and_zero_grad_find_no_gradients(device, path):
    """A training loop may keep them, and nothing complains."""
    pair = Released.of_weights(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(2):
            pair.step()
            for set_to_none in (True, False):
                assert pair.optimizer.step() is None
                pair.optimizer.zero_grad(set_to_none=set_to_none)
            pair.assert_same()


@pytest.mark.parametrize("by", ["accumulation", "hand"])
def test_step_takes_gradients_that_are_there(by, device, path):
    pair = Released.of_weights(device)
    pair.step()
    for _ in range(2):
        grads = pair.plain.random_grads()
        pair.step_plain(grads)
        if by == "hand":
            set_grads(pair.released.weights, grads)
        else:
            with pair.handle.accumulate():
                pair.released(grads).backward()
        pair.optimizer.step()
        pair.optimizer.zero_grad()
        pair.assert_same()
    pair.step()
    assert pair.counts() == [4.0] * len(SHAPES)


def test_a_closure_runs_and_its_loss_is_returned(device, path):
    pair = Released.of_weights(device)
    grads, losses = pair.plain.random_grads(), []
    for model, optimizer in zip(pair.models, pair.optimizers, strict=True):

        def closure(model=model, optimizer=optimizer):
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = model(grads)
            loss.backward()
            return loss.detach()

        losses.append(optimizer.step(closure))
    pair.optimizers[0].zero_grad()
    assert torch.equal(*losses)
    pair.assert_same()


# What may change between steps


def test_remove_goes_back_to_plain_stepping(device, path):
    pair = Released.of_weights(device)

    def step_plainly():
        grads = pair.plain.random_grads()
        pair.step_plain(grads)
        pair.released(grads).backward()
        assert all(p.grad is not None for p in pair.released.parameters())
        pair.optimizer.step()
        pair.optimizer.zero_grad()
        pair.assert_same()

    pair.step()
    first = pair.handle
    first.remove()
    for _ in range(2):
        step_plainly()
    first.remove()  # once more changes nothing
    pair.handle = register_gradient_release(pair.released, pair.optimizer)
    first.remove()  # nor does the old one's, later
    for _ in range(2):
        pair.step()
    with pytest.raises(ValueError, match="already"):
        register_gradient_release(pair.released, pair.optimizer)
    pair.handle.remove()
    step_plainly()
    assert pair.counts() == [6.0] * len(SHAPES)


def test_registered_after_plain_steps(device, path):
    policy = BY_NAME["bf16-master32"]
    pair = Released.of_weights(device, policy.param, register=False, **policy.options)
    grads = pair.plain.random_grads()
    pair.step_plain(grads)
    pair.released(grads).backward()
    pair.optimizer.step()
    pair.optimizer.zero_grad()
    pair.handle = register_gradient_release(pair.released, pair.optimizer)
    pair.step()


def test_options_changed_between_steps(device, path):
    pair = Released.of_weights(device, groups=[{"params": [0, 1]}, {"params": [2, 3]}])
    changes = [
        {},
        {"lr": 0.2},
        {"weight_decay": 0.5, "betas": (0.5, 0.9)},
        {"eps": 1e-2, "maximize": True},
        {"amsgrad": True},
        {"lr": torch.tensor(0.05)},
        {"exp_avg_dtype": torch.bfloat16, "cautious": True},
    ]
    for change in changes:
        for optimizer in pair.optimizers:
            optimizer.param_groups[1].update(change)
        pair.step()
    entries = pair.optimizer.state[pair.released.weights[2]]
    assert "max_exp_avg_sq" in entries and entries["exp_avg"].dtype == torch.bfloat16
    assert "max_exp_avg_sq" not in pair.optimizer.state[pair.released.weights[0]]


@pytest.mark.parametrize("capturable", [False, True])
def test_a_learning_rate_that_changes_in_place(capturable, device, path):
    lr = torch.tensor(0.1, device=device if capturable else "cpu")
    pair = Released.of_weights(device, lr=lr, capturable=capturable)
    for value in (0.1, 0.2, 0.01):
        lr.fill_(value)
        pair.step()


def test_a_scheduler_takes_effect_and_does_not_complain(device, path):
    """A training loop with release has no optimizer.step(): the scheduler must not ask for one."""
    pair = Released.of_weights(device, groups=[{"params": [0, 1]}, {"params": [2, 3], "lr": 0.5}])
    factors = [lambda epoch: 0.5**epoch, lambda epoch: 0.1 * epoch]
    schedulers = [LambdaLR(optimizer, factors) for optimizer in pair.optimizers]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(3):
            pair.step()
            for scheduler in schedulers:
                scheduler.step()
    assert [group["lr"] for group in pair.optimizer.param_groups] == [0.125 * OPTIONS["lr"], pytest.approx(0.15)]


@pytest.mark.parametrize("name", ["fp32", "bf16-master24-8bit"])
def test_state_dict_in_the_middle(name, device, path):
    """Loading replaces the dicts of the param groups: options of the loaded ones count, and can be changed."""
    policy = BY_NAME[name]
    pair = Released.of_weights(device, policy.param, **policy.options)
    pair.step()
    saved = [copy.deepcopy(optimizer.state_dict()) for optimizer in pair.optimizers]
    for _ in range(2):
        pair.step()
    for optimizer, checkpoint in zip(pair.optimizers, saved, strict=True):
        checkpoint["param_groups"][0].update(lr=0.5, maximize=True)
        optimizer.load_state_dict(checkpoint)
    assert pair.counts() == [1.0] * len(SHAPES)
    pair.step()
    for optimizer in pair.optimizers:
        optimizer.param_groups[0]["lr"] = 1e-3
    pair.step()
    assert pair.counts() == [3.0] * len(SHAPES)


def replace_data(model, optimizer):
    for weight in model.weights:
        weight.data = weight.detach().clone().mul_(2)


def replace_entry(model, optimizer):
    optimizer.state[model.weights[0]]["exp_avg"] = torch.ones_like(model.weights[0])


def replace_step(model, optimizer):
    optimizer.state[model.weights[1]]["step"] = torch.tensor(40.0)


def write_step(model, optimizer):
    for weight in model.weights:
        optimizer.state[weight]["step"].fill_(100.0)


def repoint_moment(model, optimizer):
    for weight in model.weights:
        entry = optimizer.state[weight]["exp_avg"]
        entry.data = entry.clone().mul_(-1)


def clear_state(model, optimizer):
    optimizer.state.clear()


def replace_state(model, optimizer):
    state = {p: {name: value.clone() for name, value in entries.items()} for p, entries in optimizer.state.items()}
    state[model.weights[2]]["exp_avg_sq"].fill_(3.0)
    optimizer.state = defaultdict(dict, state)


def load_masters(model, optimizer):
    optimizer.load_master_params([value.mul(1.7) for value in optimizer.master_params()])


CHANGES = [replace_data, replace_entry, replace_step, write_step, repoint_moment, clear_state, replace_state]


@pytest.mark.parametrize("change", [*CHANGES, load_masters], ids=lambda change: change.__name__)
def test_data_or_state_replaced_between_steps_is_noticed(change, device, path):
    bf16 = change is load_masters
    pair = Released.of_weights(
        device, torch.bfloat16 if bf16 else torch.float32, master_weight_bits=32 if bf16 else None
    )
    for _ in range(2):
        pair.step()
    unchanged = copy.deepcopy((pair.plain, pair.optimizers[0]))
    for model, optimizer in zip(pair.models, pair.optimizers, strict=True):
        change(model, optimizer)
    for _ in range(2):
        pair.step()
    # The comparison is worth something: without the change they would not be there.
    assert not all(map(torch.equal, unchanged[0].weights, pair.released.weights))


def test_a_param_group_added_later_is_stepped_by_step(device, path):
    """Next to the release of the others."""
    pair = Released.of_weights(device, groups=[{"params": [0, 1, 2]}])
    pair.step([*pair.plain.random_grads()[:3], None])
    for model, optimizer in zip(pair.models, pair.optimizers, strict=True):
        optimizer.add_param_group({"params": [model.weights[3]], "lr": 0.5})
    for _ in range(2):
        grads = pair.plain.random_grads()
        pair.step_plain(grads)
        pair.released(grads).backward()
        assert [p.grad is None for p in pair.released.parameters()] == [True, True, True, False]
        pair.optimizer.step()
        pair.optimizer.zero_grad()
        pair.assert_same()
    assert pair.counts() == [3.0, 3.0, 3.0, 2.0]


# Refusals


def max_grad_norm(pair):
    pair.optimizer.max_grad_norm = 1.0
    return pair.released, pair.optimizer


def fused(pair):
    return pair.released, AdamW(pair.released.weights, fused=True)


def distributed_data_parallel(pair):
    # Without a process group, which refusing does not need: its constructor asks for one.
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = pair.released
    assert len(list(wrapped.parameters())) == len(SHAPES)
    return wrapped, pair.optimizer


def another_model(pair):
    return nn.ParameterList(list(pair.released.weights)[1:]), pair.optimizer


@pytest.mark.parametrize(
    ("what", "cause"),
    [
        (max_grad_norm, "max_grad_norm=1.0 needs the norm of all gradients"),
        (fused, "fused=True.*GradScaler"),
        (distributed_data_parallel, "DistributedDataParallel"),
        (another_model, "1 of the optimizer's 4 parameters are not the model's"),
    ],
)
def test_what_cannot_work_is_refused(what, cause, device):
    """No hook is left, and plain steps go on as if nobody had asked."""
    pair = Released.of_weights(device, register=False)
    with pytest.raises(ValueError, match=cause):
        register_gradient_release(*what(pair))
    pair.optimizer.max_grad_norm = None
    assert not any(p._post_accumulate_grad_hooks for p in pair.released.parameters())
    grads = pair.plain.random_grads()
    pair.step_plain(grads)
    pair.released(grads).backward()
    pair.optimizer.step()
    pair.assert_same()


def test_a_second_registration_is_refused(device):
    pair = Released.of_weights(device)
    with pytest.raises(ValueError, match=r"already.*remove\(\)"):
        register_gradient_release(pair.released, pair.optimizer)
    for _ in range(2):
        pair.step()
    assert pair.counts() == [2.0] * len(SHAPES)  # one step each, not two


def test_max_grad_norm_set_after_registration_is_refused_in_the_next_backward_pass(device, path):
    """Clipping each parameter by its own norm would be another thing than the option says."""
    pair = Released.of_weights(device)
    pair.step()
    before = contents(pair.optimizer)
    pair.optimizer.max_grad_norm = 0.1
    with pytest.raises(ValueError, match=r"max_grad_norm=0\.1"):
        pair.released(pair.released.random_grads()).backward()
    assert not differences(before, contents(pair.optimizer))
    pair.optimizer.max_grad_norm = None
    pair.optimizer.zero_grad()
    pair.step()


def test_a_refused_step_writes_nothing(device, path):
    """What step() would refuse, the backward pass does."""
    pair = Released.of_weights(device)
    pair.step()
    before = list(map(bits, pair.released.weights))
    pair.optimizer.param_groups[0]["betas"] = (1.5, 0.9)
    with pytest.raises(ValueError, match="beta"):
        pair.released(pair.released.random_grads()).backward()
    assert all(map(torch.equal, before, map(bits, pair.released.weights)))
    pair.optimizer.param_groups[0]["betas"] = OPTIONS["betas"]
    pair.optimizer.zero_grad()
    pair.step()
