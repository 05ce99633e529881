"""Gradient release takes the steps of a plain optimizer, one parameter at a time, and keeps no gradient.

The oracle is the same optimizer without release, on a copy of the model: every comparison is of bytes. That the plain
optimizer is right is shown elsewhere; one test here goes straight to torch.optim.AdamW.
"""

import copy
import gc
import itertools
import warnings
from collections import defaultdict

import pytest
import torch
from helpers import Guarded, bits
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.lr_scheduler import LambdaLR

from adamw_triton import AdamW, launch, register_gradient_release
from bench.policies import BY_NAME, POLICIES

OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}
# Two blocks of a kernel and two groups of an 8-bit moment, a tail of one, few, one element without dimensions.
SHAPES = [(33, 41), (129,), (7, 1), ()]
OFFSETS = [0, 1, 0, 3]  # elements off a 16-byte boundary


class Weights(nn.Module):
    """Parameters whose gradients are what forward is given: they lie between borders that nobody may write to."""

    def __init__(self, device, dtype=torch.float32, shapes=SHAPES, grad_dtype=None):
        super().__init__()
        self.guard = Guarded()
        values = [torch.randn(shape).to(device, dtype) for shape in shapes]
        offsets = (OFFSETS * len(shapes))[: len(shapes)]
        self.weights = nn.ParameterList(
            nn.Parameter(self.guard.place(v, o)) for v, o in zip(values, offsets, strict=True)
        )
        for weight in self.weights:
            if grad_dtype not in (None, dtype):
                weight.grad_dtype = grad_dtype

    def forward(self, grads):
        terms = [(w * g).sum() for w, g in zip(self.weights, grads, strict=True) if g is not None]
        return torch.stack(terms).sum()


def twins(device, dtype=torch.float32, groups=None, shapes=SHAPES, grad_dtype=None, **options):
    """(model, optimizer) twice, and a handle: the second has gradient release."""
    pairs = []
    for _ in range(2):
        torch.manual_seed(5)
        model = Weights(device, dtype, shapes, grad_dtype)
        params = list(model.weights)
        if groups is not None:
            params = [{**group, "params": [params[i] for i in group["params"]]} for group in groups]
        pairs.append((model, AdamW(params, **{**OPTIONS, **options})))
    return *pairs, register_gradient_release(*pairs[1])


def random_grads(model):
    return [torch.randn(w.shape).to(w.device, w.dtype) for w in model.weights]


def step_both(plain, released, grads):
    model, optimizer = plain
    model(grads).backward()
    optimizer.step()
    optimizer.zero_grad()
    released[0](grads).backward()
    assert all(p.grad is None for p in released[0].parameters())


def assert_same(plain, released):
    """Parameters, state and the memory around them, to the bit."""
    for (model, optimizer), (other, other_optimizer) in ((plain, released), (released, plain)):
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(bits(p), bits(q))
            mine, theirs = optimizer.state.get(p, {}), other_optimizer.state.get(q, {})
            assert mine.keys() == theirs.keys()
            for name in mine:
                assert mine[name].dtype == theirs[name].dtype and mine[name].shape == theirs[name].shape, name
                assert torch.equal(bits(mine[name]), bits(theirs[name])), name
        if isinstance(model, Weights):
            model.guard.assert_untouched()


def snapshot(tensors):
    return list(map(bits, tensors))


def counts(pair):
    return [float(pair[1].state[p]["step"]) if pair[1].state.get(p) else None for p in pair[0].parameters()]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_bitwise_equal_to_plain_stepping_in_every_storage(policy, device, path):
    plain, released, _ = twins(device, policy.param, grad_dtype=policy.grad, **policy.options)
    before = [p.detach().clone() for p in released[0].parameters()]
    for _ in range(3):
        step_both(plain, released, random_grads(plain[0]))
        assert_same(plain, released)
    assert counts(released) == [3.0] * len(SHAPES)
    assert not any(map(torch.equal, before, released[0].parameters()))


def test_gradients_had_the_policys_dtype(device):
    """What the test above would not notice."""
    policy = BY_NAME["bf16-grad"]
    if not hasattr(torch.zeros(1, requires_grad=True), "grad_dtype"):
        pytest.skip("this torch refuses gradients of another dtype than their parameter's")
    model = Weights(device, policy.param, grad_dtype=policy.grad)
    model(random_grads(model)).backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["bf16-stochastic", "bf16-master24-8bit"])
def test_stochastic_rounding_has_noise_of_its_own_for_each_parameter(name, device, path):
    """Equal parameters with equal gradients part, as they do without release: each keeps its number."""
    policy = BY_NAME[name]
    options = {**policy.options, "stochastic_rounding": True, "seed": 3, "lr": 1e-3}
    plain, released, _ = twins(device, policy.param, shapes=[(1100,)] * 3, **options)
    for model, _ in (plain, released):
        for weight in model.weights:
            weight.data.copy_(model.weights[0].data)
    for _ in range(2):
        step_both(plain, released, [random_grads(plain[0])[0]] * 3)
        assert_same(plain, released)
    first, second, third = (bits(w) for w in released[0].weights)
    assert not torch.equal(first, second) and not torch.equal(first, third) and not torch.equal(second, third)


def test_against_torch(device, path):
    torch.manual_seed(7)
    ours = nn.Sequential(nn.Linear(9, 40), nn.Tanh(), nn.Linear(40, 3)).to(device)
    theirs = copy.deepcopy(ours)
    register_gradient_release(ours, AdamW(ours.parameters(), **OPTIONS))
    reference = torch.optim.AdamW(theirs.parameters(), foreach=False, **OPTIONS)
    inputs = torch.randn(6, 9, device=device)
    for _ in range(4):
        ours(inputs).square().mean().backward()
        reference.zero_grad()
        theirs(inputs).square().mean().backward()
        reference.step()
        # Gradients of parameters that are off by a rounding are off by some: Adam's sign-like first steps amplify that.
        torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), rtol=3e-6, atol=3e-7)


@pytest.mark.parametrize("capturable", [False, True])
def test_param_groups_with_options_of_their_own(capturable, device, path):
    groups = [
        {"params": [2], "lr": 0.3, "amsgrad": True},
        {"params": [0, 3], "weight_decay": 0.0, "maximize": True, "foreach": True, "betas": (0.5, 0.6)},
        {"params": [1], "lr": torch.tensor(0.05), "eps": 1e-3, "cautious": True, "foreach": False},
    ]
    plain, released, _ = twins(device, groups=groups, capturable=capturable)
    for _ in range(3):
        step_both(plain, released, random_grads(plain[0]))
        assert_same(plain, released)
    on_device = {released[1].state[p]["step"].device for p in released[0].parameters()}
    assert on_device == {device if capturable else torch.device("cpu")}
    assert "max_exp_avg_sq" in released[1].state[released[0].weights[2]]
    assert "max_exp_avg_sq" not in released[1].state[released[0].weights[0]]


def test_decoupled_learning_rate(device, path):
    plain, released, _ = twins(device, decouple_lr=True)
    for factor in (1.0, 0.5, 0.1):
        for _, optimizer in (plain, released):
            optimizer.param_groups[0]["lr"] = factor * OPTIONS["lr"]
        step_both(plain, released, random_grads(plain[0]))
        assert_same(plain, released)


# Skipping


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_bad_gradient_skips_its_parameter_only(capturable, bad, device, path):
    """The oracle takes the same steps without that gradient."""
    plain, released, _ = twins(device, skip_nonfinite=True, capturable=capturable)
    skipped = 0
    for which in ([1], [], [0, 3]):
        grads = random_grads(plain[0])
        good = list(grads)
        for i in which:
            grads[i] = grads[i].clone()
            grads[i].view(-1)[-1] = bad
            good[i] = None
        plain[0](good).backward()
        plain[1].step()
        plain[1].zero_grad()
        before = {i: snapshot([released[0].weights[i]]) for i in which}
        for i in which:
            entries = released[1].state.get(released[0].weights[i], {})
            before[i] += snapshot(value for _, value in sorted(entries.items()))
        released[0](grads).backward()
        for i in which:
            entries = released[1].state[released[0].weights[i]]
            after = snapshot([released[0].weights[i], *(value for _, value in sorted(entries.items()))])
            assert len(before[i]) == 1 or all(map(torch.equal, before[i], after))
            assert torch.equal(before[i][0], after[0])
        assert all(p.grad is None for p in released[0].parameters())
        skipped += len(which)
        assert int(released[1].skipped_steps) == skipped
    assert counts(released) == counts(plain) == [2.0, 2.0, 3.0, 2.0]
    assert_same(plain, released)


def test_a_large_gradient_skips_its_parameter_only(device, path):
    limit = 20.0
    plain, released, _ = twins(device, skip_grad_norm_above=limit)
    skipped = 0
    for scales in ([0.5, 1.0, 1.0, 1.0], [0.5, 5.0, 1.0, 1e4], [0.5, 1.0, 50.0, 1.0]):
        grads = [g * s for g, s in zip(random_grads(plain[0]), scales, strict=True)]
        norms = [g.double().norm().item() for g in grads]  # per parameter, in float64
        assert all(abs(norm - limit) > 1e-3 for norm in norms)
        below = [g if norm <= limit else None for g, norm in zip(grads, norms, strict=True)]
        assert sum(n * n for n in norms) > limit**2 and sum(g is not None for g in below) >= 2
        plain[1].skip_grad_norm_above = 1e9  # that of all of these together is above the limit
        plain[0](below).backward()
        plain[1].step()
        plain[1].zero_grad()
        released[0](grads).backward()
        skipped += sum(g is None for g in below)
        assert int(released[1].skipped_steps) == skipped
    assert counts(released) == counts(plain) == [3.0, 2.0, 2.0, 2.0]
    assert int(plain[1].skipped_steps) == 0
    assert_same(plain, released)


def test_options_of_the_whole_optimizer_may_change_between_steps(device, path):
    plain, released, _ = twins(device)
    step_both(plain, released, random_grads(plain[0]))
    released[1].skip_grad_norm_above = 1e-6
    before = snapshot(released[0].parameters())
    released[0](random_grads(released[0])).backward()
    assert all(map(torch.equal, before, map(bits, released[0].parameters())))
    assert int(released[1].skipped_steps) == len(SHAPES)
    released[1].skip_grad_norm_above = None
    step_both(plain, released, random_grads(plain[0]))
    assert_same(plain, released)
    assert int(released[1].skipped_steps) == len(SHAPES)


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
    pairs = []
    for _ in range(2):
        torch.manual_seed(2)
        model = Tied().to(device)
        pairs.append((model, AdamW(model.parameters(), **OPTIONS)))
    register_gradient_release(*pairs[1])
    tokens = torch.tensor([[1, 4, 4, 10, 0]], device=device)
    for _ in range(3):
        step_both(*pairs, tokens)
        assert_same(*pairs)
    model, optimizer = pairs[1]
    assert float(optimizer.state[model.head.weight]["step"]) == 3
    for untouched in (model.unused, model.frozen):
        assert not optimizer.state.get(untouched)
        assert torch.equal(untouched, torch.ones_like(untouched))


def test_one_parameter_in_two_groups_is_stepped_once_in_its_first(device, path):
    """torch refuses such groups, but loading or editing them can bring that about."""
    plain, released, handle = twins(device, groups=[{"params": [0, 1, 2]}, {"params": [3], "lr": 0.5}])
    handle.remove()
    for model, optimizer in (plain, released):
        optimizer.param_groups[1]["params"].append(model.weights[0])
    register_gradient_release(*released)
    for _ in range(2):
        step_both(plain, released, random_grads(plain[0]))
    assert_same(plain, released)


def test_parameters_reached_only_sometimes(device, path):
    plain, released, _ = twins(device)
    for missing in (0, 2, None, 3):
        grads = random_grads(plain[0])
        if missing is not None:
            grads[missing] = None
        step_both(plain, released, grads)
        assert_same(plain, released)
    assert counts(released) == [3.0, 4.0, 3.0, 3.0]


def test_only_some_of_the_models_parameters_are_the_optimizers(device, path):
    torch.manual_seed(5)
    model = Weights(device)
    optimizer = AdamW([model.weights[1]], **OPTIONS)
    register_gradient_release(model, optimizer)
    grads = random_grads(model)
    before = snapshot(model.weights)
    model(grads).backward()
    assert [w.grad is None for w in model.weights] == [False, True, False, False]
    changed = [not torch.equal(old, bits(w)) for old, w in zip(before, model.weights, strict=True)]
    assert changed == [False, True, False, False]
    assert torch.equal(model.weights[0].grad, grads[0])
    model.guard.assert_untouched()


def test_a_parameter_unfrozen_after_registration(device):
    """It is stepped, or said not to be: its gradients must not pile up in silence."""
    torch.manual_seed(5)
    model = Weights(device)
    model.weights[1].requires_grad_(False)
    optimizer = AdamW(model.weights, **OPTIONS)
    register_gradient_release(model, optimizer)
    grads = random_grads(model)
    model(grads).backward()
    assert not optimizer.state.get(model.weights[1])
    before = bits(model.weights[1]).clone()
    model.weights[1].requires_grad_(True)
    try:
        model(grads).backward()
    except RuntimeError:
        return
    assert model.weights[1].grad is None
    assert not torch.equal(before, bits(model.weights[1]))
    assert counts((model, optimizer)) == [2.0, 1.0, 2.0, 2.0]


def test_a_parameter_frozen_after_registration(device, path):
    plain, released, _ = twins(device)
    for frozen in (False, True, False):
        for model, _ in (plain, released):
            model.weights[0].requires_grad_(not frozen)
        step_both(plain, released, random_grads(plain[0]))
        assert_same(plain, released)
    assert counts(released) == [2.0, 3.0, 3.0, 3.0]


# Accumulation, and methods that do nothing


def test_accumulation(device, path):
    plain, released, handle = twins(device, torch.bfloat16)
    for n in (3, 1, 2):
        batches = [random_grads(plain[0]) for _ in range(n)]
        for grads in batches:
            plain[0](grads).backward()
        plain[1].step()
        plain[1].zero_grad()
        before = snapshot(released[0].parameters())
        with handle.accumulate():
            for i, grads in enumerate(batches[:-1]):
                with handle.accumulate():  # one within the other ends nothing
                    released[0](grads).backward()
                assert all(torch.equal(w.grad, g) or i for w, g in zip(released[0].weights, grads, strict=True))
        assert all(map(torch.equal, before, map(bits, released[0].parameters())))
        released[0](batches[-1]).backward()
        assert all(p.grad is None for p in released[0].parameters())
        assert_same(plain, released)
    assert counts(released) == [3.0] * len(SHAPES)


def test_accumulation_ends_with_an_exception(device):
    _, released, handle = twins(device)
    with pytest.raises(KeyError), handle.accumulate():
        raise KeyError
    released[0](random_grads(released[0])).backward()
    assert counts(released) == [1.0] * len(SHAPES)


def test_step_and_zero_grad_do_nothing_and_say_so_once(device):
    plain, released, handle = twins(device)
    model, optimizer = released
    step_both(plain, released, random_grads(plain[0]))
    with handle.accumulate():
        model(random_grads(model)).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    with pytest.warns(UserWarning, match=r"optimizer\.step\(\) does nothing") as said:
        assert optimizer.step() is None
    assert len(said) == 1
    with pytest.warns(UserWarning, match=r"optimizer\.zero_grad\(\) does nothing") as said:
        optimizer.zero_grad()
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for set_to_none in (True, False):
            assert optimizer.step() is None
            optimizer.zero_grad(set_to_none=set_to_none)
    assert_same(plain, released)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))


def test_the_warnings_point_at_the_caller(device):
    _, released, _ = twins(device)
    for method in (released[1].zero_grad, released[1].step):
        with pytest.warns(UserWarning) as said:
            method()
        assert said[0].filename == __file__, method.__name__


def test_a_closure_runs_and_its_loss_is_returned(device, path):
    plain, released, _ = twins(device)
    losses = []
    for pair, category in ((plain, ()), (released, UserWarning)):
        model, optimizer = pair
        torch.manual_seed(3)
        grads, calls = random_grads(model), []

        def closure(model=model, optimizer=optimizer, grads=grads, calls=calls):
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = model(grads)
            loss.backward()
            return loss.detach()

        if category:
            with pytest.warns(category, match="does nothing"):
                losses.append(optimizer.step(closure))
        else:
            losses.append(optimizer.step(closure))
            optimizer.zero_grad()
        assert calls == [True]
    assert torch.equal(*losses)
    assert_same(plain, released)


# Memory


def mlp(device, widths):
    layers = [nn.Sequential(nn.Linear(n, m), nn.Tanh()) for n, m in itertools.pairwise(widths)]
    return nn.Sequential(*layers).to(device)


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_at_most_two_gradients_are_alive(dtype, release, device, path):
    """Without release all are, which shows that they are seen."""
    widths = [20, 33, 40, 27, 40, 31, 40, 24]
    model = mlp(device, widths).to(dtype)
    optimizer = AdamW(model.parameters(), **OPTIONS)
    memory = GradientMemory(collect=launch.INTERPRETED and path == "kernel")
    memory.hook_before_release(model)
    if release:
        register_gradient_release(model, optimizer)
    memory.hook_after_release(model)
    sizes = sorted(p.numel() * p.element_size() for p in model.parameters())
    inputs = torch.randn(5, 20, device=device).to(dtype).requires_grad_()  # or hooks of the first module would warn
    gc.disable()  # memory that only the collector would free is memory in use
    gc.freeze()  # collecting what there is now would take long
    try:
        for _ in range(2):
            memory.most = 0
            model(inputs).square().mean().backward()
            if not release:
                assert memory.alive() == memory.most == sum(sizes)
                optimizer.step()
                optimizer.zero_grad()
            else:
                assert sizes[-1] <= memory.most <= sum(sizes[-2:]) < sum(sizes) / 3
            assert memory.alive() == 0
            assert len(memory.memory) >= 1
    finally:
        gc.unfreeze()
        gc.enable()


# What may change between steps


def test_remove_goes_back_to_plain_stepping(device, path):
    plain, released, handle = twins(device)
    model, optimizer = released

    def step_plainly():
        grads = random_grads(model)
        for each, its_optimizer in (plain, released):
            each(grads).backward()
            assert all(p.grad is not None for p in each.parameters())
            its_optimizer.step()
            its_optimizer.zero_grad()
            assert all(p.grad is None for p in each.parameters())
        assert_same(plain, released)

    step_both(plain, released, random_grads(model))
    handle.remove()
    for _ in range(2):
        step_plainly()
    handle.remove()  # once more changes nothing
    again = register_gradient_release(model, optimizer)
    handle.remove()  # nor does the old one's, later
    for _ in range(2):
        step_both(plain, released, random_grads(model))
        assert_same(plain, released)
    again.remove()
    step_plainly()
    assert counts(released) == [6.0] * len(SHAPES)


def test_registered_after_plain_steps(device, path):
    plain, released, handle = twins(device, BY_NAME["bf16-master32"].param, **BY_NAME["bf16-master32"].options)
    handle.remove()
    grads = random_grads(plain[0])
    for model, optimizer in (plain, released):
        model(grads).backward()
        optimizer.step()
        optimizer.zero_grad()
    register_gradient_release(*released)
    step_both(plain, released, random_grads(plain[0]))
    assert_same(plain, released)


def test_options_changed_between_steps(device, path):
    plain, released, _ = twins(device, groups=[{"params": [0, 1]}, {"params": [2, 3]}])
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
        for _, optimizer in (plain, released):
            optimizer.param_groups[1].update(change)
        step_both(plain, released, random_grads(plain[0]))
        assert_same(plain, released)
    entries = released[1].state[released[0].weights[2]]
    assert "max_exp_avg_sq" in entries and entries["exp_avg"].dtype == torch.bfloat16
    assert "max_exp_avg_sq" not in released[1].state[released[0].weights[0]]


@pytest.mark.parametrize("capturable", [False, True])
def test_a_learning_rate_that_changes_in_place(capturable, device, path):
    lr = torch.tensor(0.1, device=device if capturable else "cpu")
    plain, released, _ = twins(device, lr=lr, capturable=capturable)
    for value in (0.1, 0.2, 0.01):
        lr.fill_(value)
        step_both(plain, released, random_grads(plain[0]))
        assert_same(plain, released)


def test_a_scheduler_takes_effect_and_does_not_complain(device, path):
    """A training loop with release has no optimizer.step(): the scheduler must not ask for one."""
    plain, released, _ = twins(device, groups=[{"params": [0, 1]}, {"params": [2, 3], "lr": 0.5}])
    factors = [lambda epoch: 0.5**epoch, lambda epoch: 0.1 * epoch]
    schedulers = [LambdaLR(optimizer, factors) for _, optimizer in (plain, released)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(3):
            step_both(plain, released, random_grads(plain[0]))
            for scheduler in schedulers:
                scheduler.step()
            assert_same(plain, released)
    assert [group["lr"] for group in released[1].param_groups] == [0.125 * OPTIONS["lr"], pytest.approx(0.15)]


@pytest.mark.parametrize("name", ["fp32", "bf16-master24-8bit"])
def test_state_dict_in_the_middle(name, device, path):
    policy = BY_NAME[name]
    plain, released, _ = twins(device, policy.param, **policy.options)
    step_both(plain, released, random_grads(plain[0]))
    saved = [copy.deepcopy(optimizer.state_dict()) for _, optimizer in (plain, released)]
    for _ in range(2):
        step_both(plain, released, random_grads(plain[0]))
    for (_, optimizer), checkpoint in zip((plain, released), saved, strict=True):
        optimizer.load_state_dict(checkpoint)
    assert counts(released) == [1.0] * len(SHAPES)
    for _ in range(2):
        step_both(plain, released, random_grads(plain[0]))
        assert_same(plain, released)
    assert counts(released) == [3.0] * len(SHAPES)


def test_options_of_a_loaded_state_dict_take_effect_and_can_be_changed(device, path):
    """Loading replaces the dicts of the param groups."""
    plain, released, _ = twins(device)
    step_both(plain, released, random_grads(plain[0]))
    for _, optimizer in (plain, released):
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0].update(lr=0.5, maximize=True)
        optimizer.load_state_dict(saved)
    step_both(plain, released, random_grads(plain[0]))
    assert_same(plain, released)
    for _, optimizer in (plain, released):
        optimizer.param_groups[0]["lr"] = 1e-3
    step_both(plain, released, random_grads(plain[0]))
    assert_same(plain, released)


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
    plain, released, _ = twins(
        device, torch.bfloat16 if bf16 else torch.float32, master_weight_bits=32 if bf16 else None
    )
    for _ in range(2):
        step_both(plain, released, random_grads(plain[0]))
    unchanged = copy.deepcopy(plain[0])
    for pair in (plain, released):
        change(*pair)
    for _ in range(2):
        step_both(plain, released, random_grads(plain[0]))
        assert_same(plain, released)
    # The comparison is worth something: without the change they would not be there.
    assert not all(map(torch.equal, unchanged.weights, released[0].weights))


def test_a_clone_of_the_optimizer_is_a_plain_one(device):
    _, released, _ = twins(device)
    released[0](random_grads(released[0])).backward()
    model, optimizer = copy.deepcopy(released)
    before = snapshot(model.parameters())
    grads = random_grads(model)
    for weight, grad in zip(model.weights, grads, strict=True):
        weight.grad = grad
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        optimizer.step()
    assert not any(map(torch.equal, before, map(bits, model.parameters())))
    assert counts((model, optimizer)) == [2.0] * len(SHAPES)
    assert counts(released) == [1.0] * len(SHAPES)


# Refusals


def assert_as_it_was(plain, candidate):
    """No hook is left, and plain steps go on as if nobody had asked."""
    model = candidate[0]
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    before = snapshot(model.parameters())
    grads = random_grads(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for each, its_optimizer in (plain, candidate):
            each(grads).backward()
            assert all(p.grad is not None for p in each.parameters())
            if each is model:
                assert all(map(torch.equal, before, map(bits, each.parameters())))
            its_optimizer.step()
            its_optimizer.zero_grad()
    assert_same(plain, candidate)


@pytest.mark.parametrize(
    ("options", "cause"), [({"max_grad_norm": 1.0}, "max_grad_norm=1.0"), ({"fused": True}, "fused=True.*GradScaler")]
)
def test_what_needs_all_gradients_is_refused(options, cause, device):
    plain, candidate, handle = twins(device)
    handle.remove()
    for pair_index, (model, _) in enumerate((plain, candidate)):
        optimizer = AdamW(model.weights, **OPTIONS, **options)
        if pair_index:
            candidate = model, optimizer
        else:
            plain = model, optimizer
    with pytest.raises(ValueError, match=cause):
        register_gradient_release(*candidate)
    assert_as_it_was(plain, candidate)


def test_distributed_data_parallel_is_refused(device):
    plain, candidate, handle = twins(device)
    handle.remove()
    # Without a process group, which refusing does not need: its constructor asks for one.
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = candidate[0]
    assert len(list(wrapped.parameters())) == len(SHAPES)
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        register_gradient_release(wrapped, candidate[1])
    assert_as_it_was(plain, candidate)


def test_parameters_of_another_model_are_refused(device):
    plain, candidate, handle = twins(device)
    handle.remove()
    other = nn.ParameterList(list(candidate[0].weights)[1:])
    with pytest.raises(ValueError, match=r"1 of the optimizer's 4 parameters are not the model's"):
        register_gradient_release(other, candidate[1])
    assert_as_it_was(plain, candidate)


def test_a_second_registration_is_refused(device):
    plain, released, handle = twins(device)
    with pytest.raises(ValueError, match=r"already.*remove\(\)"):
        register_gradient_release(*released)
    for _ in range(2):
        step_both(plain, released, random_grads(plain[0]))
        assert_same(plain, released)
    assert counts(released) == [2.0] * len(SHAPES)  # one step each, not two
    handle.remove()
    assert_as_it_was(plain, released)


def test_a_scaler_that_comes_later_is_refused(device):
    """It announces itself to step(), by then too late to unscale."""
    _, released, _ = twins(device)
    for name in ("grad_scale", "found_inf"):
        setattr(released[1], name, torch.ones((), device=device))
        with pytest.raises(RuntimeError, match="GradScaler"):
            released[1].step()
        delattr(released[1], name)


def test_max_grad_norm_set_after_registration_is_refused(device, path):
    """Clipping each parameter by its own norm would be another thing than the option says."""
    _, released, _ = twins(device)
    model, optimizer = released
    model(random_grads(model)).backward()
    before = snapshot(t for p in model.weights for t in (p, *optimizer.state[p].values()))
    with pytest.raises((ValueError, RuntimeError), match="max_grad_norm"):  # by the assignment, or at the next step
        optimizer.max_grad_norm = 0.1
        model(random_grads(model)).backward()
    after = [bits(t) for p in model.weights for t in (p, *optimizer.state[p].values())]
    assert all(map(torch.equal, before, after))


def test_a_param_group_added_after_registration_is_stepped_or_refused(device, path):
    plain, released, handle = twins(device, groups=[{"params": [0, 1, 2]}])
    step_both(plain, released, [*random_grads(plain[0])[:3], None])
    for model, optimizer in (plain, released):
        group = {"params": [model.weights[3]], "lr": 0.5}
        if optimizer is plain[1]:
            optimizer.add_param_group(group)
            continue
        try:
            optimizer.add_param_group(group)
        except (ValueError, RuntimeError) as error:
            assert "gradient release" in str(error)
            assert len(optimizer.param_groups) == 1
            handle.remove()
            optimizer.add_param_group(group)
            register_gradient_release(model, optimizer)
    for _ in range(2):
        step_both(plain, released, random_grads(plain[0]))
        assert_same(plain, released)
    assert counts(released) == [3.0, 3.0, 3.0, 2.0]
