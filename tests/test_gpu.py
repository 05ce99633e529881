"""What only a GPU can show: streams, devices, synchronisation, memory, compilations, IEEE rounding."""

import copy

import pytest
import torch
from torch import nn

from adamw_triton import AdamW, launch

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
