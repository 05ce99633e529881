"""Which formats a parameter's state is to have, and making it or converting it to these."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..strides import dense, same_strides
from .eight_bit import CODED, decode, encode, scale_shape
from .formats import ROUNDED_PARAMS
from .master_weights import ENTRIES as MASTER_ENTRIES
from .master_weights import REMAINDERS, master_weight, nearest_remainder, remainder_entry, remainder_of, split


class StorageOptions(NamedTuple):
    """The storage options of a param group."""

    exp_avg_dtype: torch.dtype | None
    exp_avg_sq_dtype: torch.dtype | None
    master_weight_bits: int | None
    stochastic_rounding: bool
    seed: int

    @classmethod
    def from_group(cls, group: Mapping[str, Any]) -> StorageOptions:
        return cls(*(group[name] for name in cls._fields))

    def complete(
        self, param: Tensor, entries: MutableMapping[str, Any], *, amsgrad: bool, allows_codes: bool = True
    ) -> None:
        """Create what a parameter's state lacks, and convert what is of another format or memory layout.

        Values survive as well as the new format can hold them. A tensor that fits is left as it is.

        Args:
            allows_codes: whether moments can have 8 bits if the parameter's shape allows that; not where it is part of
                a larger one that is cut within groups of elements.
        """
        entries.setdefault("step", 0.0)
        like = _dense_like(param)
        for name in _moments(amsgrad):
            dtype = self._moment_dtype(name, param, like, entries, allows_codes)
            if not _moment_fits(name, entries, dtype, like):
                _set_moment(name, param, entries, dtype, like)
        self._complete_master(param, entries, like)

    def is_complete(
        self, param: Tensor, entries: Mapping[str, Any], *, amsgrad: bool, allows_codes: bool = True
    ) -> bool:
        """Whether `complete` would change nothing but the step count."""
        like = _dense_like(param)
        return self._master_fits(param, entries, like) and all(
            _moment_fits(name, entries, self._moment_dtype(name, param, like, entries, allows_codes), like)
            for name in _moments(amsgrad)
        )

    def set_master(self, param: Tensor, entries: MutableMapping[str, Any], value: Tensor) -> None:
        """Set a parameter, and the entry that completes it if there is to be one."""
        name = self._master_entry(param)
        if name is None:
            param.copy_(value)
            return
        weight = torch.empty_like(_dense_like(param), dtype=torch.float32, device=param.device).copy_(value)
        if name == "master_param":
            param.copy_(weight)
            entries[name] = weight
        else:
            high, remainder = split(weight, self._remainder_dtype)
            param.copy_(high)
            entries[name] = remainder_entry(remainder)

    def _moment_dtype(
        self, name: str, param: Tensor, like: Tensor, entries: Mapping[str, Any], allows_codes: bool
    ) -> torch.dtype:
        """Return the dtype a moment is to have; without a wish, a floating-point one that is there keeps its own."""
        wish = self.exp_avg_dtype if name == "exp_avg" else self.exp_avg_sq_dtype
        if wish is not None and param.dtype in ROUNDED_PARAMS:
            # bf16 would do for biases and norms, but decays below half a bit stand still in it.
            is_coded = name in CODED and wish == CODED[name].dtype
            return torch.float32 if is_coded and not (allows_codes and scale_shape(like)) else wish
        present = entries.get(name)
        if present is not None:
            return present.dtype
        return param.dtype if self._master_entry(param) is None else torch.float32

    def _master_entry(self, param: Tensor) -> str | None:
        """Return the name of the state entry that completes a parameter to its master weight."""
        if self.master_weight_bits is None or param.dtype not in (torch.bfloat16, torch.float16):
            return None
        return "param_remainder" if param.dtype == torch.bfloat16 else "master_param"

    @property
    def _remainder_dtype(self) -> torch.dtype:
        return REMAINDERS[self.master_weight_bits or 32]

    def _master_fits(self, param: Tensor, entries: Mapping[str, Any], like: Tensor) -> bool:
        name = self._master_entry(param)
        if [entry for entry in MASTER_ENTRIES if entry in entries] != ([] if name is None else [name]):
            return False
        if name == "param_remainder":
            dtype = torch.uint8 if self._remainder_dtype == torch.int16 else torch.int8
            entry = entries[name]
            return entry.dtype == dtype and same_strides(remainder_of(entry), like)
        return name is None or _fits(entries[name], torch.float32, like)

    def _complete_master(self, param: Tensor, entries: MutableMapping[str, Any], like: Tensor) -> None:
        if self._master_fits(param, entries, like):
            return
        master = master_weight(param, entries)
        for entry in MASTER_ENTRIES:
            entries.pop(entry, None)
        name = self._master_entry(param)
        if name is None:
            return
        weight = torch.empty_like(like, dtype=torch.float32, device=param.device).copy_(master)
        if name == "param_remainder":
            weight = remainder_entry(nearest_remainder(param, weight, self._remainder_dtype))
        entries[name] = weight


def moment(name: str, entries: Mapping[str, Any]) -> Tensor | None:
    """Return a moment from a parameter's state, decoded where it has 8 bits; None where there is none."""
    coded = CODED.get(name)
    if coded is not None and coded.codes in entries:
        return decode(name, entries[coded.codes], entries[coded.scale])
    return entries.get(name)


def _moments(amsgrad: bool) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if amsgrad else ("exp_avg", "exp_avg_sq")


def _moment_fits(name: str, entries: Mapping[str, Any], dtype: torch.dtype, like: Tensor) -> bool:
    """Whether a moment is there with this dtype and layout, and in no other form."""
    coded = CODED.get(name)
    if coded is None or dtype != coded.dtype:
        is_coded = coded is not None and coded.codes in entries
        return name in entries and not is_coded and _fits(entries[name], dtype, like)
    if coded.codes not in entries or name in entries:
        return False
    scale = entries[coded.scale]
    return _fits(entries[coded.codes], dtype, like) and scale.shape == scale_shape(like) and scale.is_contiguous()


def _set_moment(name: str, param: Tensor, entries: MutableMapping[str, Any], dtype: torch.dtype, like: Tensor) -> None:
    """Bring a moment into this dtype and layout; zeros where there is none."""
    coded, shape = CODED.get(name), scale_shape(like)
    is_coded = coded is not None and dtype == coded.dtype
    if coded is not None and shape is not None and is_coded and coded.codes in entries:
        codes = dense(entries[coded.codes])
        if _fits(codes, dtype, like):
            entries[coded.codes], entries[coded.scale] = codes, entries[coded.scale].reshape(shape).contiguous()
            return
    present = moment(name, entries)
    for entry in (name, *(() if coded is None else (coded.codes, coded.scale))):
        entries.pop(entry, None)
    if present is not None:
        present = torch.empty_like(like, dtype=present.dtype, device=param.device).copy_(present)
    if coded is None or shape is None or not is_coded:
        entries[name] = _zeros_like(param, dtype) if present is None else present.to(dtype)
    elif present is None:
        entries[coded.codes] = _zeros_like(param, dtype)
        entries[coded.scale] = torch.zeros(shape, dtype=torch.float32, device=param.device)
    else:
        codes, scale = encode(name, present)
        entries[coded.codes], entries[coded.scale] = codes, scale.view(shape)


def _zeros_like(param: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)


def _dense_like(param: Tensor) -> Tensor:
    """Return a tensor without memory in the layout of the state: the parameter's, without its gaps."""
    return torch.empty_like(param, device="meta")


def _fits(present: Tensor, dtype: torch.dtype, like: Tensor) -> bool:
    return present.dtype == dtype and same_strides(present, like)
