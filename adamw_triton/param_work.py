"""The parameters of a step, one by one: what is checked and noted of each before they are dealt out to launches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import launch
from .sharding import LocalEntries, Sharding
from .storage import Formats, NoiseKey, StorageOptions
from .validation import check_entries, check_grad, check_implementation, check_param, check_storage

ALIGNMENT = 16  # bytes of the widest access


class GradLayout(NamedTuple):
    """What a gradient's place in a launch depends on, but for its address."""

    type: type
    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    stride: tuple[int, ...]
    is_neg: bool

    @classmethod
    def of(cls, grad: Tensor) -> GradLayout:
        return cls(type(grad), grad.dtype, grad.device, grad.shape, grad.stride(), grad.is_neg())


@dataclass(eq=False)
class ParamWork:
    """One parameter that is to be stepped.

    Attributes:
        listed: the parameter as its group has it.
        param: what of it lies on this rank: the parameter itself, or a DTensor's local tensor; so of `grad`, `entries`.
        grad: None where it has none now, and had one before.
        group: index of its param group.
        index: in the list of all parameters, which tells its random bits apart.
        sharding: of a DTensor.
        norm_class: number of its class in `RankSums`.
        turn: 0, or a number that says when it is stepped: parameters that share memory cannot share a launch.
    """

    listed: Tensor
    param: Tensor
    grad: Tensor | None
    entries: MutableMapping[str, Any]
    group: int
    index: int
    sharding: Sharding | None = None
    norm_class: int = 0
    turn: int = 0

    @property
    def stored_entries(self) -> MutableMapping[str, Any]:
        """The entries as the optimizer's state has them."""
        return self.entries.entries if isinstance(self.entries, LocalEntries) else self.entries

    @property
    def allows_codes(self) -> bool:
        return self.sharding is None or self.sharding.allows_codes

    def check(self) -> None:
        """Refuse what cannot be stepped; see `validation` for what is raised."""
        if self.sharding is not None:
            self.sharding.check(self.stored_entries)
        check_param(self.param)
        if self.grad is not None:
            check_grad(self.param, self.grad)
        check_entries(self.param, self.entries)

    def see_gradient(self, known: Mapping[int, tuple[GradLayout, bool]]) -> None:
        """Note layout and alignment of the gradient that the tables are made for.

        Args:
            known: those of former gradients, by id of the parameter: of one that is missing, and of one that moves
                between aligned and unaligned addresses.
        """
        param = self.param
        layout, self.is_aligned = known.get(id(self.listed), (None, True))
        if self.grad is not None:
            layout = GradLayout.of(self.grad)
            self.is_aligned = self.is_aligned and self.grad.data_ptr() % ALIGNMENT == 0
        elif layout is None or layout.shape != param.shape:
            layout = GradLayout(Tensor, param.dtype, param.device, param.shape, param.stride(), False)
        self.grad_layout = layout

    def noise_key(self, seed: int, formats: Formats) -> NoiseKey | None:
        if not formats.stochastic:
            return None
        return (
            NoiseKey(seed, self.index) if self.sharding is None else NoiseKey(seed, self.index, *self.sharding.position)
        )


def first_occurrences(params: Sequence[Tensor]) -> list[int]:
    """Return the index of each parameter; one that is listed twice steps once."""
    first: dict[int, int] = {}
    for i, param in enumerate(params):
        first.setdefault(id(param), i)
    return list(first.values())


def complete(works: Sequence[ParamWork], groups: Sequence[Mapping[str, Any]]) -> None:
    """Bring the state of checked parameters into the formats of their groups."""
    for work in works:
        amsgrad = groups[work.group]["amsgrad"]
        storage = StorageOptions.from_group(groups[work.group])
        storage.complete(work.param, work.entries, amsgrad=amsgrad, allows_codes=work.allows_codes)


def check_works(works: Sequence[ParamWork], groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what cannot be stepped, before anything is written."""
    by_group: dict[int, list[Tensor]] = defaultdict(list)
    for work in works:
        work.check()
        if groups[work.group]["stochastic_rounding"] and not (work.sharding is None or work.sharding.has_indices):
            raise ValueError(
                f"stochastic rounding needs to know where in the whole parameter a rank's elements are; it cannot with "
                f"placements {work.sharding.placements} on {work.sharding.mesh}. Use stochastic_rounding=False"
            )
        by_group[work.group].append(work.param)
    for group, params in by_group.items():  # whose options may have changed since they were checked
        check_implementation(groups[group])
        check_storage(groups[group], params)
        if groups[group]["capturable"] and any(param.is_cuda and not launch.can_launch(param) for param in params):
            raise RuntimeError("capturable=True needs Triton on a GPU; install triton, or use capturable=False")


def is_ready(work: ParamWork, groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a parameter without a gradient can take part in the tables, to be stepped once it has one."""
    try:
        work.check()
        check_storage(groups[work.group], [work.param])
    except (RuntimeError, ValueError, TypeError):  # it is refused when it has a gradient
        return False
    return "step" in work.entries and StorageOptions.from_group(groups[work.group]).is_complete(
        work.param, work.entries, amsgrad=groups[work.group]["amsgrad"], allows_codes=work.allows_codes
    )


def set_turns(works: Sequence[ParamWork]) -> None:
    """Have parameters that share memory stepped one after the other: in one launch they would race."""
    extents = []
    for work in works:
        param = work.param
        if param.numel():
            span = 1 + sum((size - 1) * stride for size, stride in zip(param.shape, param.stride(), strict=True))
            extents.append((param.data_ptr(), param.data_ptr() + span * param.element_size(), work))
    extents.sort(key=lambda extent: extent[:2])
    reach, last = 0, None
    for start, end, work in extents:
        if start < reach and last is not None:
            last.turn, work.turn = 1 + last.index, 1 + work.index
        if end > reach:
            reach, last = end, work
