"""What a step launches, and that everything that outdates a plan is noticed."""

import copy
import weakref

import pytest
import torch
from helpers import step_both
from torch import nn

from adamw_triton import AdamW, launch, plan
from adamw_triton.device_plan import DevicePlan

OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}


def make(device, n=4, **options):
    """`n` parameters, our optimizer, and torch's on copies."""
    ours = [nn.Parameter(torch.randn(40, 30, device=device)) for _ in range(n)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    return ours, theirs, AdamW(ours, **OPTIONS, **options), torch.optim.AdamW(theirs, foreach=False, **OPTIONS)


@pytest.mark.fast
def test_one_launch_for_each_bucket(device, launches):
    ours, theirs, mine, reference = make(device, 7)
    step_both(ours, theirs, mine, reference)
    # Counts and hyper-parameters, then 1200 elements in blocks of 1024.
    assert launches == [("scalars_kernel", 1), ("adamw_table_kernel", 7 * 2)]
    launches.clear()
    mine.add_param_group(
        {"params": [nn.Parameter(torch.ones(1200, dtype=torch.bfloat16, device=device)) for _ in range(2)]}
    )
    for p in mine.param_groups[1]["params"]:
        p.grad = torch.ones_like(p)
    mine.step()
    assert launches == [("scalars_kernel", 1), ("adamw_table_kernel", 7 * 2), ("adamw_table_kernel", 2 * 2)]


def test_launch_form(device, launches):
    def kernels(n, **options):
        launches.clear()
        ours, theirs, mine, reference = make(device, n, **options)
        step_both(ours, theirs, mine, reference)
        assert launches[0] == ("scalars_kernel", 1)
        return [name for name, _ in launches[1:]]

    assert kernels(3, foreach=False) == ["adamw_kernel"] * 3
    assert kernels(3, foreach=True) == kernels(3, foreach=None) == kernels(3, fused=True) == ["adamw_table_kernel"]
    assert kernels(1, foreach=True) == ["adamw_table_kernel"]
    assert kernels(1, foreach=None) == ["adamw_kernel"]


def test_unaligned_tensors_have_a_launch_of_their_own(device, launches):
    memory = torch.randn(5000, device=device)
    params = [nn.Parameter(memory[start : start + 1024]) for start in (0, 1024, 2049, 3077)]
    optimizer = AdamW(params)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert [n for _, n in launches] == [1, 2, 2]
    for p in params:  # a gradient that loses its alignment moves its tensor
        p.grad = torch.randn(1025, device=device)[1:]
    launches.clear()
    optimizer.step()
    assert [n for _, n in launches] == [1, 4]


@pytest.fixture
def built(monkeypatch):
    """Records every plan that is built."""
    seen = []

    class Recorder(DevicePlan):
        def __init__(self, *args, **options):
            seen.append(self)
            super().__init__(*args, **options)

    monkeypatch.setattr(plan, "DevicePlan", Recorder)
    return seen


@pytest.mark.fast
def test_a_steady_step_builds_nothing(device, built):
    ours, theirs, mine, reference = make(device)
    step_both(ours, theirs, mine, reference)
    for i in range(5):
        mine.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = 0.1 / (i + 1)
        for state in mine.state.values():  # reading is no change
            dict(state), state["exp_avg"].sum(), list(state.items()), state.get("nothing")
        step_both(ours, theirs, mine, reference)  # with gradients elsewhere
    assert len(built) == 1


@pytest.mark.fast
def test_a_steady_step_uploads_nothing_and_allocates_nothing(device, monkeypatch):
    ours, theirs, mine, reference = make(device)
    step_both(ours, theirs, mine, reference)
    operations = []
    # The interpreter copies its arguments around.
    for name in ("launch_scalars", "launch_table"):
        monkeypatch.setattr(launch, name, lambda *args, _name=name, **options: operations.append(_name))

    class Operations(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            operations.append(function.__name__)
            return function(*args, **(kwargs or {}))

    def step():
        operations.clear()
        with Operations():
            mine.step()
        return [name for name in operations if "record_function" not in name]

    step()  # torch's checks of layouts see the mode
    assert step() == ["launch_scalars", "launch_table"]
    for p in ours:
        p.grad = p.grad.clone()
    assert step() == ["copy_.default", "launch_scalars", "launch_table"]


def bump_dtype(ours, theirs, mine, reference):
    for p, q in zip(ours, theirs, strict=True):
        p.grad = q.grad = None
        p.data, q.data = p.data.double(), q.data.double()
        for state in (mine.state[p], reference.state[q]):
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].double()


def repoint(ours, theirs, mine, reference):
    for p in ours:
        p.data = p.data.clone()


def repoint_one(ours, theirs, mine, reference):
    ours[-1].data = ours[-1].data.clone()


def transpose_in_place(ours, theirs, mine, reference):
    """The same memory, another layout."""
    for p, q, optimizer_state in zip(ours, theirs, mine.state.values(), strict=True):
        p.grad = q.grad = None
        p.data = p.data.t()
        q.data = q.data.t()
        for state in (optimizer_state, reference.state[q]):
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].t().contiguous()


def replace_state_tensors(ours, theirs, mine, reference):
    for p, q in zip(ours, theirs, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            mine.state[p][name] = torch.full_like(p, 0.25)
            reference.state[q][name] = torch.full_like(p, 0.25)


def replace_one_state_tensor(ours, theirs, mine, reference):
    mine.state[ours[2]]["exp_avg"] = torch.full_like(ours[2], 0.25)
    reference.state[theirs[2]]["exp_avg"] = torch.full_like(ours[2], 0.25)


def replace_state_dicts(ours, theirs, mine, reference):
    for p, q in zip(ours, theirs, strict=True):
        mine.state[p] = {name: value.clone() for name, value in mine.state[p].items()}
        mine.state[p]["step"] += 3
        reference.state[q]["step"] += 3


def offload_and_back(ours, theirs, mine, reference):
    """As RL frameworks do between phases: `.data` of every state tensor goes elsewhere and returns."""
    for p in ours:
        for name in ("exp_avg", "exp_avg_sq"):
            tensor = mine.state[p][name]
            tensor.data = tensor.data.clone()


def change_step_in_place(ours, theirs, mine, reference):
    mine.state[ours[1]]["step"].fill_(10)
    reference.state[theirs[1]]["step"].fill_(10)


def replace_step(ours, theirs, mine, reference):
    mine.state[ours[1]]["step"] = torch.tensor(10.0)
    reference.state[theirs[1]]["step"].fill_(10)


def clear_state(ours, theirs, mine, reference):
    mine.state.clear()
    reference.state.clear()


def change_group_options(ours, theirs, mine, reference):
    for optimizer in (mine, reference):
        optimizer.param_groups[0].update(lr=3e-3, weight_decay=0.3, betas=(0.5, 0.6), eps=1e-3, maximize=True)


def swap_params(ours, theirs, mine, reference):
    for params, optimizer in ((ours, mine), (theirs, reference)):
        fresh = nn.Parameter(torch.full((40, 30), 0.5, device=params[0].device))
        params[1] = optimizer.param_groups[0]["params"][1] = fresh


def append_param(ours, theirs, mine, reference):
    for params, optimizer in ((ours, mine), (theirs, reference)):
        fresh = nn.Parameter(torch.full((40, 30), 0.5, device=params[0].device))
        params.append(fresh)
        optimizer.param_groups[0]["params"].append(fresh)


def add_group(ours, theirs, mine, reference):
    for params, optimizer in ((ours, mine), (theirs, reference)):
        fresh = nn.Parameter(torch.full((40, 30), 0.5, device=params[0].device))
        params.append(fresh)
        optimizer.add_param_group({"params": [fresh], "lr": 0.1})


def drop_group_member(ours, theirs, mine, reference):
    for params, optimizer in ((ours, mine), (theirs, reference)):
        optimizer.param_groups[0]["params"].pop(0)
        params.pop(0)


def load_state(ours, theirs, mine, reference):
    mine.load_state_dict(copy.deepcopy(mine.state_dict()))


CHANGES = [
    bump_dtype, repoint, repoint_one, transpose_in_place, replace_state_tensors, replace_one_state_tensor,
    replace_state_dicts, offload_and_back, change_step_in_place, replace_step, clear_state, change_group_options,
    swap_params, append_param, add_group, drop_group_member, load_state,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("foreach", [True, False])
def test_changes_are_noticed(change, foreach, device, path):
    ours, theirs, mine, reference = make(device, foreach=foreach)
    for _ in range(2):
        step_both(ours, theirs, mine, reference)
    change(ours, theirs, mine, reference)
    for _ in range(2):
        step_both(ours, theirs, mine, reference)


def test_square_transposed_in_place(device, path):
    """Same address, same shape, other strides: the gradient's layout no longer is the parameter's."""
    ours, theirs = (
        nn.Parameter(torch.randn(30, 30, generator=torch.Generator().manual_seed(1)).to(device)) for _ in range(2)
    )
    mine, reference = AdamW([ours], **OPTIONS), torch.optim.AdamW([theirs], foreach=False, **OPTIONS)
    step_both([ours], [theirs], mine, reference)
    for p in (ours, theirs):
        p.data = p.data.t()
    for _ in range(2):
        step_both([ours], [theirs], mine, reference)


def test_parameter_shrunk_in_place(device, path):
    """Same address, fewer elements: what no longer belongs to it must not be written, nor its gradient's end read."""
    memory = torch.ones(3000, device=device)
    ours, theirs = nn.Parameter(memory), nn.Parameter(memory.clone())
    mine, reference = AdamW([ours], **OPTIONS), torch.optim.AdamW([theirs], foreach=False, **OPTIONS)
    gradient = torch.randn(3000, device=device)
    for n in (3000, 1000):
        for p, optimizer in ((ours, mine), (theirs, reference)):
            p.grad = None
            p.data = p.data[:n]
            for name, value in optimizer.state[p].items():
                optimizer.state[p][name] = value[:n] if value.dim() else value
            p.grad = gradient[:n]
        known = memory.clone()
        mine.step()
        reference.step()
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-7)
        assert torch.equal(memory[n:], known[n:])


def test_parameter_shrunk_in_place_with_its_state_left_behind(device, path):
    memory = torch.ones(3000, device=device)
    param = nn.Parameter(memory)
    optimizer = AdamW([param])
    gradient = torch.randn(3000, device=device)
    param.grad = gradient
    optimizer.step()
    param.grad = None
    param.data = param.data[:1000]
    param.grad = gradient[:1000]
    before = memory.clone()
    with pytest.raises(RuntimeError, match=r"state 'exp_avg' \(\(3000,\).*does not match its parameter \(\(1000,\)"):
        optimizer.step()
    assert torch.equal(memory, before)


def test_alternating_sets_of_gradients(device, path):
    """As with experts: which parameters have gradients changes with every step."""
    ours, theirs, mine, reference = make(device, 5)
    generator = torch.Generator().manual_seed(3)
    for _ in range(8):
        present = torch.rand(5, generator=generator) < 0.5
        for p, q, has_grad in zip(ours, theirs, present, strict=True):
            p.grad = torch.randn_like(p) if has_grad else None
            q.grad = p.grad.clone() if has_grad else None
        mine.step()
        reference.step()
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-7)
    assert len({float(mine.state[p]["step"]) for p in ours}) > 1


@pytest.mark.parametrize("amsgrad", [True, False])
def test_device_memory_of_the_plan(amsgrad, device, built):
    """Less than 16 bytes for each chunk, 96 for each tensor and 80 for each group."""
    params = [nn.Parameter(torch.zeros(n, device=device)) for n in (1, 1024, 100_000, 3)]
    optimizer = AdamW(params, amsgrad=amsgrad)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    (plan,) = built
    n_chunks = sum(-(-p.numel() // 1024) for p in params)
    used = sum(t.nbytes for t in plan.tensors)
    assert 8 * n_chunks < used < 16 * n_chunks + 96 * len(params) + 80


def test_many_groups_of_one_tensor(device, path):
    ours = [nn.Parameter(torch.randn(7, device=device)) for _ in range(20)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    mine = AdamW([{"params": [p], "lr": 10.0**-i} for i, p in enumerate(ours)])
    reference = torch.optim.AdamW([{"params": [p], "lr": 10.0**-i} for i, p in enumerate(theirs)], foreach=False)
    for _ in range(3):
        step_both(ours, theirs, mine, reference)


def test_a_plan_keeps_no_gradient_alive(device, path):
    """Between steps the memory of gradients is for other things."""
    ours, _, mine, _ = make(device, max_grad_norm=1.0)
    for p in ours:
        p.grad = torch.randn_like(p)
    alive = [weakref.ref(p.grad) for p in ours]
    mine.step()
    mine.zero_grad()
    assert all(ref() is None for ref in alive)
