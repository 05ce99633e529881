"""DTensors, of which each rank holds a part: telling them from other tensors, and their local tensors."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from operator import attrgetter, is_
from types import NoneType
from typing import Any

from torch import Tensor

# In C: a step reads thousands of these.
_spec_of = attrgetter("_spec")
local_of = attrgetter("_local_tensor")  # of a DTensor


def dtensor_class() -> Any:
    """Return DTensor, or None if nobody has imported it: there are none then, and to import it takes time."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def is_dtensor(value: object) -> bool:
    dtensor = dtensor_class()
    return dtensor is not None and isinstance(value, dtensor)


def are_there(tensors: Iterable[Any]) -> bool:
    """Whether some are DTensors."""
    dtensor = dtensor_class()
    return dtensor is not None and any(issubclass(of, dtensor) for of in set(map(type, tensors)))


def local(tensor: Any) -> Any:
    """Return what of a DTensor lies on this rank, its memory; any other tensor as it is."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def specs_of(tensors: Sequence[Any]) -> list[Any]:
    """Return the specs of tensors, None of a plain one; nothing if all are plain."""
    if not are_there(tensors):
        return []
    try:
        return list(map(_spec_of, tensors))
    except AttributeError:
        return [getattr(tensor, "_spec", None) for tensor in tensors]


def locals_of(tensors: Sequence[Any], specs: Sequence[Any]) -> list[Any]:
    """Return `local` of each.

    Args:
        specs: of each, None of a plain tensor.
    """
    try:
        return list(map(local_of, tensors))
    except AttributeError:
        return [t if spec is None else t._local_tensor for t, spec in zip(tensors, specs, strict=True)]


def local_grads(params: Sequence[Any], grads: Sequence[Any], specs: Sequence[Any]) -> list[Tensor | None]:
    """Return the local tensors of gradients, brought to the placements of their parameters.

    That can take communication (a replicated parameter's gradient may be a sum still to be made), so that what is
    refused here is refused only afterwards, and every rank takes part.

    Args:
        params: parameters as they are listed, DTensors or not; grads: of each.
        specs: of the parameters, None of a plain tensor.

    Raises:
        RuntimeError: a gradient that is a DTensor where its parameter is not, or the reverse, or on another mesh.
    """
    found = _placed_alike(grads, specs)
    return [_local_grad(*each) for each in _redistributed(params, grads)] if found is None else found


def _placed_alike(grads: Sequence[Any], specs: Sequence[Any]) -> list[Tensor | None] | None:
    """Return local tensors of gradients that have the very specs of their parameters, as FSDP2 makes them, or None."""
    try:
        if not all(map(is_, map(_spec_of, grads), specs)):
            return None
        found = list(map(local_of, grads))
    except AttributeError:  # some are missing, or plain
        if not all(g is None or getattr(g, "_spec", None) is spec for g, spec in zip(grads, specs, strict=True)):
            return None
        found = [g if g is None or spec is None else g._local_tensor for g, spec in zip(grads, specs, strict=True)]
    return found if set(map(type, found)) <= {Tensor, NoneType} else None  # else communication is still going on


def _local_grad(param: Any, grad: Any) -> Tensor | None:
    value = local(grad)
    return value.wait() if hasattr(value, "wait") else value  # where communication is still going on


def _redistributed(params: Sequence[Any], grads: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Return each parameter and its gradient, with the same placements."""
    found: list[tuple[Any, Any]] = []
    errors: list[str] = []
    for param, grad in zip(params, grads, strict=True):
        if is_dtensor(param) and is_dtensor(grad):
            if grad._spec is param._spec:
                pass
            elif grad.device_mesh != param.device_mesh:
                errors.append(
                    f"a gradient is on {grad.device_mesh}, its parameter (shape {tuple(param.shape)}) on "
                    f"{param.device_mesh}; both must be on one mesh"
                )
            elif grad.placements != param.placements:
                grad = grad.redistribute(placements=param.placements)
        elif grad is not None and is_dtensor(param) != is_dtensor(grad):
            kinds = ["a plain tensor", "a DTensor"]
            has, other = kinds[is_dtensor(param)], kinds[is_dtensor(grad)]
            errors.append(
                f"a parameter of shape {tuple(param.shape)} is {has}, its gradient {other}; let backward() make it, or "
                f"give it the parameter's mesh and placements with torch.distributed.tensor.distribute_tensor"
            )
        found.append((param, grad))
    if errors:
        raise RuntimeError(errors[0])
    return found
