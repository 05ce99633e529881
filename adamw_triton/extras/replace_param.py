"""Parameters that grow, shrink or are cut up during training, and keep their optimizer state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..optimizer import AdamW
from ..storage import CODED, GROUP_SIZE, MASTER_ENTRIES, StorageOptions, moment, scale_shape
from ..strides import flat
from ..validation import check_entries, check_param
from .gradient_release import is_released

Index = slice | Tensor
Piece = Index | int | tuple[Tensor, Index]


@torch.no_grad()
def replace_param(optimizer: AdamW, old: Tensor, new: Tensor, pieces: Sequence[Piece], *, dim: int = 0) -> None:
    """Put `new` in the place of `old`, with state that is made of pieces of the state of `old`.

    Whoever makes `new` gives it its values; where there are master weights, what is taken from `old` must have the
    values of `old`, which its state completes. Codes of 8-bit moments are moved with their scales, not rounded again.
    Entries of the state that are not AdamW's are dropped.

    Args:
        optimizer: whose groups have `old`. `new` gets its index there, its step count and its options.
        old, new: parameters of one dtype on one device, which differ in size along `dim` only.
        pieces: what follows each other along `dim` of `new`. A slice, 1-D indices or a 1-D mask: that part of `old`. A
            pair (param, one of these): that part of another parameter of the optimizer, which keeps its own. A number:
            so many with moments of 0.
        dim: dimension that is cut and put together.

    Raises:
        ValueError: pieces that do not make up `new`; parameters of other dtypes, devices or step counts; 8-bit moments
            cut within a group of 128 elements that share a scale. Nothing has been changed then.

    Example: a vocabulary of 100 words gets 28 more, and then loses every second one.
        >>> weight = torch.nn.Parameter(torch.randn(100, 256))
        >>> optimizer = AdamW([weight], exp_avg_dtype="int8", exp_avg_sq_dtype="uint8")
        >>> weight.grad = torch.randn(100, 256)
        >>> optimizer.step()
        >>> grown = torch.nn.Parameter(torch.cat([weight.detach(), torch.zeros(28, 256)]))
        >>> replace_param(optimizer, weight, grown, [slice(None), 28])
        >>> kept = torch.nn.Parameter(grown.detach()[::2].clone())
        >>> replace_param(optimizer, grown, kept, [slice(None, None, 2)])
        >>> optimizer.state[kept]["exp_avg_codes"].shape
        torch.Size([64, 256])
    """
    if is_released(optimizer):
        raise ValueError("replace_param: gradient release has hooks on the old parameter; remove() its handle first")
    places = _places(optimizer, old)
    check_param(new)
    if not new.is_leaf:
        raise ValueError("replace_param: the new parameter is no leaf, and would get no gradient; make it a Parameter")
    if any(p is new for g in optimizer.param_groups for p in g["params"]):
        raise ValueError("replace_param: the new parameter is in the optimizer already")
    if not -old.dim() <= dim < old.dim():
        raise ValueError(f"replace_param: dim={dim} of a parameter of shape {tuple(old.shape)}")
    dim %= old.dim()
    parts = [_part(old, piece, dim) for piece in pieces]
    for source in {id(old): old, **{id(source): source for source, _ in parts if source is not None}}.values():
        _places(optimizer, source)
        _check_alike(source, new, dim)
    sizes = [index if source is None else index.numel() for source, index in parts]
    if sum(sizes) != new.shape[dim]:
        raise ValueError(
            f"replace_param: pieces of {sizes} make up {sum(sizes)} along dim {dim}; the new parameter has "
            f"{new.shape[dim]}"
        )
    entries = _new_entries(optimizer, places[0][0], old, new, parts, dim)
    if entries:
        optimizer.state[new] = entries
    optimizer.state.pop(old, None)
    for group, place in places:
        optimizer.param_groups[group]["params"][place] = new


def _places(optimizer: AdamW, param: Tensor) -> list[tuple[int, int]]:
    """Return the indices of a parameter's groups, and of the parameter in them."""
    found = [
        (i, j)
        for i, group in enumerate(optimizer.param_groups)
        for j, listed in enumerate(group["params"])
        if listed is param
    ]
    if not found:
        raise ValueError(f"replace_param: the optimizer has no such parameter (of shape {tuple(param.shape)})")
    return found


def _part(old: Tensor, piece: Piece, dim: int) -> tuple[Tensor | None, Any]:
    """Return a piece as a parameter and indices of it, or as None and a number."""
    if isinstance(piece, Integral) and not isinstance(piece, bool) and piece >= 0:
        return None, int(piece)
    source, index = piece if isinstance(piece, tuple) else (old, piece)
    if isinstance(index, slice | Tensor) and source.dim() > dim and (isinstance(index, slice) or index.dim() == 1):
        indices = torch.arange(source.shape[dim], dtype=torch.int64, device="cpu")
        try:
            chosen = indices[index if isinstance(index, slice) else index.cpu()]
        except (IndexError, ValueError) as error:
            raise ValueError(f"replace_param: {error}, of a parameter of shape {tuple(source.shape)}") from None
        return (source, chosen) if chosen.numel() else (None, 0)
    raise ValueError(
        f"replace_param: a piece must be a slice, 1-D indices, a 1-D mask, a pair of a parameter and one of these, or "
        f"a number of fresh ones; got {piece!r}"
    )


def _check_alike(source: Tensor, new: Tensor, dim: int) -> None:
    def rest(tensor: Tensor) -> Any:
        return tensor.dtype, tensor.device, (*tensor.shape[:dim], *tensor.shape[dim + 1 :])

    if rest(source) != rest(new) or source.dim() != new.dim():
        raise ValueError(
            f"replace_param: the new parameter ({tuple(new.shape)}, {new.dtype}, on {new.device}) and one it is made "
            f"of ({tuple(source.shape)}, {source.dtype}, on {source.device}) may differ in size along dim {dim} only"
        )


def _new_entries(
    optimizer: AdamW, group_index: int, old: Tensor, new: Tensor, parts: Sequence[tuple[Tensor | None, Any]], dim: int
) -> dict[str, Any]:
    group = optimizer._groups[group_index]
    storage = StorageOptions.from_group(group)
    states: dict[int, dict[str, Any]] = {}
    sources = {id(source): source for source in (old, *(source for source, _ in parts)) if source is not None}
    for key, source in sources.items():
        if optimizer.state.get(source):
            states[key] = dict(optimizer.state[source])
            check_entries(source, states[key])
            storage.complete(source, states[key], amsgrad=group["amsgrad"])  # of another group, perhaps
    if not states:
        return {}
    if len(states) < len(sources) or len({float(state["step"]) for state in states.values()}) > 1:
        raise ValueError(
            "replace_param: the parameters that the new one is made of have counted different numbers of steps; their "
            "moments are scaled differently"
        )
    step = states[id(old)]["step"]
    entries: dict[str, Any] = {"step": step.clone() if isinstance(step, Tensor) else step}
    used = [state for key, state in states.items() if any(key == id(source) for source, _ in parts)]

    def put_together(name: str) -> None:
        of_parts = [None if source is None else states[id(source)][name] for source, _ in parts]
        entries[name] = _assemble(of_parts, parts, new, dim)

    for name, coded in CODED.items():
        if used and all(coded.codes in state for state in used):
            put_together(coded.codes)
            entries[coded.scale] = _scales(states, name, parts, new, dim)
        elif used:
            for state in used:
                state[name] = moment(name, state)
            put_together(name)
    for name in ("max_exp_avg_sq", *MASTER_ENTRIES):
        if used and all(name in state for state in used):
            put_together(name)
    storage.complete(new, entries, amsgrad=group["amsgrad"])
    return entries


def _assemble(
    tensors: Sequence[Tensor | None], parts: Sequence[tuple[Tensor | None, Any]], new: Tensor, dim: int, fresh: int = 0
) -> Tensor:
    """Return what the parts of tensors make up, in the memory layout of the new parameter's state.

    Args:
        tensors: of each part, None of a fresh one.
        fresh: value of those.
    """
    some = next(tensor for tensor in tensors if tensor is not None)
    pieces = []
    for tensor, (_, index) in zip(tensors, parts, strict=True):
        if tensor is not None:
            pieces.append(tensor.index_select(dim, index.to(tensor.device)))
        else:
            shape = list(some.shape)
            shape[dim] = index
            pieces.append(torch.full(shape, fresh, dtype=some.dtype, device=some.device))
    joined = torch.cat(pieces, dim)
    return torch.empty_like(new, dtype=joined.dtype).copy_(joined) if joined.dim() == new.dim() else joined


def _scales(
    states: Mapping[int, Mapping[str, Any]],
    name: str,
    parts: Sequence[tuple[Tensor | None, Any]],
    new: Tensor,
    dim: int,
) -> Tensor:
    """Return the scales of the groups that the parts of codes make up."""
    coded, shape = CODED[name], scale_shape(torch.empty_like(new, device="meta"))
    group_of: dict[int, Tensor] = {}  # of each element of a source, among all of them
    scales: list[Tensor] = []
    for source, _ in parts:
        if source is not None and id(source) not in group_of:
            state = states[id(source)]
            numbers = torch.empty_like(state[coded.codes], dtype=torch.int64)
            first = sum(scale.numel() for scale in scales)
            flat(numbers).copy_(
                torch.arange(source.numel(), dtype=torch.int64, device=source.device) // GROUP_SIZE + first
            )
            group_of[id(source)] = numbers
            scales.append(state[coded.scale].reshape(-1))
    if shape is not None:
        tensors = [None if source is None else group_of[id(source)] for source, _ in parts]
        groups = flat(_assemble(tensors, parts, new, dim, fresh=-1)).view(-1, GROUP_SIZE)
        chosen = groups.amax(dim=1)
        if bool(((groups == chosen.unsqueeze(1)) | (groups < 0)).all()):  # zeros are the same with every scale
            return torch.cat([*scales, scales[0].new_zeros(1)])[chosen].view(shape)
    raise ValueError(
        f"replace_param: {name} has 8 bits, and {GROUP_SIZE} consecutive elements of a row (all after the first "
        f"dimension) share a scale; a new parameter of shape {tuple(new.shape)}, cut along dim {dim}, would mix or "
        f"break such groups. Cut at multiples of {GROUP_SIZE}, pad with zeros up to one, or store the moment in floats "
        f"before: write {name}_dtype='float32' to its param group"
    )
