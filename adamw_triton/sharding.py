"""Where the part of a DTensor that lies on this rank is in the whole, and state that lies as its parameter does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .dtensors import dtensor_class, is_dtensor, local
from .storage import CODED, GROUP_SIZE, MASTER_ENTRIES, scale_shape

_SCALES = tuple(coded.scale for coded in CODED.values())
_CODES = tuple(coded.codes for coded in CODED.values())
_ENTRIES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", *_CODES, *_SCALES, *MASTER_ENTRIES)


class Sharding:
    """Mesh, placements, shape and strides of a DTensor, and what follows from them.

    Args:
        tensor: a DTensor.

    Attributes:
        spec: of the tensor; the same object as long as nothing of it changes.
    """

    def __init__(self, tensor: Any) -> None:
        self.spec = tensor._spec
        self.mesh, self.placements = tensor.device_mesh, tuple(tensor.placements)
        self.shape = tensor.shape
        like = torch.empty_strided(self.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        self.like = torch.empty_like(like)
        self._sizes = tuple(self.mesh.shape)

    @property
    def groups(self) -> list[Any]:
        """The process groups that have different parts; ranks of others have the same."""
        if self.mesh.get_coordinate() is None:
            return []
        return [self.mesh.get_group(i) for i, size in enumerate(self._sizes) if size > 1 and self._is_shard(i)]

    @property
    def is_partial(self) -> bool:
        return any(placement.is_partial() for placement in self.placements)

    @property
    def has_indices(self) -> bool:
        """Whether `position` can tell where the local elements are: the same on every rank."""
        sharded = self._sharded_in_order()
        return self._splits(self.placements) is not None and (
            len(sharded) <= 1 or (len(sharded) == 2 and sharded[0] == 0)
        )

    @property
    def position(self) -> tuple[int, int, int]:
        """Where the local elements are: the last three fields of a `NoiseKey`."""
        ranges = self.ranges(self.shape, self.placements)
        assert ranges is not None
        order, sharded = self._order(), self._sharded_in_order()
        weights = [math.prod(self.shape[d] for d in order[k + 1 :]) for k in range(len(order))]
        offset = sum(ranges[order[k]][0] * weights[k] for k in sharded)
        if not sharded or sharded[-1] == 0:
            return offset, 0, 0
        dim, weight = order[sharded[-1]], weights[sharded[-1]]
        start, stop = ranges[dim]
        return offset, (stop - start) * weight, self.shape[dim] * weight

    @property
    def allows_codes(self) -> bool:
        """Whether 8-bit moments are possible: each rank has whole groups of rows. The same on every rank."""
        if scale_shape(self.like) is None:
            return False
        row = math.prod(self.shape[1:])
        order = self._order()
        for dim in {d for d in map(self._dim, range(len(self._sizes))) if d}:
            shards = math.prod(size for i, size in enumerate(self._sizes) if self._dim(i) == dim)
            outermost = next((d for d in order if d != 0), None)
            if dim != outermost or self.shape[dim] % shards or row // shards % GROUP_SIZE:
                return False
        return True

    def ranges(self, shape: Sequence[int], placements: Sequence[Any]) -> list[tuple[int, int]] | None:
        """Return begin and end of this rank's part in each dimension; None if it is not in one piece."""
        splits, coordinate = self._splits(placements), self.mesh.get_coordinate()
        if splits is None or coordinate is None:
            return None
        ranges = [(0, size) for size in shape]
        for i in splits:
            start, stop = ranges[placements[i].dim]
            chunk = -(-(stop - start) // self._sizes[i])  # as torch.chunk splits
            first = min(stop, start + chunk * coordinate[i])
            ranges[placements[i].dim] = first, min(stop, first + chunk)
        return ranges

    def layout(self, name: str, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, ...], tuple[Any, ...]]:
        """Return global shape, strides and placements of a state entry.

        Args:
            name: of any but the step count.
            dtype: of the entry.
        """
        if name in _SCALES:
            shape = scale_shape(self.like)
            assert shape is not None
            columns = [self._with_dim(p, 1) if (self._dim(i) or 0) > 1 else p for i, p in enumerate(self.placements)]
            return shape, (shape[1], 1), tuple(columns)
        if name == "param_remainder" and dtype == torch.uint8:
            return (*self.shape, 2), (*(2 * stride for stride in self.like.stride()), 1), self.placements
        return tuple(self.shape), self.like.stride(), self.placements

    def wrap(self, name: str, value: Tensor) -> Any:
        """Return a state entry as a DTensor, given what of it lies on this rank."""
        return _dtensor(value, self.spec, *self.layout(name, value.dtype))

    def part_of(self, name: str, value: Tensor) -> Any:
        """Return a state entry as a DTensor, given the whole of it on every rank.

        Raises:
            ValueError: this rank's part is not one piece.
        """
        shape, _, placements = self.layout(name, value.dtype)
        ranges = self.ranges(shape, placements)
        if ranges is None:
            raise ValueError(
                f"loaded state {name!r} is a plain tensor, and with its parameter's placements {self.placements} a "
                f"rank has several pieces; load with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
            )
        part = value.reshape(shape)
        for dim, (start, stop) in enumerate(ranges):
            part = part.narrow(dim, start, stop - start)
        return self.wrap(name, part.clone())

    def check(self, entries: Mapping[str, Any]) -> None:
        """Refuse a DTensor that cannot be stepped, or state that does not lie as it does.

        Raises:
            RuntimeError: a parameter of sums still to be made, or of `check_entry`.
        """
        if self.is_partial:
            raise RuntimeError(
                f"a parameter (shape {tuple(self.shape)}) has placements {self.placements}: sums that are still to be "
                f"made cannot be stepped; redistribute it to Replicate() or Shard()"
            )
        for name, value in entries.items():
            if name in _ENTRIES:
                self.check_entry(name, value)

    def check_entry(self, name: str, value: object) -> None:
        """Refuse a state entry that does not lie as its parameter does; decided from what every rank sees.

        Raises:
            RuntimeError: a plain tensor, or one on another mesh, with other placements or of another shape.
        """
        if not isinstance(value, Tensor):
            return  # refused with its name elsewhere
        advice = "load it with load_state_dict, or torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
        if not is_dtensor(value):
            raise RuntimeError(
                f"state {name!r} is a plain tensor of shape {tuple(value.shape)}, its parameter a DTensor "
                f"({tuple(self.shape)}, {self.placements}); {advice}"
            )
        tensor: Any = value
        if name in _SCALES and not self.allows_codes:
            raise RuntimeError(
                f"state {name!r} is of 8-bit moments, of which the ranks of {self.placements} on {self.mesh} would not "
                f"have whole groups of {GROUP_SIZE} elements; {advice}"
            )
        shape, _, placements = self.layout(name, value.dtype)
        if tensor.device_mesh != self.mesh or tuple(tensor.placements) != placements or tuple(tensor.shape) != shape:
            raise RuntimeError(
                f"state {name!r} ({tuple(tensor.shape)}, {tuple(tensor.placements)} on {tensor.device_mesh}) must be "
                f"of shape {shape}, {placements} on {self.mesh}, as its parameter is; {advice}"
            )

    def _dim(self, mesh_dim: int) -> int | None:
        """Return the dimension that is sharded over one of the mesh."""
        placement = self.placements[mesh_dim]
        return placement.dim % len(self.shape) if self._is_shard(mesh_dim) else None

    def _is_shard(self, mesh_dim: int) -> bool:
        return _is_shard(self.placements[mesh_dim])

    @staticmethod
    def _with_dim(placement: Any, dim: int) -> Any:
        factor = getattr(placement, "split_factor", None)
        return type(placement)(dim) if factor is None else type(placement)(dim, split_factor=factor)

    def _splits(self, placements: Sequence[Any]) -> list[int] | None:
        """Return the dimensions of the mesh in the order in which they split a tensor; None if not into single pieces.

        FSDP2 splits what is split already by a later dimension, which its _StridedShard says.
        """
        strided = [i for i, p in enumerate(placements) if _is_shard(p) and getattr(p, "split_factor", 1) > 1]
        for i in strided:
            later = [j for j in range(i + 1, len(placements)) if _is_shard(placements[j])]
            factors = [self._sizes[j] for j in later if placements[j].dim == placements[i].dim]
            if placements[i].split_factor != math.prod(factors):
                return None
        plain = [i for i, p in enumerate(placements) if _is_shard(p) and i not in strided]
        return plain + strided[::-1]

    def _order(self) -> list[int]:
        """Return the dimensions from the outermost in memory inwards, but for those of size 1."""
        strides = self.like.stride()
        return sorted((d for d, size in enumerate(self.shape) if size != 1), key=lambda d: -strides[d])

    def _sharded_in_order(self) -> list[int]:
        """Return the places in this order of the dimensions of which ranks have different parts."""
        sharded = {self._dim(i) for i, size in enumerate(self._sizes) if size > 1}
        return [k for k, dim in enumerate(self._order()) if dim in sharded]


class LocalEntries(MutableMapping):
    """A DTensor's state as that of its local tensor: what is put in becomes a DTensor, what is read is its local one.

    Args:
        entries: of the optimizer's state.
        sharding: of the parameter.
    """

    def __init__(self, entries: MutableMapping[str, Any], sharding: Sharding) -> None:
        self.entries, self._sharding = entries, sharding

    def __getitem__(self, name: str) -> Any:
        return local(self.entries[name])

    def __setitem__(self, name: str, value: Any) -> None:
        is_whole = name == "step" or not isinstance(value, Tensor)
        self.entries[name] = value if is_whole else self._sharding.wrap(name, value)

    def __delitem__(self, name: str) -> None:
        del self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def local_entries(param: Tensor, entries: MutableMapping[str, Any]) -> tuple[Tensor, MutableMapping[str, Any]]:
    """Return what of a parameter, and of its state, lies on this rank; what is put into the state is put into both."""
    if not is_dtensor(param):
        return param, entries
    return local(param), LocalEntries(entries, Sharding(param))


def like_dtensor(value: Tensor, tensor: Any) -> Any:
    """Return the DTensor of a local tensor that lies as another's does, in a dtype of its own."""
    return _dtensor(value, tensor._spec, tensor.shape, tensor.stride(), tensor.placements)


def _dtensor(value: Tensor, spec: Any, shape: Sequence[int], stride: Sequence[int], placements: Sequence[Any]) -> Any:
    # Not by from_local, which takes what is offloaded to the CPU to the mesh's device.
    meta = type(spec.tensor_meta)(torch.Size(shape), tuple(stride), value.dtype)
    return dtensor_class()(value, type(spec)(spec.mesh, tuple(placements), tensor_meta=meta), requires_grad=False)


def _is_shard(placement: Any) -> bool:
    return getattr(placement, "dim", None) is not None and not placement.is_partial()
