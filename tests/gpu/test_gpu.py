"""What only a GPU can show: streams, devices, synchronisation, memory, compilations, IEEE rounding."""

import contextlib
import copy

import pytest
import torch
from pairs import OPTIONS, Pair, assert_same, set_grads
from torch import nn

from adamw_triton import AdamW, launch, register_gradient_release
from adamw_triton.grad_control import GradDecision, GradNormOptions, GradScalerInputs

pytestmark = pytest.mark.gpu


def make_params(n=5, shape=(300, 70), device="cuda", dtype=torch.float32):
    params = [nn.Parameter(torch.randn(shape, device=device).to(dtype)) for _ in range(n)]
    set_grads(params)
    return params


def replace_grads(params):
    """The same values elsewhere."""
    set_grads(params, [p.grad.clone() for p in params])


@contextlib.contextmanager
def no_synchronisation():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("foreach", [True, False])
def test_on_a_side_stream(foreach):
    """The step is ordered after what its stream computed, and the gradients' upload with it."""
    pair = Pair(make_params(shape=(2000, 500)), foreach=foreach, **OPTIONS)
    pair.step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(10):
            torch.cuda._sleep(1_000_000)
            for p in pair.ours:
                p.grad = p.detach() * 0.5 + 1  # new addresses, and values that are ready late
            pair.mine.step()
    torch.cuda.current_stream().wait_stream(stream)
    for _ in range(10):
        for q in pair.theirs:
            q.grad = q.detach() * 0.5 + 1
        pair.reference.step()
    pair.assert_close(rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("foreach", [True, False])
def test_parameters_on_several_devices(foreach):
    """In one group, and with another device current than theirs."""
    pair = Pair([nn.Parameter(torch.randn(500, device=f"cuda:{i % 2}")) for i in range(4)], foreach=foreach, **OPTIONS)
    for current in (0, 1, 0):
        with torch.cuda.device(current):
            pair.step()
            assert torch.cuda.current_device() == current


@pytest.mark.parametrize("clip", [None, 0.5])
def test_cpu_and_gpu_parameters_in_one_group(clip):
    """With clipping, by one norm of all."""
    pair = Pair([*make_params(2), *make_params(1, device="cpu")], max_grad_norm=clip, **OPTIONS)
    for _ in range(3):
        pair.set_grads()
        if clip is not None:
            norm = torch.stack([q.grad.cpu().double().norm() for q in pair.theirs]).norm()
            for q in pair.theirs:
                q.grad.mul_(min(1.0, clip / (norm.item() + 1e-6)))
        pair.mine.step()
        pair.reference.step()
        pair.assert_close()
    assert clip is None or abs(pair.mine.grad_norm.item() / norm.item() - 1) < 1e-6


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("lr", ["float", "tensor"])
def test_no_synchronisation(foreach, dtype, amp, lr):
    params = make_params(dtype=dtype)
    rate = torch.tensor(1e-2, device="cuda") if lr == "tensor" else 1e-2
    optimizer = AdamW(params, lr=rate, foreach=foreach, fused=amp)
    if amp:
        optimizer.grad_scale, optimizer.found_inf = torch.ones(1, device="cuda"), torch.zeros(1, device="cuda")
    optimizer.step()
    with no_synchronisation():
        for _ in range(3):
            replace_grads(params)  # so that addresses are written anew
            optimizer.step()


@pytest.mark.parametrize("foreach", [True, False])
def test_gradients_that_come_and_go_wait_for_nothing(foreach):
    """And are counted as torch counts them."""
    pair = Pair(make_params(6), foreach=foreach, **OPTIONS)
    pair.step()
    for missing in ((0, 3), (1,), (), (2, 4, 5)):
        pair.set_grads([None if i in missing else torch.randn_like(p) for i, p in enumerate(pair.ours)])
        pair.reference.step()
        with no_synchronisation():
            pair.mine.step()
        pair.assert_close()
    for p, q in zip(pair.ours, pair.theirs, strict=True):
        assert float(pair.mine.state[p]["step"]) == float(pair.reference.state[q]["step"])


def test_memory_of_a_step():
    """No temporaries: what a step adds is the plan's tables, and only at the first."""
    optimizer = AdamW(make_params(8, (1000, 1000)))
    before = torch.cuda.memory_allocated()
    optimizer.step()
    state = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if t.is_cuda)
    n_chunks = 8 * -(-1_000_000 // 1024)
    rounding = 5 * 512  # of the caching allocator
    assert torch.cuda.memory_allocated() - before - state < 16 * n_chunks + 64 * 8 + rounding
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() == before


def test_state_that_is_dropped_is_free_at_once():
    """Without another step: the optimizer holds no tensor besides the state."""
    optimizer = AdamW(make_params(8, (1000, 1000)))
    optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    optimizer.state.clear()
    optimizer.zero_grad()
    assert before - torch.cuda.memory_allocated() >= 3 * 8 * 4 * 1_000_000


KERNELS = (launch.adamw_kernel, launch.adamw_table_kernel, launch.grad_norm_kernel, launch.scalars_kernel)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_nothing_recompiles(clip):
    """Over steps, learning rates, sizes and addresses, once each dtype and alignment has been seen."""

    def compiled():
        return sum(len(caches[0]) for kernel in KERNELS for caches in kernel.device_caches.values())

    def run(shapes, lr, steps):
        for foreach in (True, False):
            params = [nn.Parameter(torch.randn(shape, device="cuda")) for shape in shapes]
            optimizer = AdamW(params, lr=lr, foreach=foreach, max_grad_norm=clip)
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = lr / (step + 1)
                set_grads(params)
                optimizer.step()

    run([(64,), (100,)], 1e-3, 3)
    known = compiled()
    run([(1,), (16,), (17,), (1024,), (100_000,), (3, 5)], 1.0, 20)
    run([(1,)] * 2, 0.0, 2)
    assert compiled() == known


def test_bitwise_deterministic():
    pair = Pair(make_params(), against=OPTIONS, **OPTIONS)
    for _ in range(3):
        pair.step()
    assert_same(pair.mine, pair.reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_random_tensor_against_torch_fused(dtype):
    """Ten million elements, where torch's fused kernel is an oracle too."""
    options = {**OPTIONS, "eps": 1e-6}
    pair = Pair(make_params(1, (10_000_019,), dtype=dtype), **options)
    pair.reference = torch.optim.AdamW(pair.theirs, fused=True, **options)
    ulp = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    pair.set_grads()
    for _ in range(3):
        pair.mine.step()
        pair.reference.step()
    pair.assert_close(rtol=ulp, atol=ulp * 0.1)


# Around the step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_norm_of_many_programs(dtype):
    """Which of them comes last is another one each time; the norm has the same bits."""
    params = [nn.Parameter(torch.zeros(n, dtype=dtype, device="cuda")) for n in (50_000_019, 3, 1_000_000, 7777)]
    optimizer = AdamW(params, max_grad_norm=float("inf"))
    for p in params:
        p.grad = torch.randn_like(p)
    exact = sum(p.grad.double().square().sum() for p in params).sqrt()
    norms = []
    for _ in range(50):
        optimizer.step()
        norms.append(optimizer.grad_norm.clone())
    assert len({norm.item() for norm in norms}) == 1
    assert abs(norms[0] / exact - 1) < 1e-6


def test_norm_of_constant_gradients_in_more_than_2_31_elements():
    param = torch.empty(2**31 + 7, dtype=torch.bfloat16, device="cuda")
    for value in (0.1, 1 / 3, 7e-5):
        param.grad = torch.full_like(param, value)
        decision = GradDecision(param.device)
        numels = torch.tensor([param.numel()], device="cuda")
        addresses = torch.tensor([param.grad.data_ptr()], device="cuda")
        table = launch.NormTable.of(numels, [0], first=0, dtype=torch.bfloat16, aligned=True)
        partials = torch.zeros(table.spans.shape[0] + 1, dtype=torch.float64, device="cuda")
        finished = torch.zeros(1, dtype=torch.int32, device="cuda")
        inputs = GradScalerInputs(), GradNormOptions()
        launch.launch_norms([table], addresses, partials, finished, decision, *inputs)
        exact = float(param.grad[0].double()) * param.numel() ** 0.5
        assert abs(float(decision.values[2]) / exact - 1) < 1e-6
        assert finished.item() == 0


@pytest.mark.parametrize("clip", [None, 0.5])
def test_graph_of_a_training_step(clip):
    """Forward, backward, step and what is around it, replayed while the learning rate and decay change: as eager."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)).cuda()
    eager = copy.deepcopy(ours)
    inputs = torch.randn(32, 64, device="cuda")
    rates = [torch.tensor(1e-2, device="cuda") for _ in range(2)]
    decays = [torch.tensor(0.1, device="cuda") for _ in range(2)]
    optimizers = [
        AdamW(
            [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": lr, "weight_decay": decay}],
            lr=1e-3,
            capturable=True,
            max_grad_norm=clip,
            skip_nonfinite=True,
        )
        for model, lr, decay in zip((ours, eager), rates, decays, strict=True)
    ]

    def train_step(model, optimizer):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            train_step(ours, optimizers[0])
    torch.cuda.current_stream().wait_stream(stream)
    optimizers[0].zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours(inputs).square().mean().backward()
        optimizers[0].step()
    for _ in range(3):
        train_step(eager, optimizers[1])
    for i in range(6):
        inputs.normal_()
        if i == 3:
            inputs[0, 0] = float("nan")
        for lr, decay in zip(rates, decays, strict=True):
            lr.fill_(1e-2 / (i + 1))
            decay.fill_(0.1 * i)
        graph.replay()
        train_step(eager, optimizers[1])
        assert all(map(torch.equal, ours.parameters(), eager.parameters()))
    assert optimizers[0].skipped_steps == optimizers[1].skipped_steps == 1
    assert {float(optimizers[0].state[p]["step"]) for p in ours.parameters()} == {8.0}


def captured(function):
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def test_replays_and_steps_outside_alternate():
    """A graph of the step alone, with gradients of its own, next to others outside; as eager steps with both."""
    options = {**OPTIONS, "capturable": True, "max_grad_norm": 1.0}
    pair = Pair(make_params(4), against=options, **options)
    pair.step()
    inside = [p.grad for p in pair.ours]
    graph = captured(pair.mine.step)
    for _ in range(3):
        grads = [torch.randn_like(p) for p in pair.ours]
        for grad, new in zip(inside, grads, strict=True):
            grad.copy_(new)
        graph.replay()
        set_grads(pair.theirs, grads)
        pair.reference.step()
        assert_same(pair.mine, pair.reference)
        pair.step()
        assert_same(pair.mine, pair.reference)
        pair.mine.zero_grad()  # the graph's gradients are those that `inside` holds


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_sixteen_captures_without_a_step_between():
    params = make_params(2)
    optimizer = AdamW(params, lr=1.0, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0, capturable=True)
    optimizer.step()
    graphs, kept = [], []
    for i in range(16):
        set_grads(params, [torch.full_like(p, -1.0 if i % 2 else 1.0) for p in params])
        kept += [p.grad for p in params]
        graphs.append(captured(optimizer.step))
    with pytest.raises(RuntimeError, match=r"after 16 captures.*take a step outside"):
        captured(optimizer.step)
    torch.cuda.synchronize()
    for i in (3, 15, 0, 3, 8):
        before = [p.detach().clone() for p in params]
        graphs[i].replay()
        for p, old in zip(params, before, strict=True):
            torch.testing.assert_close(p - old, torch.full_like(p, 1.0 if i % 2 else -1.0), rtol=1e-5, atol=1e-5)
    optimizer.step()
    captured(optimizer.step)
    assert float(optimizer.state[params[0]]["step"]) == 7 and len(kept) == 32


def test_tables_of_graphs_are_freed_when_they_are_forgotten():
    params = make_params(4, (1000, 1000))
    optimizer = AdamW(params, capturable=True)
    optimizer.step()
    graph = captured(optimizer.step)
    optimizer.param_groups[0]["cautious"] = True  # another kernel, so another plan
    optimizer.step()
    graph.replay()
    torch.cuda.synchronize()
    del graph
    before = torch.cuda.memory_allocated()
    optimizer.forget_graphs()
    assert before - torch.cuda.memory_allocated() >= 8 * 4 * 970  # a chunk is 8 bytes for each 1024 elements


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize(
    ("options", "stepped", "cause"),
    [({}, True, "capturable=True"), ({}, False, "capturable=True"), ({"capturable": True}, False, "warm-up step")],
)
def test_capture_is_refused(options, stepped, cause):
    optimizer = AdamW(make_params(2), **options)
    if stepped:
        optimizer.step()
    with pytest.raises(RuntimeError, match=cause):
        captured(optimizer.step)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("groups", [1, 5])
def test_no_synchronisation_around_the_step(capturable, groups):
    params = make_params(10)
    optimizer = AdamW(
        [{"params": params[i::groups], "lr": 1e-3 * (i + 1)} for i in range(groups)],
        capturable=capturable,
        fused=True,
        max_grad_norm=1.0,
        skip_nonfinite=True,
        statistics=True,
    )
    optimizer.grad_scale, optimizer.found_inf = torch.ones(1, device="cuda"), torch.zeros(1, device="cuda")
    optimizer.step()
    with no_synchronisation():
        for i in range(3):
            replace_grads(params)
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 / (i + 1)
            optimizer.step()
            assert optimizer.grad_norm is not None and optimizer.update_norm is not None


def test_memory_of_gradient_release():
    """Of 20 equal gradients, at most two are alive at once."""
    size = 4 * 1_000_000
    params = nn.ParameterList([nn.Parameter(torch.randn(1_000_000, device="cuda")) for _ in range(20)])
    optimizer = AdamW(params)
    handle = register_gradient_release(params, optimizer)

    def backward():
        torch.autograd.backward([(p * p).sum() for p in params])

    backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    losses = [(p * p).sum() for p in params]
    before = torch.cuda.memory_allocated()
    torch.autograd.backward(losses)
    temporaries = 2 * size  # of the backward pass of p * p itself
    assert torch.cuda.max_memory_allocated() - before <= 2 * size + temporaries + 2**20
    assert all(p.grad is None for p in params)
    handle.remove()
