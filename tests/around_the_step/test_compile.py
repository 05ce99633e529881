"""torch.compile holds a whole training step in one graph, in which ours is one operator.

The oracle is the same loop without torch.compile: the backend runs the traced operations as they are, so that all
comparisons are of bytes.
"""

import copy
import gc
import warnings
import weakref
from collections import defaultdict

import pytest
import torch
from helpers import bits
from torch import nn
from torch._dynamo.utils import counters
from torch.optim.lr_scheduler import LambdaLR

import adamw_triton.compiled  # defines the operator, which otherwise the first compiled step does
from adamw_triton import AdamW
from bench.policies import BY_NAME, POLICIES

OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}
BACKEND = "aot_eager"
# Where torch cannot trace backward(), forward and backward stay outside of what is compiled.
WHOLE = hasattr(torch._dynamo.config, "trace_autograd_ops")
N_STEPS = 6


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Nothing compiled before, and no setting left behind."""
    torch._dynamo.reset()
    counters.clear()
    # Reading a gradient that the same graph has set to None leaves its origin on torch 2.13's one constant None: a
    # later graph that returns None would look for it.
    none = getattr(torch._dynamo.variables.constant, "CONSTANT_VARIABLE_NONE", None)
    if none is not None:
        none.source = None
    with torch._dynamo.config.patch(**{"trace_autograd_ops": True} if WHOLE else {"error_on_recompile": False}):
        yield
    torch._dynamo.reset()


class Net(nn.Module):
    def __init__(self, n=37):
        super().__init__()
        self.a, self.b = nn.Linear(5, n), nn.Linear(n, 3)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.b(self.a(x).tanh())


def build(device, dtype=torch.float32, n=37, grad_dtype=None, **options):
    """A model, and an optimizer with two groups; the same ones at every call."""
    torch.manual_seed(0)
    net = Net(n).to(device, dtype)
    if grad_dtype not in (None, dtype):
        for param in net.parameters():
            param.grad_dtype = grad_dtype
    groups = [{"params": list(net.a.parameters())}, {"params": [*net.b.parameters(), net.unused], "lr": 0.1}]
    return net, AdamW(groups, **{**OPTIONS, **options})


def inputs(device, dtype=torch.float32, n_steps=N_STEPS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 5, generator=generator).to(device, dtype) for _ in range(n_steps)]


def loop(net, optimizer, *, compiled, whole=WHOLE, backend=BACKEND):
    """A function that takes a training step; compiled, in one graph."""

    def update():
        optimizer.step()
        optimizer.zero_grad()

    def forward_backward(x):
        loss = net(x).square().mean()
        loss.backward()
        return loss.detach()

    def train(x):
        loss = net(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    if not compiled:
        return train
    if whole:
        return torch.compile(train, fullgraph=True, backend=backend)
    compiled_update = torch.compile(update, fullgraph=True, backend=backend)

    def train_with_compiled_update(x):
        loss = forward_backward(x)
        compiled_update()
        return loss

    return train_with_compiled_update


def assert_same(one, other):
    """Parameters and state, to the bit, and which of them have any."""
    (net, optimizer), (other_net, other_optimizer) = one, other
    for p, q in zip(net.parameters(), other_net.parameters(), strict=True):
        assert torch.equal(bits(p), bits(q))
        assert (p.grad is None) == (q.grad is None)
        mine, theirs = optimizer.state.get(p, {}), other_optimizer.state.get(q, {})
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert mine[name].dtype == theirs[name].dtype, name
            assert mine[name].device == theirs[name].device, name
            assert torch.equal(bits(mine[name]), bits(theirs[name])), name


def snapshot(pair):
    """Bytes of everything now: those of `bits` may be the tensor's own."""
    net, optimizer = pair
    return [bits(t).clone() for p in net.parameters() for t in (p, *optimizer.state.get(p, {}).values())]


def n_graphs():
    return counters["stats"]["unique_graphs"]


def counts(pair):
    return [float(pair[1].state[p]["step"]) if pair[1].state.get(p) else None for p in pair[0].parameters()]


def no_recompile():
    return torch._dynamo.config.patch(error_on_recompile=True)


@pytest.mark.parametrize("whole", [True, False] if WHOLE else [False])
@pytest.mark.parametrize("scheduled", [True, False])
@pytest.mark.parametrize("warm", [True, False])
def test_bitwise_equal_to_eager_in_one_graph(warm, scheduled, whole, device):
    """Both learning rates change at every step; one parameter has no gradient."""
    pairs = [build(device), build(device)]
    losses = []
    for (net, optimizer), compiled in zip(pairs, (False, True), strict=True):
        scheduler = LambdaLR(optimizer, [lambda e: 0.9**e, lambda e: 0.8**e]) if scheduled else None
        if warm:
            loop(net, optimizer, compiled=False)(inputs(device, n_steps=7)[-1])
        train = loop(net, optimizer, compiled=compiled, whole=whole)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # as of schedulers that have not seen optimizer.step()
            for i, x in enumerate(inputs(device)):
                with torch._dynamo.config.patch(error_on_recompile=i > 0):
                    losses.append(train(x))
                if scheduler is not None:
                    scheduler.step()
                else:
                    for j, group in enumerate(optimizer.param_groups):
                        group["lr"] *= 0.9 + 0.05 * j
    assert all(map(torch.equal, losses[:N_STEPS], losses[N_STEPS:])) and len(losses) == 2 * N_STEPS
    assert len(set(map(float, losses))) >= N_STEPS
    assert_same(*pairs)
    assert counts(pairs[1]) == [None if i == 0 else N_STEPS + warm for i in range(5)]  # `unused` comes first
    assert torch.equal(pairs[1][0].unused, torch.ones(3, device=device))
    assert n_graphs() == 1
    assert not counters["graph_break"]


def run_both(pairs, xs, *, compiled_loop, options=None, same=True):
    """The same steps eagerly and compiled; `options` of both optimizers before each."""
    eager = loop(*pairs[0], compiled=False)
    for i, x in enumerate(xs):
        for _, optimizer in pairs:
            for name, value in (options[i] if options else {}).items():
                setattr(optimizer, name, value)
        assert torch.equal(bits(eager(x)), bits(compiled_loop(x)))
        if same:
            assert_same(*pairs)


# torch.compile refuses in a graph what has a gradient of another dtype.
TRACEABLE = [policy for policy in POLICIES if policy.grad == policy.param]


@pytest.mark.parametrize("policy", TRACEABLE, ids=lambda policy: policy.name)
def test_every_storage_is_bitwise_equal_to_eager(policy, device):
    """Odd sizes, more than one group of 8-bit moments; each parameter has random bits of its own."""
    pairs = [build(device, policy.param, 45, **policy.options) for _ in range(2)]
    compiled = loop(*pairs[1], compiled=True, whole=WHOLE and policy.name == "bf16-master32")
    xs = inputs(device, policy.param, 3)
    run_both(pairs, xs[:1], compiled_loop=compiled)
    with no_recompile():
        run_both(pairs, xs[1:], compiled_loop=compiled)
    assert n_graphs() == 1


# What torch itself says when it resumes after backward(), to a loss.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("policy", [BY_NAME["fp32"], BY_NAME["bf16-grad"]], ids=lambda policy: policy.name)
def test_with_graph_breaks_it_is_bitwise_equal_to_eager(policy, device):
    """As with torch's default configuration."""
    pairs = [build(device, policy.param, grad_dtype=policy.grad) for _ in range(2)]
    with torch._dynamo.config.patch(**{"trace_autograd_ops": False} if WHOLE else {"error_on_recompile": False}):
        compiled = torch.compile(loop(*pairs[1], compiled=False), backend=BACKEND)
        for x in inputs(device, policy.param, 4):
            run_both(pairs, [x], compiled_loop=compiled)
            for _, optimizer in pairs:
                optimizer.param_groups[1]["lr"] *= 0.7
    assert counts(pairs[1]) == [None, *[4.0] * 4]


@pytest.mark.parametrize(
    "options",
    [
        {"max_grad_norm": 0.05},
        {"skip_grad_norm_above": 0.3, "max_grad_norm": 0.05},
        {"capturable": True},
        {"cautious": True},
        {"amsgrad": True, "maximize": True, "foreach": False},
        {"decouple_lr": True},
        {"statistics": True},
        {"fused": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_are_bitwise_equal_to_eager(options, device):
    pairs = [build(device, **options) for _ in range(2)]
    compiled = loop(*pairs[1], compiled=True, whole=False)
    xs = inputs(device, n_steps=3)
    run_both(pairs, xs[:1], compiled_loop=compiled)
    with no_recompile():
        run_both(pairs, xs[1:], compiled_loop=compiled)
    (_, eager), (_, mine) = pairs
    for name in ("grad_norm", "update_norm", "param_norm", "skipped_steps"):
        expected, actual = getattr(eager, name), getattr(mine, name)
        assert (expected is None) == (actual is None), name
        assert expected is None or torch.equal(expected, actual), name
    if "max_grad_norm" in options:
        assert float(mine.grad_norm) > options["max_grad_norm"]  # there was something to clip
    if "statistics" in options:
        assert float(mine.update_norm) > 0


def test_a_step_with_nan_is_skipped(device, path):
    pairs = [build(device, skip_nonfinite=True) for _ in range(2)]
    compiled = loop(*pairs[1], compiled=True)
    xs = inputs(device, n_steps=4)
    xs[1] = xs[1].clone()
    xs[1][2, 3] = float("nan")
    run_both(pairs, xs[:1], compiled_loop=compiled)
    before = snapshot(pairs[1])
    with no_recompile():
        run_both(pairs, xs[1:2], compiled_loop=compiled)
        assert all(map(torch.equal, before, snapshot(pairs[1])))
        run_both(pairs, xs[2:], compiled_loop=compiled)
    assert int(pairs[1][1].skipped_steps) == int(pairs[0][1].skipped_steps) == 1
    assert counts(pairs[1]) == [None, 3.0, 3.0, 3.0, 3.0]


def test_options_that_change_between_steps_compile_nothing_anew(device):
    """They are read when the step runs."""
    pairs = [build(device) for _ in range(2)]
    compiled = loop(*pairs[1], compiled=True)
    xs = inputs(device)
    run_both(pairs, xs[:1], compiled_loop=compiled)
    of_groups = [{"weight_decay": 0.5}, {"betas": (0.5, 0.9), "eps": 1e-3}, {"maximize": True}, {"cautious": True}, {}]
    of_optimizer = [{}, {}, {"max_grad_norm": 0.1}, {"statistics": True}, {"skip_grad_norm_above": 1e-6}]
    with no_recompile():
        for x, group_options, options in zip(xs[1:], of_groups, of_optimizer, strict=True):
            for _, optimizer in pairs:
                optimizer.param_groups[1].update(group_options)
            run_both(pairs, [x], compiled_loop=compiled, options=[options])
    assert int(pairs[1][1].skipped_steps) == 1
    assert counts(pairs[1]) == [None, 5.0, 5.0, 5.0, 5.0]


@pytest.mark.parametrize("capturable", [True, False])
def test_learning_rate_that_is_a_tensor(capturable, device, path):
    pairs = [build(device, capturable=capturable) for _ in range(2)]
    rates = []
    for _, optimizer in pairs:
        rates.append(torch.tensor(0.1, device=device if capturable else "cpu"))
        optimizer.param_groups[0]["lr"] = rates[-1]
    compiled = loop(*pairs[1], compiled=True, whole=False)
    xs = inputs(device, n_steps=3)
    run_both(pairs, xs[:1], compiled_loop=compiled)
    with no_recompile():
        for x, value in zip(xs[1:], (0.2, 0.01), strict=True):
            for rate in rates:
                rate.fill_(value)
            run_both(pairs, [x], compiled_loop=compiled)


def test_a_closure(device):
    """With the backward pass in it where torch can trace that."""
    pairs = [build(device), build(device)]
    losses = []
    for (net, optimizer), compiled in zip(pairs, (False, True), strict=True):

        def train(x, net=net, optimizer=optimizer):
            def closure():
                loss = net(x).square().mean()
                if WHOLE:
                    optimizer.zero_grad()
                    loss.backward()
                return loss.detach()

            return optimizer.step(closure)

        step = torch.compile(train, fullgraph=True, backend=BACKEND) if compiled else train
        for i, x in enumerate(inputs(device, n_steps=3)):
            if not WHOLE:
                optimizer.zero_grad()
                net(x).square().mean().backward()
            with torch._dynamo.config.patch(error_on_recompile=i > 1):  # gradients are there from the 2nd step on
                losses.append(step(x))
    assert all(map(torch.equal, losses[:3], losses[3:]))
    assert_same(*pairs)
    assert counts(pairs[1]) == [None, 3.0, 3.0, 3.0, 3.0]


def test_step_alone_with_gradients_made_outside(device, path):
    pairs = [build(device), build(device)]
    steps = [pairs[0][1].step, torch.compile(pairs[1][1].step, fullgraph=True, backend=BACKEND)]
    for i, x in enumerate(inputs(device, n_steps=3)):
        for (net, optimizer), step in zip(pairs, steps, strict=True):
            net(x).square().mean().backward()
            saved = [p.grad.clone() for p in net.parameters() if p.grad is not None]
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                step()
            assert all(map(torch.equal, saved, [p.grad for p in net.parameters() if p.grad is not None]))
            optimizer.zero_grad()
        assert_same(*pairs)
    assert n_graphs() == 1


def test_zero_grad_to_zero_and_accumulation(device):
    """Gradients that stay where they are, into which the next backward pass adds."""
    pairs = [build(device), build(device)]
    for (net, optimizer), compiled in zip(pairs, (False, True), strict=True):

        def update(optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

        update = torch.compile(update, fullgraph=True, backend=BACKEND) if compiled else update
        xs = inputs(device, n_steps=4)
        for i in range(0, 4, 2):
            for x in xs[i : i + 2]:
                net(x).square().mean().backward()
            update()
            assert all(not p.grad.any() for p in net.parameters() if p.grad is not None)
    assert_same(*pairs)
    assert sum(p.grad is not None for p in pairs[1][0].parameters()) == 4


def test_gradients_that_come_and_go(device):
    """Which parameters have one may be compiled anew, and is never wrong."""
    pairs = [build(device), build(device)]

    def update(optimizer):
        optimizer.step()
        optimizer.zero_grad()

    compiled = torch.compile(update, fullgraph=True, backend=BACKEND)
    for i, x in enumerate(inputs(device)):
        for (net, optimizer), function in zip(pairs, (update, compiled), strict=True):
            loss = net(x).square().mean() + (net.unused.sum() if i in (2, 4) else 0)
            loss.backward()
            function(optimizer)
        assert_same(*pairs)
    assert counts(pairs[1])[0] == 2


def test_no_gradient_at_all(device):
    pair = build(device)
    before = snapshot(pair)
    torch.compile(pair[1].step, fullgraph=True, backend=BACKEND)()
    assert all(map(torch.equal, before, snapshot(pair)))
    assert counts(pair) == [None] * 5


# Eager code in between


@pytest.mark.parametrize(
    ("name", "capturable"), [("fp32", False), ("fp32", True), ("bf16-master24-8bit", False), ("bf16-stochastic", True)]
)
def test_compiled_and_eager_steps_in_turns(capturable, name, device):
    policy = BY_NAME[name]
    pairs = [build(device, policy.param, capturable=capturable, **policy.options) for _ in range(2)]
    functions = {"compiled": loop(*pairs[1], compiled=True, whole=False), "eager": loop(*pairs[1], compiled=False)}
    order = ["compiled", "eager", "compiled", "compiled", "eager", "compiled"]
    for i, (x, which) in enumerate(zip(inputs(device, policy.param, len(order)), order, strict=True)):
        run_both(pairs, [x], compiled_loop=functions[which])
        assert counts(pairs[1]) == [None, *[i + 1.0] * 4]


@pytest.mark.parametrize("name", ["fp32", "bf16-master32"])
def test_load_state_dict_between_compiled_steps(name, device):
    policy = BY_NAME[name]
    pairs = [build(device, policy.param, **policy.options) for _ in range(2)]
    compiled = loop(*pairs[1], compiled=True)
    xs = inputs(device, policy.param, 5)
    run_both(pairs, xs[:1], compiled_loop=compiled)
    saved = [copy.deepcopy(optimizer.state_dict()) for _, optimizer in pairs]
    run_both(pairs, xs[1:3], compiled_loop=compiled)
    for (_, optimizer), checkpoint in zip(pairs, saved, strict=True):
        checkpoint["param_groups"][1]["lr"] = 0.03
        optimizer.load_state_dict(checkpoint)
    assert counts(pairs[1]) == [None, *[1.0] * 4]
    run_both(pairs, xs[3:], compiled_loop=compiled)
    assert counts(pairs[1]) == [None, *[3.0] * 4]


def replace_entry(net, optimizer):
    optimizer.state[net.a.weight]["exp_avg"] = torch.ones_like(net.a.weight)


def replace_step(net, optimizer):
    optimizer.state[net.a.weight]["step"] = torch.tensor(40.0)


def write_entry(net, optimizer):
    optimizer.state[net.b.weight]["exp_avg_sq"].mul_(3)


def write_step(net, optimizer):
    for param in net.parameters():
        if optimizer.state.get(param):
            optimizer.state[param]["step"].fill_(100.0)


def clear_state(net, optimizer):
    optimizer.state.clear()


def replace_data(net, optimizer):
    net.a.weight.data = net.a.weight.detach().clone().mul_(2)


def repoint_moments(net, optimizer):
    for param in net.parameters():
        if optimizer.state.get(param):
            entry = optimizer.state[param]["exp_avg"]
            entry.data = entry.clone().mul_(-1)


CHANGES = [replace_entry, replace_step, write_entry, write_step, clear_state, replace_data, repoint_moments]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_data_or_state_replaced_between_steps_is_noticed(change, device):
    pairs = [build(device), build(device)]
    compiled = loop(*pairs[1], compiled=True, whole=False)
    xs = inputs(device, n_steps=4)
    run_both(pairs, xs[:2], compiled_loop=compiled)
    for pair in pairs:
        change(*pair)
    run_both(pairs, xs[2:], compiled_loop=compiled)


def test_a_replaced_state_works_or_says_what_to_do(device):
    pairs = [build(device), build(device)]
    compiled = loop(*pairs[1], compiled=True, whole=False)
    xs = inputs(device, n_steps=4)
    run_both(pairs, xs[:1], compiled_loop=compiled)
    for _, optimizer in pairs:
        state = {p: {name: value.clone() for name, value in each.items()} for p, each in optimizer.state.items()}
        next(iter(state.values()))["exp_avg"].fill_(0.5)
        optimizer.state = defaultdict(dict, state)
    before = snapshot(pairs[1])
    pairs[1][0](xs[1]).square().mean().backward()
    pairs[1][1].zero_grad()
    try:
        compiled(xs[1])
    except RuntimeError as error:
        assert "optimizer.state was replaced" in str(error) and "torch._dynamo.reset()" in str(error)
        assert all(map(torch.equal, before, snapshot(pairs[1])))
        pairs[1][1].zero_grad()
        torch._dynamo.reset()
        compiled(xs[1])
    loop(*pairs[0], compiled=False)(xs[1])
    assert_same(*pairs)
    run_both(pairs, xs[2:], compiled_loop=compiled)
    assert counts(pairs[1]) == [None, *[4.0] * 4]


def test_amsgrad_switched_on_is_refused_with_nothing_written(device):
    pairs = [build(device), build(device)]
    compiled = loop(*pairs[1], compiled=True, whole=False)
    xs = inputs(device, n_steps=4)
    run_both(pairs, xs[:2], compiled_loop=compiled)
    for _, optimizer in pairs:
        optimizer.param_groups[0]["amsgrad"] = True
    before, entries = snapshot(pairs[1]), [set(each) for each in pairs[1][1].state.values()]
    for _ in range(2):  # and does not become right by trying again
        with pytest.raises(RuntimeError, match=r"torch\._dynamo\.reset\(\)"):
            compiled(xs[2])
        pairs[1][1].zero_grad()
        assert all(map(torch.equal, before, snapshot(pairs[1])))
        assert [set(each) for each in pairs[1][1].state.values()] == entries
    torch._dynamo.reset()
    run_both(pairs, xs[2:], compiled_loop=compiled)
    assert "max_exp_avg_sq" in pairs[1][1].state[pairs[1][0].a.weight]
    assert counts(pairs[1]) == [None, *[4.0] * 4]


def test_a_storage_option_switched_is_refused_with_nothing_written(device):
    pair = build(device)
    compiled = loop(*pair, compiled=True, whole=False)
    xs = inputs(device, n_steps=2)
    compiled(xs[0])
    pair[1].param_groups[1]["exp_avg_dtype"] = torch.bfloat16
    before = snapshot(pair)
    with pytest.raises(RuntimeError, match=r"torch\._dynamo\.reset\(\)"):
        compiled(xs[1])
    assert all(map(torch.equal, before, snapshot(pair)))


def test_a_deep_copy_of_model_and_optimizer(device):
    """It steps its own parameters, in a compiled step of its own."""
    pair = build(device)
    compiled = loop(*pair, compiled=True, whole=False)
    xs = inputs(device, n_steps=3)
    compiled(xs[0])
    other = copy.deepcopy(pair)
    assert_same(pair, other)
    before = snapshot(pair)
    compiled_other = loop(*other, compiled=True, whole=False)
    compiled_other(xs[1])
    assert all(map(torch.equal, before, snapshot(pair)))
    compiled(xs[1])
    assert_same(pair, other)
    other[1].param_groups[0]["lr"] = 0.5
    compiled_other(xs[2])
    compiled(xs[2])
    assert not torch.equal(pair[0].a.weight, other[0].a.weight)
    assert torch.equal(pair[0].b.bias, other[0].b.bias)


def test_a_param_group_added_between_compiled_steps(device):
    pairs = [build(device), build(device)]
    for net, _ in pairs:
        net.late = nn.Parameter(torch.ones(5, device=device))
        net.register_forward_pre_hook(lambda net, args: (args[0] * net.late,))
    compiled = loop(*pairs[1], compiled=True, whole=False)
    xs = inputs(device, n_steps=3)
    run_both(pairs, xs[:1], compiled_loop=compiled)
    for net, optimizer in pairs:
        net.late.grad = None
        optimizer.add_param_group({"params": [net.late], "lr": 0.3})
    run_both(pairs, xs[1:], compiled_loop=compiled)
    assert float(pairs[1][1].state[pairs[1][0].late]["step"]) == 2


def test_several_optimizers_through_one_compiled_function(device):
    def update(optimizer):
        optimizer.step()
        optimizer.zero_grad()

    compiled = torch.compile(update, fullgraph=True, backend=BACKEND)
    pairs = [[build(device, lr=lr) for lr in (0.1, 0.01, 0.3)] for _ in range(2)]
    for x in inputs(device, n_steps=2):
        for row, function in zip(pairs, (update, compiled), strict=True):
            for net, optimizer in row:
                net(x).square().mean().backward()
                function(optimizer)
    for one, other in zip(*pairs, strict=True):
        assert_same(one, other)


def test_refused_gradients_and_options_write_nothing(device):
    """Also at a step that is compiled already."""
    pair = build(device)
    compiled = loop(*pair, compiled=True, whole=False)
    xs = inputs(device, n_steps=2)
    compiled(xs[0])
    pair[1].param_groups[0]["differentiable"] = True
    before = snapshot(pair)
    with pytest.raises(ValueError, match="differentiable"):
        compiled(xs[1])
    assert all(map(torch.equal, before, snapshot(pair)))


# Lifetime


def test_the_optimizer_is_garbage_collected_and_its_step_then_raises(device):
    net, optimizer = build(device)
    net(inputs(device)[0]).square().mean().backward()
    torch.compile(optimizer.step, fullgraph=True, backend=BACKEND)()
    handle, reference = optimizer._compiled.handle, weakref.ref(optimizer)
    del net, optimizer
    gc.collect()
    assert reference() is None
    with pytest.raises(RuntimeError, match="the optimizer of this compiled step no longer exists"):
        torch.ops.adamw_triton.step_([], [], [], [], handle)


def test_the_optimizer_is_garbage_collected_in_spite_of_a_compiled_function(device):
    """Compiled code that lives on does not keep it."""

    def update(optimizer):
        optimizer.step()
        optimizer.zero_grad()

    compiled = torch.compile(update, fullgraph=True, backend=BACKEND)
    net, optimizer = build(device)
    net(inputs(device)[0]).square().mean().backward()
    compiled(optimizer)
    reference, of_param = weakref.ref(optimizer), weakref.ref(net.a.weight)
    del net, optimizer
    gc.collect()
    assert reference() is None and of_param() is None
    pairs = [build(device), build(device)]  # the function goes on with others
    for (net, optimizer), function in zip(pairs, (update, compiled), strict=True):
        net(inputs(device)[0]).square().mean().backward()
        function(optimizer)
    assert_same(*pairs)


# The operator


def op_arguments(net, optimizer):
    """What the traced step hands to the operator, on copies."""
    numbers, params, grads, state = [], [], [], []
    for number, param in enumerate(optimizer._compiled.params):
        if param.grad is not None:
            numbers.append(number)
            params.append(param.detach().clone())
            grads.append(param.grad)
            state += [value.clone() for value in optimizer.state[param].values()]
    return params, grads, state, numbers, optimizer._compiled.handle


OPCHECKED = ["fp32", "fp32-amsgrad", "fp32-8bit", "bf16-master24-8bit", "bf16-stochastic", "fp16-master32"]


@pytest.mark.parametrize(("name", "requires_grad"), [*[(name, False) for name in OPCHECKED], ("fp32", True)])
def test_opcheck(name, requires_grad, device):
    """Its schema, its fake and its autograd are what torch.compile takes them to be."""
    policy = BY_NAME[name]
    net, optimizer = build(device, policy.param, **policy.options)
    loop(net, optimizer, compiled=False)(inputs(device, policy.param)[0])  # makes state
    net(inputs(device, policy.param)[1]).square().mean().backward()
    with torch.no_grad():
        optimizer._compiled.complete(
            optimizer, [i for i, p in enumerate(optimizer._compiled.params) if p.grad is not None]
        )
    before = snapshot((net, optimizer))
    params, *rest = op_arguments(net, optimizer)
    if requires_grad:
        params = [param.requires_grad_() for param in params]
    with torch.no_grad():
        torch.library.opcheck(torch.ops.adamw_triton.step_, (params, *rest))
    assert all(map(torch.equal, before, snapshot((net, optimizer))))  # other tensors were stepped


def test_opcheck_of_empty_lists(device):
    _, optimizer = build(device)
    torch.library.opcheck(torch.ops.adamw_triton.step_, ([], [], [], [], optimizer._compiled.handle))


def test_the_operator_says_what_it_writes():
    schema = torch.ops.adamw_triton.step_.default._schema
    written = {arg.name for arg in schema.arguments if arg.alias_info is not None and arg.alias_info.is_write}
    assert written == {"params", "state"}
    assert not schema.returns
    if hasattr(torch.Tag, "cudagraph_unsafe"):
        assert torch.Tag.cudagraph_unsafe in torch.ops.adamw_triton.step_.default.tags


@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"max_grad_norm": 0.1, "skip_nonfinite": True}], ids=str)
def test_the_plan_is_kept_where_the_compiler_passes_the_parameters_themselves(options, device, monkeypatch):
    built = []
    build_plan = adamw_triton.compiled.Plan

    def counted(*args, **named):
        built.append(build_plan(*args, **named))
        return built[-1]

    monkeypatch.setattr(adamw_triton.compiled, "Plan", counted)
    net, optimizer = build(device, **options)
    other, reference = build(device, **options)
    train = loop(net, optimizer, compiled=True, whole=False, backend="eager")
    eager = loop(other, reference, compiled=False)
    for x in inputs(device):
        train(x)
        eager(x)
    assert len(built) == 1
    assert_same((net, optimizer), (other, reference))


def test_a_count_changed_in_place_between_compiled_steps_is_seen(device):
    net, optimizer = build(device)
    other, reference = build(device)
    train = loop(net, optimizer, compiled=True, whole=False, backend="eager")
    eager = loop(other, reference, compiled=False)
    for i, x in enumerate(inputs(device)):
        train(x)
        eager(x)
        if i == 2:
            for model, opt in ((net, optimizer), (other, reference)):
                opt.state[model.a.weight]["step"].fill_(50)
    assert_same((net, optimizer), (other, reference))


def test_statistics_of_a_compiled_step(device):
    net, optimizer = build(device, statistics=True, skip_nonfinite=True)
    other, reference = build(device, statistics=True, skip_nonfinite=True)
    train = loop(net, optimizer, compiled=True, whole=False)
    eager = loop(other, reference, compiled=False)
    for i, x in enumerate(inputs(device)):
        if i == 3:
            x = x * torch.nan
        train(x)
        eager(x)
        assert optimizer.update_norm > 0 and optimizer.update_norm == reference.update_norm
        assert optimizer.param_norm == reference.param_norm


def test_with_gradient_release_a_compiled_step_does_nothing_either(device):
    net, optimizer = build(device)
    handle = adamw_triton.register_gradient_release(net, optimizer)
    step = torch.compile(lambda: (optimizer.step(), optimizer.zero_grad()), fullgraph=True, backend=BACKEND)
    with handle.accumulate():
        net(inputs(device)[0]).square().mean().backward()
    before = [*map(bits, net.parameters())], net.a.weight.grad.clone()
    step()
    assert all(map(torch.equal, before[0], map(bits, net.parameters()))) and torch.equal(before[1], net.a.weight.grad)
