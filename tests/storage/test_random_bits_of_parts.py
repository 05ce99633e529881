"""Random bits of a part of a parameter are those of the whole: they depend on where an element is in it."""

import pytest
import torch
from helpers import scalars_row
from hypothesis import given, settings
from hypothesis import strategies as st

from adamw_triton import launch, storage
from adamw_triton.functional import step_tensor_eager
from adamw_triton.hyperparams import Hyperparams
from adamw_triton.launch import Table
from adamw_triton.storage import NoiseKey, StateTensors

HYPER = Hyperparams(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
# Offsets, row sizes and row strides: multiples of 8 and others, rows shorter and longer than a block, far away.
PARTS = [
    (8, 0, 0),
    (13, 0, 0),
    (2**33 + 40, 0, 0),
    (2**35 * 8 - 8 * 100, 0, 0),  # the counter's low word ends within
    (0, 64, 256),
    (128, 64, 256),
    (48, 16, 2**31),
    (5, 33, 100),
    (3, 1, 7),
    (2**34 + 1, 1500, 3001),
    (16, 4096, 2**33),
    (7, 2**31 + 8, 2**32),
]


def wholes(part, n):
    """The definition, one element at a time."""
    offset, row_size, row_stride = part
    return [offset + (i // row_size * row_stride + i % row_size if row_size else i) for i in range(n)]


@given(st.integers(0, 2**40), st.integers(0, 300), st.integers(0, 1000), st.integers(1, 700))
@settings(deadline=None, max_examples=60)
def test_indices_of_a_part(offset, row_size, more, n):
    part = (offset, row_size, row_size + more if row_size else 0)
    key = NoiseKey(1, 2, *part)
    assert key.indices(n, torch.device("cpu")).tolist() == wholes(part, n)
    assert key.is_of_part == (part != (0, 0, 0))


@pytest.mark.fast
@pytest.mark.parametrize("part", PARTS, ids=str)
def test_bits_of_a_part_are_those_of_its_elements(part):
    """Bit for bit, each element on its own."""
    n = 100
    device = torch.device("cpu")
    ours = [torch.stack(list(storage.noise(NoiseKey(3, 4, *part), 7, n, None, device)))]
    alone = [
        torch.cat([bits[:1] for bits in storage.noise(NoiseKey(3, 4, index), 7, 1, None, device)])
        for index in wholes(part, n)
    ]
    assert torch.equal(ours[0], torch.stack(alone, dim=1))


def tensors(n, seed):
    generator = torch.Generator().manual_seed(seed)
    param, grad, m, v = (torch.randn(n, generator=generator) for _ in range(4))
    # Values that bf16 has, so that nothing but what is stored is rounded, and gradients far above: all bits count.
    state = StateTensors(m.bfloat16(), (v * v).bfloat16())
    return param.bfloat16(), grad.bfloat16(), state


def on(device, param, grad, state):
    return param.to(device), grad.to(device), state.map(lambda tensor: tensor.to(device))


@pytest.mark.parametrize("as_table", [False, True], ids=["tensor", "table"])
@pytest.mark.parametrize("part", PARTS, ids=str)
def test_kernels_use_the_bits_of_a_part(part, as_table, device):
    """A kernel's step is that of the reference, but for the last bit of fp32 before rounding: few elements differ."""
    n = 5000
    key = NoiseKey(2**40 + 3, 5, *part)
    theirs = tensors(n, 0)
    ours = on(device, *tensors(n, 0))
    options = {"maximize": False, "cautious": False}
    if as_table:  # with another tensor, which is no part
        other = on(device, *tensors(333, 1))
        expected = tensors(333, 1)
        keys = [NoiseKey(key.seed, 9), key]
        table = Table.of([other[0], ours[0]], torch.bfloat16, [other[2], ours[2]], aligned=False, noise_keys=keys)
        unaligned = any(number % 8 for number in part)
        assert table.rounding == ("stochastic part, unaligned" if unaligned else "stochastic part")
        grads = torch.tensor([other[1].data_ptr(), ours[1].data_ptr()], device=device)
        launch.launch_table(table, grads, scalars_row(HYPER, 3, device).expand(2, 8).contiguous(), **options)
        step_tensor_eager(*expected, HYPER, 3.0, noise_key=keys[0], **options)
        pairs = [(other, expected), (ours, theirs)]
    else:
        launch.launch_tensor(*ours, scalars_row(HYPER, 3, device), noise_key=key, **options)
        pairs = [(ours, theirs)]
    step_tensor_eager(*theirs, HYPER, 3.0, noise_key=key, **options)
    for got, wanted in pairs:
        for a, b in zip((got[0], *got[2].present), (wanted[0], *wanted[2].present), strict=True):
            assert (a.cpu() != b).float().mean() < 2e-3
        nearest = tensors(len(got[0]), 0 if got is ours else 1)
        step_tensor_eager(*nearest, HYPER, 3.0, **options)
        assert (got[0].cpu() != nearest[0]).float().mean() > 0.1, "and stochastic rounding is not to the nearest"


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_kernels_round_codes_by_the_bits_of_a_part(part, device):
    """The storage of 12 bytes; a part of other elements gives other codes."""
    n = 2048 + 128 * 3
    param, grad, m = (torch.randn(n, generator=torch.Generator().manual_seed(i)) for i in range(3))
    (exp_avg, m_scale), (exp_avg_sq, v_scale) = storage.encode("exp_avg", m), storage.encode("exp_avg_sq", m * m)

    def state():
        remainder = torch.zeros(n, dtype=torch.int8)
        made = StateTensors(exp_avg, exp_avg_sq, None, remainder, m_scale, v_scale)
        return made.map(torch.clone)

    ours = on(device, param.bfloat16(), grad.bfloat16(), state())
    launch.launch_tensor(*ours, scalars_row(HYPER, 3, device), maximize=False, noise_key=NoiseKey(1, 5, *part))
    found = []
    for key in (NoiseKey(1, 5, *part), NoiseKey(1, 5, part[0] + 8, *part[1:])):
        theirs = param.bfloat16(), grad.bfloat16(), state()
        step_tensor_eager(*theirs, HYPER, 3.0, maximize=False, noise_key=key)
        found.append((ours[2].exp_avg.cpu() != theirs[2].exp_avg).float().mean())
    assert found[0] < 5e-3
    assert found[1] > 0.1
