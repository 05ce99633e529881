"""Gradient release takes the steps of a plain optimizer, one parameter at a time, and keeps no gradient.

The oracle is the same optimizer without release, on a copy of the model: every comparison is of bytes. That the plain
optimizer is right is shown elsewhere; one test here goes straight to torch.optim.AdamW.
"""

import copy
import gc
import itertools
import warnings
import weakref

import pytest
import torch
from helpers import bits
from pairs import CLOSE, OPTIONS, contents, differences, set_grads
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from weights import SHAPES, Released, Weights

from adamw_triton import AdamW, launch, register_gradient_release
from adamw_triton.storage.policies import BY_NAME, POLICIES


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_bitwise_equal_to_plain_stepping_in_every_storage(policy, device, path):
    pair = Released.of_weights(device, policy.param, grad_dtype=policy.grad, **policy.options)
    before = contents(pair.optimizer)
    for _ in range(3):
        pair.step()
    assert pair.counts() == [3.0] * len(SHAPES)
    assert before.keys() <= differences(before, contents(pair.optimizer))


def test_gradients_had_the_policys_dtype(device):
    """What the test above would not notice."""
    policy = BY_NAME["bf16-grad"]
    if not hasattr(torch.zeros(1, requires_grad=True), "grad_dtype"):
        pytest.skip("this torch refuses gradients of another dtype than their parameter's")
    model = Weights(device, policy.param, grad_dtype=policy.grad)
    model(model.random_grads()).backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["bf16-stochastic", "bf16-master24-8bit"])
def test_stochastic_rounding_has_noise_of_its_own_for_each_parameter(name, device, path):
    """Equal parameters with equal gradients part, as they do without release: each keeps its number."""
    policy = BY_NAME[name]
    options = {**policy.options, "stochastic_rounding": True, "seed": 3, "lr": 1e-3}
    pair = Released.of_weights(device, policy.param, shapes=[(1100,)] * 3, **options)
    for model in pair.models:
        for weight in model.weights:
            weight.data.copy_(model.weights[0].data)
    for _ in range(2):
        pair.step([pair.plain.random_grads()[0]] * 3)
    first, second, third = map(bits, pair.released.weights)
    assert not torch.equal(first, second) and not torch.equal(first, third) and not torch.equal(second, third)


@pytest.mark.fast
def test_against_torch(device, path):
    ours = nn.Sequential(nn.Linear(9, 40), nn.Tanh(), nn.Linear(40, 3)).to(device)
    theirs = copy.deepcopy(ours)
    optimizer = AdamW(ours.parameters(), **OPTIONS)
    handle = register_gradient_release(ours, optimizer)
    reference = torch.optim.AdamW(theirs.parameters(), foreach=False, **OPTIONS)
    inputs = torch.randn(6, 9, device=device)
    for _ in range(4):
        ours(inputs).square().mean().backward()
        reference.zero_grad()
        theirs(inputs).square().mean().backward()
        reference.step()
        # Gradients of parameters that are off by a rounding are off by some: Adam's sign-like first steps amplify that.
        torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), **CLOSE)
    handle.remove()


@pytest.mark.parametrize("capturable", [False, True])
def test_param_groups_with_options_of_their_own(capturable, device, path):
    groups = [
        {"params": [2], "lr": 0.3, "amsgrad": True},
        {"params": [0, 3], "weight_decay": 0.0, "maximize": True, "foreach": True, "betas": (0.5, 0.6)},
        {"params": [1], "lr": torch.tensor(0.05), "eps": 1e-3, "cautious": True, "foreach": False},
    ]
    pair = Released.of_weights(device, groups=groups, capturable=capturable, decouple_lr=True)
    for _ in range(3):
        pair.step()
        for optimizer in pair.optimizers:
            optimizer.param_groups[0]["lr"] *= 0.5
    assert [i for i, p in enumerate(pair.released.weights) if "max_exp_avg_sq" in pair.optimizer.state[p]] == [2]


# Skipping


@pytest.mark.parametrize("limit", ["not finite", "too large"])
def test_a_bad_gradient_skips_its_parameter_only(limit, device, path):
    """By its own norm. The oracle takes the same steps without that gradient."""
    pair = Released.of_weights(device)
    if limit == "not finite":
        pair.optimizer.skip_nonfinite = True
    else:
        pair.optimizer.skip_grad_norm_above = 80.0
    skipped = 0
    for which, bad in (([1], torch.nan), ([], 0), ([0, 3], torch.inf), ([2], 1e4)):
        which = which if limit == "too large" or bad != 1e4 else []
        grads = [g.clone() for g in pair.plain.random_grads()]
        for i in which:
            grads[i].view(-1)[-1] = bad
        pair.step_plain([None if i in which else g for i, g in enumerate(grads)])
        before = contents(pair.optimizer)
        pair.released(grads).backward()
        written = differences(before, contents(pair.optimizer)) & before.keys()
        assert {int(name.split()[-1]) for name in written} == set(range(len(SHAPES))) - set(which)
        assert all(p.grad is None for p in pair.released.parameters())
        skipped += len(which)
        assert int(pair.optimizer.skipped_steps) == skipped
    assert pair.counts() == [3.0, 3.0, 4.0 - (limit == "too large"), 3.0]
    pair.assert_same()


def test_options_of_the_whole_optimizer_may_change_between_steps(device, path):
    pair = Released.of_weights(device)
    pair.step()
    pair.optimizer.skip_grad_norm_above = 1e-6
    before = contents(pair.optimizer)
    pair.released(pair.released.random_grads()).backward()
    assert not differences(before, contents(pair.optimizer))
    assert int(pair.optimizer.skipped_steps) == len(SHAPES)
    pair.optimizer.skip_grad_norm_above = None
    pair.step()
    assert int(pair.optimizer.skipped_steps) == len(SHAPES)


def test_statistics_are_of_all_parameters_last_steps(device, path):
    """As the plain optimizer's, where all were stepped; those of a parameter that is skipped stay."""
    pair = Released.of_weights(device, statistics=True, skip_nonfinite=True)
    for _ in range(2):
        pair.step()
        for name in ("update_norm", "param_norm"):
            norms = [getattr(optimizer, name) for optimizer in pair.optimizers]
            assert norms[0] > 0
            torch.testing.assert_close(*norms, rtol=1e-6, atol=0)
    known = pair.optimizer.update_norm, pair.optimizer.param_norm
    pair.released([torch.full_like(g, torch.nan) for g in pair.released.random_grads()]).backward()
    assert (pair.optimizer.update_norm, pair.optimizer.param_norm) == known
    pair.handle.remove()


# Which parameters are stepped


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)

    def forward(self, tokens):
        return self.head(self.inner(self.inner(self.embedding(tokens))) * self.frozen).square().mean()


def test_tied_unused_and_frozen_parameters(device, path):
    pair = Released(lambda: Tied().to(device))
    tokens = torch.tensor([[1, 4, 4, 10, 0]], device=device)
    for _ in range(3):
        pair.step(tokens)
    model = pair.released
    assert float(pair.optimizer.state[model.head.weight]["step"]) == 3
    for untouched in (model.unused, model.frozen):
        assert not pair.optimizer.state.get(untouched)
        assert torch.equal(untouched, torch.ones_like(untouched))
    assert not model.frozen.requires_grad


def test_an_integer_parameter_is_left_alone(device, path):
    """The optimizer accepts it, as torch does; it never has a gradient."""
    model = nn.ParameterList([nn.Parameter(torch.ones(4, dtype=torch.int64, device=device), requires_grad=False)])
    model.append(nn.Parameter(torch.ones(4, device=device)))
    optimizer = AdamW(model.parameters(), **OPTIONS)
    handle = register_gradient_release(model, optimizer)
    model[1].sum().backward()
    assert model[1].grad is None and (model[1] < 1).all()
    assert torch.equal(model[0], torch.ones_like(model[0])) and not optimizer.state.get(model[0])
    handle.remove()


def test_one_parameter_in_two_groups_is_stepped_once_in_its_first(device, path):
    """torch refuses such groups, but loading or editing them can bring that about."""
    pair = Released.of_weights(device, groups=[{"params": [0, 1, 2]}, {"params": [3], "lr": 0.5}], register=False)
    for model, optimizer in zip(pair.models, pair.optimizers, strict=True):
        optimizer.param_groups[1]["params"].append(model.weights[0])
    pair.handle = register_gradient_release(pair.released, pair.optimizer)
    for _ in range(2):
        pair.step()


def test_parameters_reached_only_sometimes(device, path):
    pair = Released.of_weights(device)
    for missing in (0, 2, None, 3):
        pair.step([None if i == missing else g for i, g in enumerate(pair.plain.random_grads())])
    assert pair.counts() == [3.0, 4.0, 3.0, 3.0]


def test_only_some_of_the_models_parameters_are_the_optimizers(device, path):
    pair = Released.of_weights(device, groups=[{"params": [1]}])
    model = pair.released
    before, grads = list(map(bits, model.weights)), model.random_grads()
    model(grads).backward()
    assert [w.grad is None for w in model.weights] == [False, True, False, False]
    changed = [not torch.equal(old, bits(w)) for old, w in zip(before, model.weights, strict=True)]
    assert changed == [False, True, False, False]
    assert torch.equal(model.weights[0].grad, grads[0])
    model.guard.assert_untouched()


def test_frozen_and_unfrozen_after_registration(device, path):
    pair = Released(lambda: Weights(device), register=False)
    for freezes in range(4):  # one, which another registration finds frozen, another, none
        for model in pair.models:
            for i, weight in enumerate(model.weights):
                weight.requires_grad_(i != freezes)
        pair.handle = pair.handle or register_gradient_release(pair.released, pair.optimizer)
        pair.step()
    assert pair.counts() == [3.0] * 4


# Memory and lifetime


class GradientMemory:
    """Bytes of parameters' gradients that exist, during a backward pass.

    A hook of each parameter sees its gradient when the backward pass has made it, before it is accumulated, and others
    see what `.grad` holds afterwards; each notes the memory behind it, with references that do not keep that alive (a
    tensor is a handle: its memory can live on without it). At each of these moments, and wherever a gradient of an
    activation arrives, what is still alive is summed: memory of a gradient counts until the allocator has it back,
    whoever holds on to it.

    Args:
        collect: look for garbage cycles first. Triton's interpreter leaves some behind that hold a launch's arguments;
            compiled kernels and the reference must do without.
    """

    def __init__(self, *, collect):
        self.collect = collect
        self.memory = {}  # by address of the storage's own record: reference, bytes
        self.most = 0

    def note(self, grad):
        storage = grad.untyped_storage()
        reference = StorageWeakRef(storage)
        self.memory[reference.cdata] = reference, storage.nbytes()
        del storage
        self.look()

    def look(self):
        self.most = max(self.most, self.alive())

    def alive(self):
        if self.collect:
            gc.collect()
        return sum(size for reference, size in self.memory.values() if not reference.expired())

    def hook_before_release(self, model):
        for param in model.parameters():
            param.register_hook(self.note)
            param.register_post_accumulate_grad_hook(lambda param: self.note(param.grad))

    def hook_after_release(self, model):
        for param in model.parameters():
            param.register_post_accumulate_grad_hook(self.after)
        for module in model.modules():
            module.register_full_backward_hook(lambda *_: self.look())

    def after(self, param):
        if param.grad is not None:
            self.note(param.grad)
        self.look()


@pytest.mark.parametrize("release", [True, False])
def test_at_most_two_gradients_are_alive(release, device, path):
    """Without release all are, which shows that they are seen."""
    widths = [20, 33, 40, 27, 40, 31, 40, 24]
    model = nn.Sequential(*(nn.Sequential(nn.Linear(n, m), nn.Tanh()) for n, m in itertools.pairwise(widths)))
    model.to(device)
    optimizer = AdamW(model.parameters(), **OPTIONS)
    memory = GradientMemory(collect=launch.INTERPRETED and path == "kernel")
    memory.hook_before_release(model)
    handle = register_gradient_release(model, optimizer) if release else None
    memory.hook_after_release(model)
    sizes = sorted(p.numel() * p.element_size() for p in model.parameters())
    inputs = torch.randn(5, 20, device=device).requires_grad_()  # or hooks of the first module would warn
    gc.disable()  # memory that only the collector would free is memory in use
    try:
        for _ in range(2):
            memory.most = 0
            model(inputs).square().mean().backward()
            if handle is None:
                assert memory.alive() == memory.most == sum(sizes)
                optimizer.step()
                optimizer.zero_grad()
            else:
                assert sizes[-1] <= memory.most <= sum(sizes[-2:]) < sum(sizes) / 3
            assert memory.alive() == 0
            assert len(memory.memory) >= 1
    finally:
        gc.enable()


def test_the_handle_need_not_be_kept(device):
    pair = Released.of_weights(device)
    pair.handle = None
    gc.collect()
    pair.step()


def test_it_ends_with_the_optimizer(device):
    """Which the hooks do not keep alive; the model trains on with another one."""
    pair = Released.of_weights(device)
    pair.step()
    alive = weakref.ref(pair.optimizer)
    del pair.optimizers[1]
    gc.collect()
    assert alive() is None
    pair.released(pair.released.random_grads()).backward()
    assert all(p.grad is not None for p in pair.released.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in pair.released.parameters())


def test_a_clone_of_the_optimizer_is_a_plain_one(device):
    pair = Released.of_weights(device)
    pair.step()
    model, optimizer = copy.deepcopy((pair.released, pair.optimizer))
    set_grads(model.weights, model.random_grads())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        optimizer.step()
    assert {float(optimizer.state[p]["step"]) for p in model.weights} == {2.0}
    assert all(p.grad is not None for p in model.weights)
    pair.assert_same()
