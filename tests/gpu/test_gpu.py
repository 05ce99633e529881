"""What only a GPU can show: streams, devices, synchronisation, memory, compilations, IEEE rounding."""

import copy

import pytest
import torch
from torch import nn

from adamw_triton import AdamW, launch, register_gradient_release
from adamw_triton.control import Control, Scaling

pytestmark = pytest.mark.gpu
OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}


def make(n=5, shape=(300, 70), device="cuda", dtype=torch.float32):
    ours = [nn.Parameter(torch.randn(shape, device=device).to(dtype)) for _ in range(n)]
    for p in ours:
        p.grad = torch.randn_like(p)
    theirs = copy.deepcopy(ours)
    for p, q in zip(ours, theirs, strict=True):
        q.grad = p.grad.clone()
    return ours, theirs


@pytest.mark.parametrize("foreach", [True, False])
def test_on_a_side_stream(foreach):
    """The step is ordered after what its stream computed, and the gradients' upload with it."""
    ours, theirs = make(shape=(2000, 500))
    mine = AdamW(ours, foreach=foreach, **OPTIONS)
    reference = torch.optim.AdamW(theirs, foreach=False, **OPTIONS)
    mine.step()
    reference.step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(10):
            torch.cuda._sleep(1_000_000)
            for p in ours:
                p.grad = p.detach() * 0.5 + 1  # new addresses, and values that are ready late
            mine.step()
    torch.cuda.current_stream().wait_stream(stream)
    for _ in range(10):
        for q in theirs:
            q.grad = q.detach() * 0.5 + 1
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("foreach", [True, False])
def test_parameters_on_several_devices(foreach):
    """In one group, and with another device current than theirs."""
    ours = [nn.Parameter(torch.randn(500, device=f"cuda:{i % 2}")) for i in range(4)]
    theirs = copy.deepcopy(ours)
    mine = AdamW(ours, foreach=foreach, **OPTIONS)
    reference = torch.optim.AdamW(theirs, foreach=False, **OPTIONS)
    for current in (0, 1, 0):
        with torch.cuda.device(current):
            for p, q in zip(ours, theirs, strict=True):
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
            mine.step()
            reference.step()
            assert torch.cuda.current_device() == current
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-7)


def test_cpu_and_gpu_parameters_in_one_group():
    ours, theirs = make(2)
    ours += make(1, device="cpu")[0]
    theirs += copy.deepcopy(ours[2:])
    theirs[2].grad = ours[2].grad.clone()
    AdamW(ours, **OPTIONS).step()
    torch.optim.AdamW(theirs, foreach=False, **OPTIONS).step()
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("lr", ["float", "tensor"])
def test_no_synchronisation(foreach, dtype, amp, lr):
    ours, _ = make(dtype=dtype)
    rate = torch.tensor(1e-2, device="cuda") if lr == "tensor" else 1e-2
    optimizer = AdamW(ours, lr=rate, foreach=foreach, fused=amp)
    if amp:
        optimizer.grad_scale, optimizer.found_inf = torch.ones(1, device="cuda"), torch.zeros(1, device="cuda")
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            for p in ours:
                p.grad = p.grad.clone()  # so that addresses are uploaded
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_of_a_step():
    """No temporaries: what a step adds is the plan's tables, and only at the first."""
    ours, _ = make(8, (1000, 1000))
    optimizer = AdamW(ours)
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


def test_nothing_recompiles():
    """Over steps, learning rates, sizes and addresses, once each dtype and alignment has been seen."""

    def compiled():
        return sum(
            len(caches[0])
            for kernel in (launch.adamw_kernel, launch.adamw_table_kernel)
            for caches in kernel.device_caches.values()
        )

    def run(shapes, lr, steps):
        for foreach in (True, False):
            params = [nn.Parameter(torch.randn(shape, device="cuda")) for shape in shapes]
            optimizer = AdamW(params, lr=lr, foreach=foreach)
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = lr / (step + 1)
                for p in params:
                    p.grad = torch.randn_like(p)
                optimizer.step()

    run([(64,), (100,)], 1e-3, 3)
    known = compiled()
    run([(1,), (16,), (17,), (1024,), (100_000,), (3, 5)], 1.0, 20)
    run([(1,)] * 2, 0.0, 2)
    assert compiled() == known


def test_bitwise_deterministic():
    ours, theirs = make()
    for params in (ours, theirs):
        optimizer = AdamW(params, **OPTIONS)
        for _ in range(3):
            optimizer.step()
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_capture_is_refused():
    ours, _ = make(2)
    optimizer = AdamW(ours)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="cannot be captured"), torch.cuda.graph(graph):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_random_tensor_against_torch_fused(dtype):
    """Ten million elements, where torch's fused kernel is an oracle too."""
    ours, theirs = make(1, (10_000_019,), dtype=dtype)
    options = {**OPTIONS, "eps": 1e-6}
    mine, reference = AdamW(ours, **options), torch.optim.AdamW(theirs, fused=True, **options)
    for _ in range(3):
        mine.step()
        reference.step()
    ulp = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    torch.testing.assert_close(ours, theirs, rtol=ulp, atol=ulp * 0.1)


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
        control = Control(param.device)
        numels = torch.tensor([param.numel()], device="cuda")
        addresses = torch.tensor([param.grad.data_ptr()], device="cuda")
        table = launch.NormTable.of(addresses, numels, [0], first=0, dtype=torch.bfloat16, aligned=True)
        partials = torch.zeros(table.spans.shape[0] + 1, dtype=torch.float64, device="cuda")
        arrived = torch.zeros(1, dtype=torch.int32, device="cuda")
        launch.launch_norms([table], partials, arrived, control, Scaling(), None, None)
        exact = float(param.grad[0].double()) * param.numel() ** 0.5
        assert abs(float(control.values[2]) / exact - 1) < 1e-6
        assert arrived.item() == 0


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


def test_graph_of_the_step_alone():
    ours, theirs = make(4)
    options = {**OPTIONS, "capturable": True, "max_grad_norm": 1.0}
    mine, other = AdamW(ours, **options), AdamW(theirs, **options)
    for p, q in zip(ours, theirs, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    mine.step()
    other.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mine.step()
    for p in ours:
        p.grad.normal_()
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            q.grad.copy_(p.grad)
        graph.replay()
        other.step()
        assert all(map(torch.equal, ours, theirs))
    with pytest.raises(RuntimeError, match="zero_grad"):
        mine.zero_grad()


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("groups", [1, 5])
def test_no_synchronisation_around_the_step(capturable, groups):
    ours, _ = make(10)
    optimizer = AdamW(
        [{"params": ours[i::groups], "lr": 1e-3 * (i + 1)} for i in range(groups)],
        capturable=capturable,
        fused=True,
        max_grad_norm=1.0,
        skip_nonfinite=True,
        statistics=True,
    )
    optimizer.grad_scale, optimizer.found_inf = torch.ones(1, device="cuda"), torch.zeros(1, device="cuda")
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(3):
            for p in ours:
                p.grad = p.grad.clone()
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 / (i + 1)
            optimizer.step()
            assert optimizer.grad_norm is not None and optimizer.update_norm is not None
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_of_gradient_release():
    """Of 20 equal gradients, at most two are alive at once."""
    size = 4 * 1_000_000
    params = nn.ParameterList([nn.Parameter(torch.randn(1_000_000, device="cuda")) for _ in range(20)])
    optimizer = AdamW(params)
    register_gradient_release(params, optimizer)

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
