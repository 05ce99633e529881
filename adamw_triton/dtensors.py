"""DTensors, of which each rank holds a part: telling them from other tensors, and their local tensors."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor


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


def locals_of(tensors: Iterable[Any]) -> list[Any]:
    """Return `local` of each."""
    dtensor = dtensor_class()
    return [tensor._local_tensor if isinstance(tensor, dtensor) else tensor for tensor in tensors]


def local_grads(params: Iterable[Any], grads: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Return the local tensors of gradients, brought to the placements of their parameters.

    That can take communication (a replicated parameter's gradient may be a sum still to be made), so that what is
    refused here is refused only afterwards, and every rank takes part.

    Args:
        params: parameters as they are listed, DTensors or not; grads: of each.

    Raises:
        RuntimeError: a gradient that is a DTensor where its parameter is not, or the reverse, or on another mesh.
    """
    dtensor = dtensor_class()
    found: list[Tensor | None] = []
    errors: list[str] = []
    for param, grad in zip(params, grads, strict=True):
        if isinstance(grad, dtensor) and isinstance(param, dtensor):
            if grad._spec is not param._spec and grad.placements != param.placements:
                if grad.device_mesh != param.device_mesh:
                    errors.append(
                        f"a gradient is on {grad.device_mesh}, its parameter (shape {tuple(param.shape)}) on "
                        f"{param.device_mesh}; both must be on one mesh"
                    )
                    continue
                grad = grad.redistribute(placements=param.placements)
            value = grad._local_tensor
            found.append(value.wait() if hasattr(value, "wait") else value)  # where communication is still going on
        elif grad is not None and isinstance(param, dtensor) != isinstance(grad, dtensor):
            kinds = ["a plain tensor", "a DTensor"]
            has, other = kinds[isinstance(param, dtensor)], kinds[isinstance(grad, dtensor)]
            errors.append(
                f"a parameter of shape {tuple(param.shape)} is {has}, its gradient {other}; let backward() make it, or "
                f"give it the parameter's mesh and placements with torch.distributed.tensor.distribute_tensor"
            )
        else:
            found.append(grad)
    if errors:
        raise RuntimeError(errors[0])
    return found
