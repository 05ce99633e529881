"""Offsets beyond 2^31 elements, without the memory for them: the last blocks of a tensor that begins elsewhere."""

import pytest
import torch
from helpers import Guarded, assert_step, random_state

from adamw_triton import launch
from adamw_triton.scalars import Hyper, host_scalars
from adamw_triton.storage import Storage

OPTIONS = {"lr": 3e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
HYPER = Hyper.of(OPTIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("far", [2**31 - 2048, 2**31, 2**32 + 1024, 2**40], ids=lambda n: f"{n:.3g}")
def test_last_blocks_of_a_large_tensor(dtype, far, device):
    """The table says that the tensor begins `far` elements before its memory and ends with it."""
    configuration = launch.configuration_of(*[dtype] * 4)
    size = configuration.block_size
    guard = Guarded()
    tensors = [guard.place(t) for t in random_state((2 * size + 77,), (dtype,) * 4, device)]
    before = [t.clone() for t in tensors]
    param, grad, exp_avg, exp_avg_sq = (t.data_ptr() - far * t.element_size() for t in tensors)
    first = far // size
    table = launch.Table(
        tensors=torch.tensor([[far + tensors[0].numel(), param, exp_avg, exp_avg_sq]], device=device),
        grads=torch.tensor([grad], device=device),
        chunks=torch.tensor([[0, first], [0, first + 1], [0, first + 2]], dtype=torch.int32, device=device),
        storage=Storage(*(dtype,) * 4),
        amsgrad=False,
        aligned=True,
        seed=0,
        configuration=configuration,
    )
    launch.launch_table(table, host_scalars(HYPER, 5), maximize=False)
    guard.assert_untouched()
    assert_step(before, tensors, step=5, **OPTIONS)


@pytest.mark.gpu
@pytest.mark.parametrize("foreach", [True, False])
def test_more_than_two_to_the_31_elements(foreach):
    """All of one, in bf16: 4 x 4.3 GB."""
    from adamw_triton import AdamW

    n = 2**31 + 4097
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free device memory")
    param = torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16, device="cuda"))
    param.grad = torch.ones_like(param)
    optimizer = AdamW([param], lr=0.5, weight_decay=0.0, foreach=foreach)
    optimizer.step()
    # The first update is lr * g / |g| everywhere: 1 - 0.5.
    for start in range(0, n, 2**28):
        assert (param.detach()[start : start + 2**28] == 0.5).all(), start
    assert (optimizer.state[param]["exp_avg"][-5000:] == torch.tensor(0.1).bfloat16()).all()
