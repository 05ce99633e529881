"""The part of a step that happens on one device."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import launch, reference
from .bucket import ALIGNMENT, Bucket, Item, Key
from .control import Control, Limits, Scaling
from .functional import real_view
from .rows import Rows
from .scalars import Hyper
from .upload import Upload


class Part:
    """Buckets of parameters on one device, what they share, and their gradients' norm.

    Args:
        items: parameters with gradients and complete state.
        steps: updates that each has had.
        groups: the optimizer's param groups.
        hypers: of each group.
        need_norm: whether steps need the norm of all gradients.
        count_on_device: whether the step counts live on the device, where there are kernels.
        capturable: whether steps may be captured in CUDA graphs.
        statistics: whether to sum the squares of what is written, and of its change.

    Attributes:
        params: in the order in which they are stepped.
    """

    def __init__(
        self,
        items: Sequence[Item],
        steps: Sequence[float],
        groups: Sequence[Mapping[str, Any]],
        hypers: Sequence[Hyper],
        *,
        need_norm: bool,
        count_on_device: bool,
        capturable: bool,
        statistics: bool,
    ) -> None:
        self.device = device = items[0].param.device
        self.has_kernels = launch.has_kernels(device)
        self.rows = Rows(
            device,
            [item.group for item in items],
            steps,
            hypers,
            on_device=count_on_device and self.has_kernels,
            capturable=capturable,
        )
        for item, row, count in zip(items, self.rows.of_param, self.rows.counts, strict=True):
            item.row = row
            item.entries["step"] = count
        by_key = _by_key(items, groups)
        in_order = [item for members in by_key.values() for item in members]
        self.params = [item.param for item in in_order]
        self.aligned = [key.aligned for key, members in by_key.items() for _ in members]
        self.addresses: Upload | None = None
        if self.has_kernels and (need_norm or any(key.form == "table" for key in by_key)):
            addresses = torch.tensor([item.grad.data_ptr() for item in in_order])
            self.addresses = Upload(addresses, device, capturable=capturable)
        self.buckets = []
        self.slices = []  # of the parameters, for each bucket
        start = 0
        for key, members in by_key.items():
            part = slice(start, start + len(members))
            addresses_of = None if self.addresses is None else self.addresses.tensor[part]
            self.buckets.append(Bucket(key, members, addresses_of, statistics=statistics))
            self.slices.append(part)
            start = part.stop
        if self.addresses is not None and need_norm:
            self._make_norm_tables(self.addresses.tensor, [item.grad for item in in_order])

    def _make_norm_tables(self, addresses: Tensor, grads: Sequence[Tensor]) -> None:
        numels = torch.tensor([g.numel() * (2 if g.is_complex() else 1) for g in grads]).to(self.device)
        by_dtype: dict[tuple[torch.dtype, bool], list[int]] = defaultdict(list)
        for i, (grad, aligned) in enumerate(zip(grads, self.aligned, strict=True)):
            by_dtype[grad.dtype.to_real(), aligned].append(i)
        self.norm_tables = []
        n_partials = 0
        for (dtype, aligned), members in by_dtype.items():
            table = launch.NormTable.of(addresses, numels, members, first=n_partials, dtype=dtype, aligned=aligned)
            self.norm_tables.append(table)
            n_partials += table.spans.shape[0]
        self.partials = torch.zeros(n_partials + 1, dtype=torch.float64, device=self.device)
        self.arrived = torch.zeros(1, dtype=torch.int32, device=self.device)

    def take_addresses(self, addresses: Sequence[int], *, capturing: bool) -> bool:
        """Use gradients that lie elsewhere; False if one has lost its alignment."""
        if any(aligned and address % ALIGNMENT for address, aligned in zip(addresses, self.aligned, strict=True)):
            return False
        if self.addresses is not None:
            self.addresses.write(torch.frombuffer(array("q", addresses), dtype=torch.int64), capturing=capturing)
        return True

    def write_control(self, control: Control, limits: Limits, scaling: Scaling) -> None:
        """Decide over the gradients of this device, which has kernels, as if they were all."""
        scaling = scaling.to(self.device)
        launch.launch_norms(
            self.norm_tables, self.partials, self.arrived, control, scaling, limits.max_grad_norm, limits.skip_above
        )

    def sum_of_squares(self, grads: Sequence[Tensor]) -> Tensor:
        """Of the gradients on this device: 0-d float64, there."""
        if not self.has_kernels:
            return torch.stack([_sum_of_squares(grad) for grad in grads]).sum()
        launch.launch_norms(self.norm_tables, self.partials, self.arrived, None, Scaling(), None, None)
        return self.partials[-1]

    def step(
        self,
        grads: Sequence[Tensor],
        hypers: Sequence[Hyper],
        scaling: Scaling,
        control: Control | None,
        *,
        known: bool,
        capturing: bool,
    ) -> None:
        """Step all buckets.

        Args:
            grads: in the order of `params`.
            hypers: of each group.
            scaling: of the gradients.
            control: what the step is subject to, on this device: `known` already, or to be made from `scaling`.
            capturing: whether a CUDA graph is being captured.
        """
        scaling = scaling.to(self.device)
        if control is not None and not self.has_kernels:
            if not known:
                control.set(reference.gradient_control(None, *scaling, None, None))
            if control.values[1].item():
                return
        self.rows.advance(hypers, scaling, control, known=known, capturing=capturing)
        if self.addresses is not None and not capturing:
            self.addresses.prepare()
        for bucket, part in zip(self.buckets, self.slices, strict=True):
            bucket.step(grads[part], self.rows, None if control is None else control.values)


def _sum_of_squares(grad: Tensor) -> Tensor:
    return real_view(grad.resolve_conj()).double().square().sum()


def _by_key(items: Sequence[Item], groups: Sequence[Mapping[str, Any]]) -> dict[Key, list[Item]]:
    """The items of each bucket, in the order in which the buckets are stepped."""
    by_key: dict[Key, list[Item]] = defaultdict(list)
    for item in items:
        by_key[item.key(groups[item.group])].append(item)
    for key in [key for key, members in by_key.items() if len(members) == 1 and key.form == "table"]:
        # A table is for several tensors, unless it was asked for.
        if groups[by_key[key][0].group]["foreach"] is None:
            by_key[key._replace(form="tensors")] += by_key.pop(key)
    return {key: by_key[key] for key in sorted(by_key, key=lambda key: key.wave)}
