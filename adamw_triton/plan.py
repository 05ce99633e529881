"""Which tensors go in which launch, and when that has to be thought over.

Between two steps almost nothing changes: the addresses of the gradients and a few scalars. A `Plan` holds the
rest: tensors in buckets, one launch each. `Plan.gradients` looks, in a few passes over lists, for everything
that would make the plan wrong: parameters, state and options are the user's to replace.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import attrgetter, is_, itemgetter, or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import launch
from .checks import check_entries, check_grad, check_implementation, check_param, check_storage
from .functional import step_tensor, step_tensor_reference
from .layout import is_dense, same_strides
from .scalars import Hyper, Scalars, device_scalars, host_scalars
from .state import State
from .storage import Policy, Rounding, Storage, TensorState

_ALIGNMENT = 16  # bytes of the widest access
# The options that a plan is built for; all others are read at every step.
_structural_of = itemgetter("foreach", "amsgrad", "maximize", "capturable", "differentiable", *Policy._fields)
_grad_of = attrgetter("grad")


class _Key(NamedTuple):
    """What the tensors of one bucket have in common."""

    group: int
    wave: int  # parameters that share memory are stepped one after the other
    device: torch.device
    step: float  # updates so far
    form: str  # "table", "tensors" or "reference"
    storage: Storage
    aligned: bool


class _Item:
    """One parameter with a gradient."""

    def __init__(self, param: Tensor, grad: Tensor, entries: dict[str, Any], group: int, number: int) -> None:
        self.param = param
        self.grad = grad
        self.entries = entries
        self.group = group
        self.number = number  # among all parameters: the stream of its random bits
        self.wave = 0

    def check(self) -> None:
        check_param(self.param)
        check_grad(self.param, self.grad)
        check_entries(self.param, self.entries)

    def key(self, group: Mapping[str, Any], step: float) -> _Key:
        state = TensorState.of(self.entries, group["amsgrad"])
        like_param = (self.param, self.grad, *(tensor for tensor in state[:4] if tensor is not None))
        walkable = (
            is_dense(self.param)
            and same_strides(self.param, self.grad)
            and not self.param.is_complex()
            and not self.grad.is_neg()
            and (state.max_exp_avg_sq is None or state.max_exp_avg_sq.dtype == state.exp_avg_sq.dtype)
        )
        if not launch.has_kernels(self.param.device):
            form = "reference"
        else:
            form = "table" if walkable and group["foreach"] is not False else "tensors"
        return _Key(
            group=self.group,
            wave=self.wave,
            device=self.param.device,
            step=step,
            form=form,
            storage=Storage.of(self.param, self.grad, state, stochastic=group["stochastic_rounding"]),
            aligned=reduce(or_, (t.data_ptr() for t in like_param)) % _ALIGNMENT == 0,
        )


class _Bucket:
    """Tensors that one launch steps, and the step count that they share."""

    def __init__(self, key: _Key, items: list[_Item], group: Mapping[str, Any], on_device: bool) -> None:
        self.key = key
        self.params = [item.param for item in items]
        self.states = [TensorState.of(item.entries, group["amsgrad"]) for item in items]
        self.maximize = group["maximize"]
        self.roundings = None
        if key.storage.stochastic:
            self.roundings = [Rounding(group["seed"], item.number) for item in items]
        self.on_device = on_device and key.form != "reference"
        # One vector holds the step counts, so that one operation counts for all.
        device = key.device if self.on_device else "cpu"
        self.steps = torch.full((len(items),), key.step, dtype=torch.float32, device=device)
        for item, step in zip(items, self.steps.unbind(), strict=True):
            item.entries["step"] = step
        self.steps_version = self.steps._version
        self.step_count = key.step
        self.table = None
        if key.form == "table":
            grads = [item.grad for item in items]
            self.table = launch.Table.of(self.params, grads, self.states, aligned=key.aligned, roundings=self.roundings)

    def set_grad_addresses(self, addresses: Tensor) -> None:
        if self.table is not None:
            if self.key.device.type == "cuda":
                addresses = addresses.pin_memory()  # from pageable memory, the copy would wait for the device
            self.table.grads.copy_(addresses, non_blocking=True)

    def step(self, grads: Sequence[Tensor], hyper: Hyper, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        if grad_scale is not None:
            grad_scale = grad_scale.to(self.key.device, non_blocking=True)
        if found_inf is not None:
            found_inf = found_inf.to(self.key.device, non_blocking=True)
        scalars: Scalars | Tensor
        if self.on_device:
            self.steps.add_(1)
            scalars = device_scalars(hyper, self.steps[0])
            if found_inf is not None:
                self.steps.sub_(found_inf)
        else:
            if found_inf is not None and found_inf.item():
                return
            self.steps.add_(1)
            self.step_count += 1
            scalars = host_scalars(hyper, self.step_count)
        self.steps_version = self.steps._version

        roundings: Sequence[Rounding | None] = self.roundings or [None] * len(self.params)
        if self.key.form == "reference":
            for param, grad, state, rounding in zip(self.params, grads, self.states, roundings, strict=True):
                step_tensor_reference(
                    param,
                    grad,
                    state,
                    hyper,
                    self.step_count,
                    maximize=self.maximize,
                    grad_scale=grad_scale,
                    rounding=rounding,
                )
            return
        if self.table is not None:
            launch.launch_table(self.table, scalars, maximize=self.maximize, grad_scale=grad_scale, found_inf=found_inf)
        else:
            for param, grad, state, rounding in zip(self.params, grads, self.states, roundings, strict=True):
                step_tensor(
                    param,
                    grad,
                    state,
                    scalars,
                    maximize=self.maximize,
                    grad_scale=grad_scale,
                    found_inf=found_inf,
                    rounding=rounding,
                )
        # Autograd does not see what a kernel writes.
        torch.autograd.graph.increment_version(self.params)


class Plan:
    """The launches of a step, for one set of parameters that have gradients.

    Building one checks everything it is given, then creates missing state; a refusal leaves all as it was.

    Args:
        groups: the optimizer's param groups.
        hypers: `Hyper.of` each group.
        state: the optimizer's state, filled in for parameters at their first update.
        skippable: whether `found_inf` will be given, so that only the device can count steps.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], hypers: Sequence[Hyper], state: State, *, skippable: bool
    ) -> None:
        self.structure = _structure(groups, hypers, skippable)
        self.group_params = [list(group["params"]) for group in groups]
        everything = {id(param): param for params in self.group_params for param in params}
        numbers = {id(param): number for number, param in enumerate(everything.values())}
        self.without_grad = [param for param in everything.values() if param.grad is None]

        items = [
            _Item(param, param.grad, state.get(param, {}), index, numbers[id(param)])
            for index, group in enumerate(groups)
            for param in group["params"]
            if param.grad is not None and everything.pop(id(param), None) is not None  # a duplicate steps once
        ]
        for group in groups:  # whose options and parameters may have changed since they were checked
            check_implementation(group)
            check_storage(group, group["params"])
        for item in items:
            item.check()
        for item in items:
            item.entries = state.watch(item.param)
            group = groups[item.group]
            Policy.of(group).complete(item.param, item.entries, amsgrad=group["amsgrad"])
        _separate_shared_memory(items)

        by_key: dict[_Key, list[_Item]] = defaultdict(list)
        for item, step in zip(items, _read_steps(items), strict=True):
            by_key[item.key(groups[item.group], step)].append(item)
        for key in [key for key, members in by_key.items() if len(members) == 1 and key.form == "table"]:
            # A table is for several tensors, unless it was asked for.
            if groups[key.group]["foreach"] is None:
                by_key[key._replace(form="tensors")] += by_key.pop(key)
        self.buckets = [
            _Bucket(key, by_key[key], groups[key.group], skippable or hypers[key.group].on_device)
            for key in sorted(by_key, key=lambda key: (key.wave, key.group))
        ]
        items = [item for bucket_key in (bucket.key for bucket in self.buckets) for item in by_key[bucket_key]]

        # What `gradients` compares with.
        self.changes = state.changes
        self.changes.seen = True
        self.first_moments = [tensor for bucket in self.buckets for tensor in bucket.states[0].tensors]
        self.first_moment_addresses = list(map(Tensor.data_ptr, self.first_moments))
        self.params = [item.param for item in items]
        self.param_addresses = list(map(Tensor.data_ptr, self.params))
        self.param_numels = list(map(Tensor.numel, self.params))
        # Only with two equal dimensions can strides change while address and shape stay.
        self.squares = [p for p in self.params if len({n for n in p.shape if n > 1}) < sum(n > 1 for n in p.shape)]
        self.square_strides = list(map(Tensor.stride, self.squares))
        grads = [item.grad for item in items]
        self.grad_addresses = list(map(Tensor.data_ptr, grads))
        self.grad_contiguous = list(map(Tensor.is_contiguous, grads))
        self.strided = [i for i, param in enumerate(self.params) if not param.is_contiguous()]
        self.grad_strides = [grads[i].stride() for i in self.strided]
        # For all other parameters, assigning `.grad` checks the dtype.
        self.any_dtype = [i for i, p in enumerate(self.params) if getattr(p, "grad_dtype", p.dtype) != p.dtype]
        self.grad_dtypes = [grads[i].dtype for i in self.any_dtype]
        # Only the imaginary part of a conjugate is negated lazily: every other element of something.
        self.may_be_neg = [i for i, g in enumerate(grads) if g.numel() < 2 or not g.is_contiguous()]
        self.grad_neg = [grads[i].is_neg() for i in self.may_be_neg]

    def gradients(
        self, groups: Sequence[dict[str, Any]], hypers: Sequence[Hyper], state: State, *, skippable: bool
    ) -> list[Tensor] | None:
        """The gradients to step with, in the order of the buckets, or None if the plan no longer fits."""
        params = self.params
        if (
            _structure(groups, hypers, skippable) != self.structure
            or not all(_same(group["params"], known) for group, known in zip(groups, self.group_params, strict=True))
            or state.changes is not self.changes
            or not self.changes.seen
            # Offloading code re-points every state at once: the first of each bucket tells.
            or list(map(Tensor.data_ptr, self.first_moments)) != self.first_moment_addresses
            or any(bucket.steps._version != bucket.steps_version for bucket in self.buckets)
            or list(map(Tensor.data_ptr, params)) != self.param_addresses
            or list(map(Tensor.numel, params)) != self.param_numels
            or list(map(Tensor.stride, self.squares)) != self.square_strides
            or any(param.grad is not None for param in self.without_grad)
        ):
            return None
        grads = list(map(_grad_of, params))
        try:
            addresses = list(map(Tensor.data_ptr, grads))
        except (TypeError, RuntimeError):  # no gradient any more, or one without memory of its own
            return None
        # An allocator hands out the same address for another layout, so that addresses alone do not tell.
        if (
            list(map(Tensor.is_contiguous, grads)) != self.grad_contiguous
            or (self.strided and [grads[i].stride() for i in self.strided] != self.grad_strides)
            or (self.any_dtype and [grads[i].dtype for i in self.any_dtype] != self.grad_dtypes)
            or (self.may_be_neg and [grads[i].is_neg() for i in self.may_be_neg] != self.grad_neg)
        ):
            return None
        if addresses != self.grad_addresses and not self._take_addresses(grads, addresses):
            return None
        return grads

    def _take_addresses(self, grads: list[Tensor], addresses: list[int]) -> bool:
        """Use gradients that lie elsewhere; False if they are not like the ones before."""
        if list(map(Tensor.numel, grads)) != self.param_numels:
            return False
        uploads = torch.frombuffer(array("q", addresses), dtype=torch.int64)
        slices = list(_slices(self.buckets))
        if any(bucket.key.aligned and (uploads[part] % _ALIGNMENT).any() for bucket, part in slices):
            return False
        for bucket, part in slices:
            if addresses[part] != self.grad_addresses[part]:
                bucket.set_grad_addresses(uploads[part])
        self.grad_addresses = addresses
        return True

    def step(
        self, grads: list[Tensor], hypers: Sequence[Hyper], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Step every bucket, with gradients from `gradients`."""
        for bucket, part in _slices(self.buckets):
            bucket.step(grads[part], hypers[bucket.key.group], grad_scale, found_inf)


def _structure(groups: Sequence[Mapping[str, Any]], hypers: Sequence[Hyper], skippable: bool) -> list[Any]:
    return [skippable] + [(_structural_of(group), hyper.on_device) for group, hyper in zip(groups, hypers, strict=True)]


def _same(items: Any, known: list[Any]) -> bool:
    """Whether two sequences are the same objects. `==` would compare the tensors' elements."""
    items = list(items)
    return len(items) == len(known) and all(map(is_, items, known))


def _slices(buckets: Sequence[_Bucket]) -> Any:
    start = 0
    for bucket in buckets:
        end = start + len(bucket.params)
        yield bucket, slice(start, end)
        start = end


def _read_steps(items: Sequence[_Item]) -> list[float]:
    """Step counts, with one synchronisation for each device that holds some."""
    steps = [torch.as_tensor(item.entries["step"], dtype=torch.float32).reshape(()) for item in items]
    values = [0.0] * len(steps)
    for device in {step.device for step in steps}:
        indices = [i for i, step in enumerate(steps) if step.device == device]
        for i, value in zip(indices, torch.stack([steps[i] for i in indices]).tolist(), strict=True):
            values[i] = value
    return values


def _separate_shared_memory(items: Sequence[_Item]) -> None:
    """Give parameters that share memory different waves, in their order: in one launch they would race."""
    by_device: dict[torch.device, list[tuple[int, int, int]]] = defaultdict(list)
    for order, param in enumerate(item.param for item in items):
        if param.numel():
            span = 1 + sum((size - 1) * stride for size, stride in zip(param.shape, param.stride(), strict=True))
            start = param.data_ptr()
            by_device[param.device].append((start, start + span * param.element_size(), order))
    for extents in by_device.values():
        sharing: list[int] = []
        reach = 0
        for start, end, order in sorted(extents):
            if start >= reach:
                sharing = []
            sharing.append(order)
            reach = max(reach, end)
            if len(sharing) > 1:
                for wave, index in enumerate(sorted(sharing)):
                    items[index].wave = wave
