"""Where a rank's part of a DTensor is in the whole, against a tensor of indices that is cut up as torch cuts."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from adamw_triton.sharding import Sharding
from adamw_triton.storage import GROUP_SIZE, NoiseKey, scale_shape


def cut(tensor, placement, size, coordinate):
    """As torch.chunk does, empty where there are fewer chunks."""
    chunks = tensor.chunk(size, placement.dim)
    return chunks[coordinate] if coordinate < len(chunks) else tensor.narrow(placement.dim, 0, 0)


def part_of(whole, sizes, coordinate, placements):
    """Dimensions of the mesh from left to right, but those of FSDP2 over tensor parallel after what they split."""
    strided = [i for i, p in enumerate(placements) if isinstance(p, _StridedShard)]
    plain = [i for i, p in enumerate(placements) if isinstance(p, Shard) and i not in strided]
    for i in plain + strided[::-1]:
        whole = cut(whole, placements[i], sizes[i], coordinate[i])
    return whole


def sharding_of(shape, sizes, coordinate, placements, stride=None):
    like = torch.empty(shape, device="meta")
    mesh = SimpleNamespace(shape=sizes, get_coordinate=lambda: list(coordinate))
    return Sharding(
        SimpleNamespace(
            _spec=None,
            device_mesh=mesh,
            placements=placements,
            shape=like.shape,
            dtype=like.dtype,
            stride=lambda: stride or like.stride(),
        )
    )


def everywhere(shape, sizes, placements, stride=None):
    """Each rank's sharding, and the indices in the whole of its elements."""
    order = sorted(range(len(shape)), key=lambda d: -(stride or torch.empty(shape, device="meta").stride())[d])
    whole = (
        torch.arange(math.prod(shape))
        .reshape([shape[d] for d in order])
        .permute([order.index(d) for d in range(len(shape))])
    )  # each element has its place in memory
    for coordinate in itertools.product(*map(range, sizes)):
        part = part_of(whole, sizes, coordinate, placements)
        in_memory = part.permute(order).reshape(-1)
        yield sharding_of(shape, sizes, coordinate, placements, stride), part, in_memory


shards = st.one_of(st.just(Replicate()), st.integers(0, 2).map(Shard))


@given(
    st.lists(st.integers(1, 9), min_size=3, max_size=3),
    st.lists(st.tuples(st.integers(1, 4), shards), min_size=1, max_size=3),
    st.permutations(range(3)),
)
@settings(max_examples=150, deadline=None)
def test_parts(shape, mesh, order):
    """Any placements over meshes of up to 3 dimensions, shapes of up to 9 x 9 x 9, any order of strides."""
    sizes, placements = [size for size, _ in mesh], [placement for _, placement in mesh]
    stride = [0] * 3
    weight = 1
    for d in reversed(order):
        stride[d], weight = weight, weight * shape[d]
    indexed = set()
    for sharding, part, in_memory in everywhere(shape, sizes, placements, tuple(stride)):
        indexed.add(sharding.has_indices)
        ranges = sharding.ranges(sharding.shape, placements)
        assert [stop - start for start, stop in ranges] == list(part.shape)
        if sharding.has_indices:
            key = NoiseKey(0, 0, *sharding.position)
            assert torch.equal(key.indices(part.numel(), part.device), in_memory)
    assert len(indexed) == 1, "all ranks say the same"
    distinct = {p.dim for size, p in mesh if isinstance(p, Shard) and size > 1 and shape[p.dim] > 1}
    if len(distinct) <= 1:
        assert indexed == {True}


SHAPES = [(8, 6), (7, 3), (5, 4), (3, 128), (1, 5), (17,)]


@pytest.mark.fast
@pytest.mark.parametrize(("shape", "dim"), [(shape, dim) for shape in SHAPES for dim in range(len(shape))], ids=str)
@pytest.mark.parametrize(("data", "tensor"), [(2, 2), (2, 4), (4, 2), (3, 3), (4, 1), (1, 4)])
def test_parts_of_fsdp2_over_tensor_parallel(shape, dim, data, tensor):
    """Tensor parallel splits first, then FSDP2 splits the rows of what each rank has."""
    over = _StridedShard(0, split_factor=tensor) if dim == 0 and tensor > 1 else Shard(0)
    for sharding, part, in_memory in everywhere(shape, (data, tensor), [over, Shard(dim)]):
        assert sharding.has_indices
        key = NoiseKey(0, 0, *sharding.position)
        assert torch.equal(key.indices(part.numel(), part.device), in_memory)


def test_what_has_no_indices():
    """A part of several pieces that no regular pattern tells, and one cut in three dimensions."""
    for sharding, _, _ in everywhere((8, 4), (2, 2), [_StridedShard(0, split_factor=4), Replicate()]):
        assert not sharding.has_indices and sharding.ranges((8, 4), sharding.placements) is None
    for sharding, _, _ in everywhere((8, 4, 6), (2, 2, 2), [Shard(0), Shard(1), Shard(2)]):
        assert not sharding.has_indices


def test_partial():
    assert sharding_of((4,), (2,), (0,), [Partial()]).is_partial
    assert not sharding_of((4,), (2,), (0,), [Shard(0)]).is_partial


CODES = [  # shape, sizes of the mesh, placements, whether moments can have 8 bits
    ((10, 256), (4,), [Shard(0)], True),
    ((3, 256), (4,), [Shard(0)], True),
    ((10, 256), (2,), [Shard(1)], True),
    ((10, 256), (4,), [Shard(1)], False),  # parts of rows of 64
    ((10, 384), (2,), [Shard(1)], False),
    ((10, 512), (2, 2), [Shard(1), Shard(1)], True),
    ((10, 512), (2, 2), [Shard(0), Shard(1)], True),
    ((10, 512), (4, 2), [Replicate(), Shard(1)], True),
    ((10, 200), (2,), [Shard(0)], False),
    ((256,), (2,), [Shard(0)], False),
    ((6, 4, 128), (2,), [Shard(1)], True),
    ((6, 3, 128), (2,), [Shard(1)], False),  # uneven
    ((6, 4, 128), (2,), [Shard(2)], False),  # not in one piece
    ((6, 1, 256), (2,), [Shard(2)], True),
    ((8, 512), (2, 2), [_StridedShard(0, split_factor=2), Shard(0)], True),
]


@pytest.mark.parametrize(("shape", "sizes", "placements", "allowed"), CODES, ids=str)
def test_where_moments_can_have_8_bits(shape, sizes, placements, allowed):
    """Each rank has whole groups of 128 elements, and its scales are those of its groups."""
    for sharding, _, in_memory in everywhere(shape, sizes, placements):
        assert sharding.allows_codes == allowed
        if not allowed:
            continue
        groups = in_memory.reshape(-1, GROUP_SIZE) // GROUP_SIZE  # of each element in the whole
        assert torch.equal(groups, groups[:, :1].expand_as(groups))
        of_scales, stride, placed = sharding.layout("exp_avg_scale", torch.float32)
        assert of_scales == scale_shape(torch.empty(shape, device="meta")) and stride == (of_scales[1], 1)
        ranges = sharding.ranges(of_scales, placed)
        (first_row, last_row), (first, last) = ranges
        scales = torch.arange(math.prod(of_scales)).reshape(of_scales)[first_row:last_row, first:last]
        assert torch.equal(scales.reshape(-1), groups[:, 0])


def test_layout_of_remainders():
    sharding = sharding_of((4, 6), (2,), (0,), [Shard(1)])
    assert sharding.layout("param_remainder", torch.uint8) == ((4, 6, 2), (12, 2, 1), (Shard(1),))
    assert sharding.layout("param_remainder", torch.int8) == ((4, 6), (6, 1), (Shard(1),))
