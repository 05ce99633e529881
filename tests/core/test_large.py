"""Offsets beyond 2^31 elements, without the memory for them: the last blocks of a tensor that begins elsewhere."""

import pytest
import torch
from helpers import Guarded, assert_step, random_state, scalars_row

from adamw_triton import launch, storage
from adamw_triton.functional import step_tensor_eager
from adamw_triton.hyperparams import Hyperparams
from adamw_triton.storage import Formats, NoiseKey, StateTensors

OPTIONS = {"lr": 3e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
HYPER = Hyperparams.from_group(OPTIONS)


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
        chunks=torch.tensor([[0, first], [0, first + 1], [0, first + 2]], dtype=torch.int32, device=device),
        formats=Formats(*(dtype,) * 4),
        amsgrad=False,
        aligned=True,
        rounding="nearest",
        seed=0,
        configuration=configuration,
    )
    grads = torch.tensor([grad], device=device)
    launch.launch_table(table, grads, scalars_row(HYPER, 5, device), maximize=False)
    guard.assert_untouched()
    assert_step(before, tensors, step=5, **OPTIONS)


@pytest.mark.parametrize("far", [2**31, 2**36 + 4096], ids=lambda n: f"{n:.3g}")
@pytest.mark.parametrize("stochastic", [False, True])
def test_last_blocks_of_a_large_tensor_with_coded_state(stochastic, far, device):
    """The same with scales and random bits, whose indices count from the beginning; the reference has an offset."""
    noise_key = NoiseKey(seed=5, param_index=3, element_offset=far) if stochastic else None
    used = Formats(*(torch.bfloat16,) * 2, torch.int8, torch.uint8, torch.int8, stochastic)
    configuration = launch.configuration_of(*used.dtypes)
    n = 2 * configuration.block_size + 77
    param, grad, m = (torch.randn(n, device=device) for _ in range(3))
    states = []
    for _ in range(2):
        (exp_avg, m_scale), (exp_avg_sq, v_scale) = storage.encode("exp_avg", m), storage.encode("exp_avg_sq", m * m)
        remainder = torch.zeros(n, dtype=torch.int8, device=device)
        states.append((param.bfloat16(), StateTensors(exp_avg, exp_avg_sq, None, remainder, m_scale, v_scale)))
    (ours, state), (theirs, other) = states
    grad = grad.bfloat16()
    sizes = [far * t.nbytes // n if t.numel() == n else far // 128 * 4 for t in state.present]
    addresses = [t.data_ptr() - size for t, size in zip(state.present, sizes, strict=True)]
    row = [far + n, ours.data_ptr() - 2 * far, *addresses, *([noise_key.param_index] if noise_key else [])]
    first = far // configuration.block_size
    table = launch.Table(
        tensors=torch.tensor([row], device=device),
        chunks=torch.tensor([[0, first + i] for i in range(3)], dtype=torch.int32, device=device),
        formats=used,
        amsgrad=False,
        aligned=True,
        rounding="stochastic" if stochastic else "nearest",
        seed=5,
        configuration=configuration,
    )
    grads = torch.tensor([grad.data_ptr() - 2 * far], device=device)
    launch.launch_table(table, grads, scalars_row(HYPER, 5, device), maximize=False)
    step_tensor_eager(theirs, grad, other, HYPER, 5.0, maximize=False, noise_key=noise_key)
    weights = storage.join(ours, state.master), storage.join(theirs, other.master)
    torch.testing.assert_close(*weights, rtol=2.0**-15, atol=1e-6)
    if not stochastic:
        assert (ours == theirs).float().mean() > 0.99
    for name in ("exp_avg", "exp_avg_sq"):
        assert ((getattr(state, name).long() - getattr(other, name).long()).abs() <= 1).all()
        torch.testing.assert_close(getattr(state, f"{name}_scale"), getattr(other, f"{name}_scale"), rtol=1e-5, atol=0)


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
