"""torch.compile: a training step breaks its graph at optimizer.step(), and is compiled once.

The oracle is the same loop without torch.compile: the backends run the traced operations as they are, so that all
comparisons are of bytes.
"""

import warnings

import pytest
import torch
from helpers import bits
from pairs import OPTIONS, assert_same, contents, set_grads, twins
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.lr_scheduler import LambdaLR

from adamw_triton import AdamW, register_gradient_release
from adamw_triton.storage.policies import BY_NAME

N_STEPS = 6
# What torch itself says when it resumes after backward(), to a loss.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    def __init__(self, n=45):
        super().__init__()
        self.a, self.b = nn.Linear(5, n), nn.Linear(n, 3)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.b(self.a(x).tanh())


def build(device, dtype=torch.float32, **options):
    """A model, and an optimizer with two groups."""
    net = Net().to(device, dtype)
    groups = [{"params": list(net.a.parameters())}, {"params": [*net.b.parameters(), net.unused], "lr": 0.1}]
    return net, AdamW(groups, **{**OPTIONS, **options})


def inputs(device, dtype=torch.float32, n_steps=N_STEPS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 5, generator=generator).to(device, dtype) for _ in range(n_steps)]


def training_step(net, optimizer):
    def train(x):
        loss = net(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return train


def compare(pairs, xs, compiled, before_each=lambda i: None):
    """Take the same steps eagerly and compiled."""
    eager = training_step(*pairs[0])
    for i, x in enumerate(xs):
        before_each(i)
        assert torch.equal(bits(eager(x)), bits(compiled(x)))
        assert_same(pairs[0][1], pairs[1][1])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("scheduler", ["none", "before", "after compiling"])
def test_a_training_step_is_the_eager_one_and_compiled_once(scheduler, backend, device):
    """Both learning rates change at every step; one parameter has no gradient."""
    pairs = twins(lambda: build(device))
    counter = CompileCounterWithBackend(backend)
    schedulers = []

    def schedule():
        schedulers.extend(LambdaLR(optimizer, [lambda e: 0.9**e, lambda e: 0.8**e]) for _, optimizer in pairs)

    if scheduler == "before":
        schedule()
    compiled = torch.compile(training_step(*pairs[1]), backend=counter)
    if scheduler == "after compiling":
        schedule()
    seen = []

    def change_learning_rates(i):
        seen.append(counter.frame_count)
        if i and schedulers:
            for each in schedulers:
                each.step()
        elif i:
            for _, optimizer in pairs:
                for j, group in enumerate(optimizer.param_groups):
                    group["lr"] *= 0.9 + 0.05 * j

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # as of schedulers that have not seen optimizer.step()
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        compare(pairs, inputs(device), compiled, change_learning_rates)
    net, optimizer = pairs[1]
    assert [float(optimizer.state[p]["step"]) for p in net.parameters() if p is not net.unused] == [N_STEPS] * 4
    assert torch.equal(net.unused, torch.ones(3, device=device)) and not optimizer.state.get(net.unused)
    assert seen[1] > 0 and {*seen[3:], counter.frame_count} == {seen[2]}, seen


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fp32", {"max_grad_norm": 0.05, "skip_nonfinite": True, "statistics": True}),
        ("fp32", {"capturable": True, "amsgrad": True, "foreach": False}),
        ("fp32-8bit", {}),
        ("bf16-master24-8bit", {"stochastic_rounding": True, "seed": 3, "max_grad_norm": 0.05}),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_with_other_options(name, options, device):
    policy = BY_NAME[name]
    pairs = twins(lambda: build(device, policy.param, **{**policy.options, **options}))
    compiled = torch.compile(training_step(*pairs[1]), backend="aot_eager")
    xs = inputs(device, policy.param, 4)
    if "skip_nonfinite" in options:
        xs[2] = xs[2] * torch.nan
    compare(pairs, xs, compiled)
    for attribute in ("grad_norm", "skipped_steps", "update_norm", "param_norm"):
        expected, actual = (getattr(optimizer, attribute) for _, optimizer in pairs)
        assert (expected is None) == (actual is None)
        assert expected is None or torch.equal(bits(expected), bits(actual))
    assert int(pairs[1][1].skipped_steps) == ("skip_nonfinite" in options)


@pytest.mark.fast
@pytest.mark.parametrize("how", ["the method", "a function"])
def test_step_alone(how, device):
    """With gradients that come and go, options that change, and a state dict that is loaded."""
    pairs = twins(lambda: build(device))
    mine = pairs[1][1]
    compiled = torch.compile(mine.step if how == "the method" else lambda: mine.step(), backend="aot_eager")
    for i, step in enumerate([0, 1, 2, 3]):
        grads = [None if j == step else torch.randn_like(p) for j, p in enumerate(pairs[0][0].parameters())]
        for net, optimizer in pairs:
            set_grads(list(net.parameters()), [None if g is None else g.clone() for g in grads])
            if i == 2:
                optimizer.load_state_dict(optimizer.state_dict())
                optimizer.param_groups[0]["amsgrad"] = True
        pairs[0][1].step()
        assert compiled() is None
        assert_same(pairs[0][1], mine)


def test_a_closure(device):
    pairs = twins(lambda: build(device))
    (net, eager), (other, mine) = pairs

    def closure(net, optimizer, x):
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        return loss.detach()

    compiled = torch.compile(lambda x: mine.step(lambda: closure(other, mine, x)), backend="aot_eager")
    for x in inputs(device, n_steps=3):
        assert torch.equal(compiled(x), eager.step(lambda x=x: closure(net, eager, x)))
        assert_same(eager, mine)


def test_compiled_and_eager_steps_in_turns(device):
    pairs = twins(lambda: build(device))
    functions = [torch.compile(training_step(*pairs[1]), backend="aot_eager"), training_step(*pairs[1])]
    for i, x in enumerate(inputs(device)):
        compare(pairs, [x], functions[i % 2])


def test_a_compiled_model_with_gradient_release(device):
    """The backward pass, where the steps are, runs outside of what is compiled."""
    pairs = twins(lambda: build(device))
    handle = register_gradient_release(*pairs[1])
    eager, compiled = training_step(*pairs[0]), torch.compile(pairs[1][0], backend="aot_eager")
    for x in inputs(device, n_steps=3):
        eager(x)
        compiled(x).square().mean().backward()
        assert all(p.grad is None for p in pairs[1][0].parameters())
        assert_same(pairs[0][1], pairs[1][1])
    handle.remove()


def test_the_reason_is_said(device):
    """Where torch.compile explains what it does, or is not allowed to break the graph; nothing is written then."""
    net, optimizer = build(device)
    set_grads(list(net.parameters()))
    before = contents(optimizer)

    def update():
        result = net.unused + 1
        optimizer.step()
        return result

    with pytest.raises(torch._dynamo.exc.Unsupported, match="kernel"):
        torch.compile(update, fullgraph=True, backend="eager")()
    assert_same(before, optimizer)
    torch._dynamo.reset()
    explained = torch._dynamo.explain(update)()
    assert any("kernel" in str(each.reason) for each in explained.break_reasons), explained.break_reasons
