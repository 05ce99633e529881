"""Whatever happens to parameters, gradients, state and options between two steps, the next step sees it.

Each event runs on one parameter, the first or another one. Memory that it takes out of use is poisoned: NaN that is
read shows in the results, a write shows in the poison.
"""

import copy

import pytest
import torch
from helpers import bits
from torch import nn

from adamw_triton import AdamW

GROUPS = [{"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}, {"lr": 3e-3, "betas": (0.7, 0.9), "eps": 1e-5}]
SHAPES = [(40, 30), (7,), (33, 33), (1100,)]  # two in each group; the kernels take 1024 elements at a time
TOLERANCE = {"rtol": 2e-6, "atol": 2e-7}
MOMENTS = ("exp_avg", "exp_avg_sq")
# Which parameter, and how it is launched.
WHERE = [
    pytest.param(0, None, id="first"),
    pytest.param(2, None, id="another"),
    pytest.param(2, False, id="another-foreach=False"),
]


class Run:
    """Equal parameters with our optimizer and with torch's, and memory that ours must not use any more."""

    def __init__(self, device, **options):
        self.ours = [nn.Parameter(torch.randn(shape, device=device)) for shape in SHAPES]
        self.theirs = [nn.Parameter(p.detach().clone()) for p in self.ours]
        self.mine, self.reference = (
            optimizer([{"params": params[:2], **GROUPS[0]}, {"params": params[2:], **GROUPS[1]}], **options)
            for optimizer, params, options in (
                (AdamW, self.ours, options),
                (torch.optim.AdamW, self.theirs, {**options, "foreach": False}),
            )
        )
        self.place_grad = {}  # how the gradient of a parameter lies in memory; else it stays where it was
        self.without_grad = set()
        self.discarded = []

    @property
    def both(self):
        return (self.ours, self.mine), (self.theirs, self.reference)

    def give_grads(self):
        for p, q in zip(self.ours, self.theirs, strict=True):
            values = torch.randn_like(q)
            q.grad = values
            if p in self.without_grad:
                p.grad = q.grad = None
            elif p in self.place_grad:
                p.grad = self.place_grad[p](values)
            elif p.grad is None:
                p.grad = values.clone()
            else:
                p.grad.copy_(values)

    def step(self, times=1):
        for _ in range(times):
            self.give_grads()
            self.mine.step()
            self.reference.step()

    def discard(self, *memory):
        for tensor in memory:
            tensor = tensor.detach().fill_(float("nan"))
            self.discarded.append((tensor, bits(tensor)))

    def check(self):
        for memory, poison in self.discarded:
            assert torch.equal(bits(memory), poison), "memory that is out of use was written"
        torch.testing.assert_close(self.ours, self.theirs, **TOLERANCE)
        for p, q in zip(self.ours, self.theirs, strict=True):
            for name, value in self.reference.state.get(q, {}).items():
                torch.testing.assert_close(self.mine.state[p][name], value, check_stride=False, **TOLERANCE)


def repoint(tensor, run):
    """As offloading does: the same tensor object, its values elsewhere."""
    old = tensor.data
    tensor.data = old.clone()
    run.discard(old)


def repoint_state(*names):
    def event(run, i):
        for name in names:
            repoint(run.mine.state[run.ours[i]][name], run)

    return event


def repoint_all_state(run, i):
    for k in range(len(run.ours)):
        repoint_state(*MOMENTS)(run, k)


def offload_layer_by_layer(run, i):
    for k in (i, (i + 1) % 4):
        repoint_state(*MOMENTS)(run, k)
        run.step()


def offload_and_return(run, i):
    """In between the state has no memory at all."""
    for name in MOMENTS:
        tensor = run.mine.state[run.ours[i]][name]
        old = tensor.data
        tensor.data = torch.empty(0, device=old.device)
        tensor.data = old.clone()
        run.discard(old)


def replace_state(name):
    def event(run, i):
        values = torch.rand_like(run.theirs[i]) if name != "step" else torch.tensor(7.0)
        run.discard(run.mine.state[run.ours[i]][name])
        run.mine.state[run.ours[i]][name] = values.clone()
        run.reference.state[run.theirs[i]][name] = values

    return event


def replace_step_by_an_equal_one(run, i):
    state = run.mine.state[run.ours[i]]
    old = state["step"]
    state["step"] = old.clone()
    run.discard(old)


def change_step_in_place(change):
    def event(run, i):
        for params, optimizer in run.both:
            change(optimizer.state[params[i]]["step"])

    return event


def replace_entry(run, i):
    state = run.mine.state
    old = state[run.ours[i]]
    state[run.ours[i]] = {name: value.clone() for name, value in old.items()}
    run.discard(*old.values())


def clear_entry(run, i):
    old = list(run.mine.state[run.ours[i]].values())
    for params, optimizer in run.both:
        optimizer.state[params[i]].clear()
    run.discard(*old)


def pop_entry(run, i):
    run.discard(*run.mine.state.pop(run.ours[i]).values())
    run.reference.state.pop(run.theirs[i])


def clear_state(run, i):
    old = [value for entry in run.mine.state.values() for value in entry.values()]
    for _, optimizer in run.both:
        optimizer.state.clear()
    run.discard(*old)


def assign_state(run, i):
    old = run.mine.state
    run.mine.state = {p: {name: value.clone() for name, value in entry.items()} for p, entry in old.items()}
    run.discard(*[value for entry in old.values() for value in entry.values()])


def load_state_dict(run, i):
    old = [value for entry in run.mine.state.values() for value in entry.values()]
    run.mine.load_state_dict(copy.deepcopy(run.mine.state_dict()))
    run.discard(*old)


def repoint_param(run, i):
    repoint(run.ours[i], run)


def other_strides_of_param(run, i):
    for params, _ in run.both:
        p = params[i]
        old = p.data
        p.grad = None
        p.data = old.mT.contiguous().mT if p.dim() == 2 else old.clone()
        if params is run.ours:
            run.discard(old)


def place_grad(place):
    def event(run, i):
        run.discard(run.ours[i].grad)
        run.place_grad[run.ours[i]] = place

    return event


def elsewhere(values):
    return values.clone()


def transposed(values):
    return values.mT.contiguous().mT


def unaligned(values):
    memory = torch.full((values.numel() + 1,), float("nan"), device=values.device)
    return memory[1:].view(values.shape).copy_(values)


def with_gaps(values):
    memory = torch.full((*values.shape, 2), float("nan"), device=values.device)
    return memory[..., 0].copy_(values)


def repoint_grad(run, i):
    repoint(run.ours[i].grad, run)


def grad_data_with_other_strides(run, i):
    old = run.ours[i].grad.data
    run.ours[i].grad.data = transposed(old)
    run.discard(old)


def grad_missing_for_a_step(run, i):
    run.discard(run.ours[i].grad)
    run.without_grad = {run.ours[i]}
    run.step()
    run.without_grad = set()


def change_group(**options):
    def event(run, i):
        for _, optimizer in run.both:
            optimizer.param_groups[i // 2].update(options)

    return event


def switch_amsgrad_on(run, i):
    change_group(amsgrad=True)(run, i)
    for q in run.reference.param_groups[i // 2]["params"]:  # torch itself would fail for want of it
        run.reference.state[q]["max_exp_avg_sq"] = torch.zeros_like(q)


def switch_foreach(run, i):
    group = run.mine.param_groups[i // 2]
    group["foreach"] = group["foreach"] is False


def fresh_params(run):
    fresh = torch.randn(1200, device=run.ours[0].device)
    return nn.Parameter(fresh), nn.Parameter(fresh.clone())


def add_group(run, i):
    for fresh, (params, optimizer) in zip(fresh_params(run), run.both, strict=True):
        params.append(fresh)
        optimizer.add_param_group({"params": [fresh], "lr": 0.1})


def remove_group(run, i):
    removed = run.mine.param_groups.pop(i // 2)["params"]
    run.reference.param_groups.pop(i // 2)
    for p in removed:
        run.discard(p, *run.mine.state.pop(p).values())
    for params in (run.ours, run.theirs):
        del params[i // 2 * 2 : i // 2 * 2 + 2]


def exchange_param(run, i):
    old = run.ours[i]
    for fresh, (params, optimizer) in zip(fresh_params(run), run.both, strict=True):
        optimizer.state.pop(params[i])
        params[i] = optimizer.param_groups[i // 2]["params"][i % 2] = fresh
    run.discard(old)


def append_param(run, i):
    for fresh, (params, optimizer) in zip(fresh_params(run), run.both, strict=True):
        params.append(fresh)
        optimizer.param_groups[i // 2]["params"].append(fresh)


def drop_param(run, i):
    old = run.ours[i]
    for params, optimizer in run.both:
        optimizer.param_groups[i // 2]["params"].pop(i % 2)
        params.pop(i)
    run.discard(old, *run.mine.state[old].values())


EVENTS = {
    **{f"state {name} repointed": repoint_state(name) for name in (*MOMENTS, "step")},
    "moments repointed": repoint_state(*MOMENTS),
    "moments of all repointed": repoint_all_state,
    "moments repointed layer by layer": offload_layer_by_layer,
    "moments without memory for a while": offload_and_return,
    **{f"state {name} replaced": replace_state(name) for name in (*MOMENTS, "step")},
    "step replaced by an equal one": replace_step_by_an_equal_one,
    "step filled in place": change_step_in_place(lambda step: step.fill_(7)),
    "step added to in place": change_step_in_place(lambda step: step.add_(3)),
    "entry replaced": replace_entry,
    "entry cleared": clear_entry,
    "entry popped": pop_entry,
    "state cleared": clear_state,
    "state assigned": assign_state,
    "state dict loaded": load_state_dict,
    "param repointed": repoint_param,
    "param with other strides": other_strides_of_param,
    "grad elsewhere": place_grad(elsewhere),
    "grad transposed": place_grad(transposed),
    "grad unaligned": place_grad(unaligned),
    "grad with gaps": place_grad(with_gaps),
    "grad repointed": repoint_grad,
    "grad repointed to other strides": grad_data_with_other_strides,
    "grad missing for a step": grad_missing_for_a_step,
    "group maximizes": change_group(maximize=True),
    "group with other hyperparameters": change_group(lr=2e-2, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.3),
    "group switches amsgrad on": switch_amsgrad_on,
    "group switches foreach": switch_foreach,
    "group added": add_group,
    "group removed": remove_group,
    "param exchanged": exchange_param,
    "param appended": append_param,
    "param dropped": drop_param,
}
AMSGRAD_EVENTS = {
    "max_exp_avg_sq repointed": repoint_state("max_exp_avg_sq"),
    "max_exp_avg_sq replaced": replace_state("max_exp_avg_sq"),
    "all moments repointed": repoint_state(*MOMENTS, "max_exp_avg_sq"),
    "amsgrad switched off": change_group(amsgrad=False),
}
CASES = [pytest.param(event, {}, id=name) for name, event in EVENTS.items()]
CASES += [pytest.param(event, {"amsgrad": True}, id=name) for name, event in AMSGRAD_EVENTS.items()]


@pytest.mark.parametrize("i, foreach", WHERE)
@pytest.mark.parametrize("event, options", CASES)
def test_events_are_noticed(event, options, i, foreach, device, path):
    run = Run(device, foreach=foreach, **options)
    run.step(2)
    event(run, i)
    run.step(2)
    run.check()


def move_grads(run, i):
    for p in run.ours:
        run.place_grad[p] = elsewhere


def freeze_and_thaw(run, i):
    run.ours[i].requires_grad_(False)
    run.ours[i].requires_grad_(True)


def read_state(run, i):
    state = run.mine.state[run.ours[i]]
    assert {*state} == {"step", *MOMENTS} and state.get("nothing") is None
    assert all(bool(value.isfinite().all()) for value in state.values())
    assert len(run.mine.state_dict()["state"]) == 4


FREE = {
    "lr": change_group(lr=0.05),
    "betas": change_group(betas=(0.6, 0.7)),
    "eps": change_group(eps=1e-4),
    "weight_decay": change_group(weight_decay=0.5),
    "gradients elsewhere": move_grads,
    "frozen and thawed": freeze_and_thaw,
    "state read": read_state,
}


@pytest.mark.fast
@pytest.mark.parametrize("i, foreach", WHERE)
@pytest.mark.parametrize("event", FREE.values(), ids=FREE.keys())
def test_everyday_events_launch_what_was_launched_before(event, i, foreach, device, path, launches):
    run = Run(device, foreach=foreach)
    run.step(2)
    launches.clear()
    run.step()
    usual = list(launches)
    assert bool(usual) == (path == "kernel")
    event(run, i)
    for _ in range(2):
        launches.clear()
        run.step()
        assert launches == usual
    run.check()
