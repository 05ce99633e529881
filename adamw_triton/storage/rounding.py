"""Stochastic rounding, and the random bits for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PHILOX_ROUNDS = 7


class NoiseKey(NamedTuple):
    """What the random bits of a tensor's elements depend on, besides the number of the update.

    Attributes:
        seed: key of the generator, 0 to 2^63 - 1.
        param_index: number that tells parameters apart, 0 to 2^31 - 1.
        element_offset: index of the tensor's first element in the whole parameter, of which it may be a part.
        row_size: of a part, elements that lie in one piece in the whole; 0 if all do.
        row_stride: distance there from the beginning of one such piece to that of the next.
    """

    seed: int
    param_index: int
    element_offset: int = 0
    row_size: int = 0
    row_stride: int = 0

    @property
    def is_of_part(self) -> bool:
        return self[2:] != (0, 0, 0)

    @property
    def is_aligned(self) -> bool:
        """Whether elements that share random bits are 8 that follow each other, and not in two such eighths."""
        return not any(number % 8 for number in self[2:])

    def indices(self, n_elements: int, device: torch.device, first: int = 0) -> Tensor:
        """Return the index in the whole parameter of elements of a tensor, int64, from its element `first` on."""
        index = torch.arange(first, first + n_elements, dtype=torch.int64, device=device)
        if self.row_size:
            index = index + index // self.row_size * (self.row_stride - self.row_size)
        return index + self.element_offset

    def param_indices(self, n_elements: int, device: torch.device) -> Tensor:
        """Return the parameter's number, in a form that goes with `indices`."""
        return torch.tensor(self.param_index, dtype=torch.int64, device=device)


class JoinedKeys(NamedTuple):
    """What the random bits of tensors that follow each other in memory depend on.

    Attributes:
        keys: of each, of one seed.
        sizes: of each, multiples of 8.
    """

    keys: Sequence[NoiseKey]
    sizes: Sequence[int]

    @property
    def seed(self) -> int:
        return self.keys[0].seed

    @property
    def is_aligned(self) -> bool:
        """Whether elements that share random bits are 8 that follow each other."""
        return all(key.is_aligned for key in self.keys)

    def indices(self, n_elements: int, device: torch.device, first: int = 0) -> Tensor:
        """Return the index of each element in its own parameter, int64; of what fills up the last vector anything."""
        sizes = self._sizes(n_elements)
        return torch.cat([key.indices(size, device) for key, size in zip(self.keys, sizes, strict=True)])

    def param_indices(self, n_elements: int, device: torch.device) -> Tensor:
        """Return the number of each element's parameter, int64."""
        numbers = torch.tensor([key.param_index for key in self.keys], dtype=torch.int64, device=device)
        return numbers.repeat_interleave(torch.tensor(self._sizes(n_elements), dtype=torch.int64, device=device))

    def _sizes(self, n_elements: int) -> list[int]:
        return [*self.sizes[:-1], n_elements - sum(self.sizes[:-1])]


def round_to_bfloat16(value: Tensor, noise: Tensor) -> Tensor:
    """Round float32 to bf16: random bits are added below the last that is kept, and the rest is cut off."""
    return ((value.view(torch.int32) + noise) >> 16 << 16).view(torch.float32).to(torch.bfloat16)


def noise(
    key: NoiseKey | JoinedKeys, step: int, n_elements: int, param: Tensor | None, device: torch.device, first: int = 0
) -> Iterator[Tensor]:
    """Yield 16 random bits for each element, int32 [n_elements]: for the parameter, exp_avg and exp_avg_sq.

    Args:
        step: number of this update.
        param: new parameter, float32 [n_elements], if something is stored in bf16: of 8 elements one of which is not
            finite all bits are 0.
        device: where the bits are wanted.
        first: index of the first of these elements in the tensor that the key is of.
    """
    index, numbers = key.indices(n_elements, device, first), key.param_indices(n_elements, device)
    is_odd = None
    if key.is_aligned and first % 8 == 0:  # one counter for 8 elements, of which each word serves two
        index, numbers = index[::8], numbers[::8] if numbers.dim() else numbers
    else:
        is_odd = (index & 1) == 1
    words = _philox(key.seed, index >> 3, step, numbers)
    if param is not None:
        padded = torch.zeros(-(-n_elements // 8) * 8, dtype=torch.float32, device=device)
        padded[:n_elements] = param * 0.0
        is_finite = padded.view(-1, 8).sum(dim=1) == 0
        words *= is_finite if is_odd is None else is_finite.repeat_interleave(8)[:n_elements]
    if is_odd is None:
        word, other = words, words.roll(-1, 0)
    else:
        pair = ((index >> 1) & 3).unsqueeze(0)
        word, other = words.gather(0, pair)[0], words.gather(0, (pair + 1) & 3)[0]

    def choose(of_even: Tensor, of_odd: Tensor) -> Tensor:
        if is_odd is not None:
            return torch.where(is_odd, of_odd, of_even).to(torch.int32)
        chosen = torch.empty(of_even.shape[1], 4, 2, dtype=torch.int32, device=device)
        chosen[..., 0], chosen[..., 1] = of_even.t(), of_odd.t()
        return chosen.view(-1)[:n_elements]

    yield choose(word & 0xFFFF, word >> 16)
    for of_odd, of_even, source in ((0x9E3779B1, 0x85EBCA77, word), (0xC2B2AE3D, 0x27D4EB2F, other)):
        yield choose((source * of_even & 0xFFFFFFFF) >> 16, (source * of_odd & 0xFFFFFFFF) >> 16)


def _philox(seed: int, counter: Tensor, step: int, param_index: Tensor) -> Tensor:
    """Return the words of Philox4x32 (Salmon et al., https://doi.org/10.1145/2063384.2063405), computed in int64.

    Args:
        counter: int64 [n].

    Returns:
        int64 [4, n], each from 0 to 2^32 - 1.
    """
    mask = 0xFFFFFFFF
    even = torch.stack((counter & mask, torch.full_like(counter, step & mask)))
    odd = torch.stack((counter >> 32, (param_index & mask).expand_as(counter)))
    multipliers = torch.tensor([[0xD2511F53], [0xCD9E8D57]], dtype=torch.int64, device=counter.device)
    increments = (seed & mask, 0x9E3779B9), (seed >> 32 & mask, 0xBB67AE85)
    keys = [[[key + i * each & mask] for key, each in increments] for i in range(PHILOX_ROUNDS)]
    for of_round in torch.tensor(keys, dtype=torch.int64, device=counter.device):
        product = even * multipliers  # of which int64 keeps all 64 bits
        even, odd = ((product >> 32) & mask).flip(0).bitwise_xor_(odd).bitwise_xor_(of_round), (product & mask).flip(0)
    return torch.stack((even[0], odd[0], even[1], odd[1]))
