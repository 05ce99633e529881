"""Everything that a plan bakes into its tables, read anew at each step and compared as a whole."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import is_, itemgetter
from typing import Any

from torch import Tensor

from .dtensors import is_dtensor, local, local_of
from .members import Members
from .param_work import ALIGNMENT, GradLayout
from .strides import fill_memory

_ALIGNED = bytes(range(0, 256, ALIGNMENT))  # lowest bytes of addresses
NO_ELEMENTS = ALIGNMENT  # stands for the address of an empty gradient, which has none: 0 is one that is missing


class Signature:
    """What was read when a plan was built.

    A later step reads the same again: equal means that the plan's tables are right, different that they have to be
    built anew. Address, type, dtype, shape and strides of every parameter, gradient and state tensor; the entries of
    every state; the options of every group. Only the addresses of gradients may differ, and gradients be missing.

    Args:
        options: of the param groups and of the optimizer, in any form that can be compared.
        n_params: of all parameters in the groups.
        order: indices of the plan's parameters among them.
        spans: slices of the plan's parameters, and the names of their state's entries.
        params, entries: the plan's parameters and their state.
        grad_layouts: of each gradient, or of the one before where there is none.
        aligned: whether each gradient must begin at a multiple of ALIGNMENT.
    """

    def __init__(
        self,
        options: Any,
        n_params: int,
        order: list[int],
        spans: Sequence[tuple[slice, Sequence[str]]],
        params: Sequence[Tensor],
        entries: Sequence[Mapping[str, Any]],
        grad_layouts: Sequence[GradLayout],
        aligned: Sequence[bool],
    ) -> None:
        self._options, self._n_params, self._order = options, n_params, order
        self._in_order = order == list(range(n_params))
        self._n_entries = list(map(len, entries))
        self._columns = [
            (span, itemgetter(name), _local_of(name, entries[span])) for span, names in spans for name in names
        ]
        tensors = self._tensors(params, entries)
        self._addresses = list(map(Tensor.data_ptr, tensors))
        self._layouts = _guards(tensors)
        self._grad_layouts = list(grad_layouts)
        self._each_grad: list[Callable[[Tensor], bool]] = [partial(self._meet, i) for i in range(len(grad_layouts))]
        self._all_grads: Any = None  # made when all are there
        self._aligned = aligned
        self._last_addresses: list[int] = []  # of gradients, aligned where they must be
        self._last_packed = b""
        self._empty = [i for i, param in enumerate(params) if param.numel() == 0]
        self.with_gaps = [i for i, of in enumerate(grad_layouts) if not fill_memory(of.shape, of.stride)]

    def read(
        self,
        options: Any,
        listed: list[Tensor],
        params: list[Tensor],
        grads: list[Tensor | None],
        state: Mapping[Any, Any],
    ) -> Members | None:
        """Return what a step reads anew, or None if the plan is outdated.

        Args:
            listed: all parameters in the groups.
            params, grads: what of them, and of their gradients, lies on this rank.
            state: the optimizer's.
        """
        if options != self._options or len(params) != self._n_params:
            return None
        its_params = params if self._in_order else [params[i] for i in self._order]
        its_grads = grads if self._in_order else [grads[i] for i in self._order]
        its_listed = its_params
        if listed is not params:
            its_listed = listed if self._in_order else [listed[i] for i in self._order]
        # A state in the plan's order is read without hashing its keys.
        same_order = len(state) == len(its_listed) and all(map(is_, state, its_listed))
        entries: list[Any] = list(state.values()) if same_order else list(map(state.get, its_listed))
        try:
            tensors = self._tensors(its_params, entries)
            unchanged = (
                list(map(Tensor.data_ptr, tensors)) == self._addresses
                and list(map(len, entries)) == self._n_entries
                and self._layouts.check(*tensors)
            )
        # An entry that is gone, no tensor or no DTensor any more, or without memory of its own.
        except (KeyError, TypeError, AttributeError, RuntimeError):
            return None
        if not unchanged:
            return None
        all_present = self._all_grads is not None and self._all_grads.check(*its_grads)  # None is no tensor
        addresses = self._grad_addresses(its_grads, all_present)
        if addresses is None:
            return None
        return Members(its_listed, its_params, its_grads, entries, addresses, all_present)

    def _tensors(self, params: Sequence[Tensor], entries: Sequence[Any]) -> list[Tensor]:
        tensors = list(params)
        for span, entry_of, its_local_of in self._columns:
            column = map(entry_of, entries[span])
            tensors += column if its_local_of is None else map(its_local_of, column)
        return tensors

    def _grad_addresses(self, grads: list[Any], all_present: bool) -> bytes | None:
        """Return the packed addresses, or None if a gradient is not like that which the plan was built for."""
        if all_present:
            addresses = list(map(Tensor.data_ptr, grads))
        else:
            if not all(check(grad) for check, grad in zip(self._each_grad, grads, strict=True) if grad is not None):
                return None
            addresses = [0 if grad is None else grad.data_ptr() for grad in grads]
            if not any(grad is None for grad in grads):
                self._all_grads = _guards(grads)
        for i in self._empty:
            if grads[i] is not None:
                addresses[i] = NO_ELEMENTS
        if addresses != self._last_addresses:
            packed = struct.pack(f"={len(addresses)}q", *addresses)
            low_bytes = packed[:: 8 if sys.byteorder == "little" else -8]
            if low_bytes.translate(None, _ALIGNED) and not self._fit_alignment(addresses):
                return None
            self._last_addresses, self._last_packed = addresses, packed
        return self._last_packed

    def _meet(self, index: int, grad: Tensor) -> bool:
        """Check a gradient for the first time; it may have been missing when the plan was built."""
        if GradLayout.of(grad) != self._grad_layouts[index]:
            return False
        self._each_grad[index] = _guards([grad]).check
        return True

    def _fit_alignment(self, addresses: Sequence[int]) -> bool:
        return not any(must and address % ALIGNMENT for must, address in zip(self._aligned, addresses, strict=True))


def _local_of(name: str, entries: Sequence[Mapping[str, Any]]) -> Callable[[Any], Any] | None:
    """Return what makes local tensors of the entries of one name, None if they are."""
    kinds = {is_dtensor(of_param[name]) for of_param in entries}
    if kinds == {True}:
        return local_of
    return local if True in kinds else None


def _guards(tensors: Sequence[Tensor]) -> Any:
    """Return an object whose `check(*tensors)` tells whether others have these types, dtypes, devices and layouts."""
    try:
        from torch._C._dynamo.guards import TensorGuards

        return TensorGuards(
            *tensors,
            dynamic_dims_sizes=[list(tensor.shape) for tensor in tensors],  # type: ignore[misc]
            dynamic_dims_strides=[list(tensor.stride()) for tensor in tensors],  # type: ignore[misc]
        )
    except (ImportError, TypeError, RuntimeError, SystemError):
        return _Layouts(tensors)


class _Layouts:
    """Does what `TensorGuards` does, in Python and three times slower, where torch does not have it."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._layouts = list(map(_layout, tensors))

    def check(self, *tensors: Tensor) -> bool:
        return list(map(_layout, tensors)) == self._layouts


def _layout(tensor: Any) -> tuple[Any, ...] | None:
    if not isinstance(tensor, Tensor):
        return None
    return type(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.is_neg()
