"""A small GPT over bytes, as plain as it can be written, and its data: the source of Python's standard library."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256  # one token per byte value


@dataclass(frozen=True)
class Sizes:
    """Sizes of a GPT; `width` is divisible by `heads`."""

    layers: int
    heads: int
    width: int
    context: int

    def parameters(self) -> int:
        """How many parameters a GPT of these sizes has."""
        norm = 2 * self.width
        attention = 4 * self.width**2
        mlp = 8 * self.width**2 + 5 * self.width
        embeddings = (VOCABULARY + self.context) * self.width
        return embeddings + self.layers * (2 * norm + attention + mlp) + norm


class Attention(nn.Module):
    """Causal self-attention.

    Without biases: softmax cancels a bias of the keys, so its gradient is rounding noise, which Adam would scale
    up to full steps. Two runs could then differ there for no reason.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.qkv = nn.Linear(sizes.width, 3 * sizes.width, bias=False)
        self.out = nn.Linear(sizes.width, sizes.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Attention, then an MLP; each reads a normalised copy of the residual stream and adds to it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.width)
        self.attention = Attention(sizes)
        self.norm2 = nn.LayerNorm(sizes.width)
        self.up = nn.Linear(sizes.width, 4 * sizes.width)
        self.down = nn.Linear(4 * sizes.width, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Bytes in, logits of the next byte out; the output layer is the token embedding.

    Initial weights come from the default generator: call `torch.manual_seed` first.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, sizes.width)
        self.positions = nn.Embedding(sizes.context, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width)
        for name, param in self.named_parameters():
            if param.ndim == 2:
                # Every block adds twice to the residual stream, whose variance must not grow with depth.
                adds = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(param, std=0.02 / (2 * sizes.layers) ** 0.5 if adds else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(param)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


MAX_BYTES = 4_000_000


def corpus() -> tuple[Tensor, Tensor]:
    """Training and validation bytes: the library's top-level modules by name, and the last tenth of them."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda path: path.name)
    text = b"".join(path.read_bytes() for path in paths)[:MAX_BYTES]
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    split = len(data) * 9 // 10
    return data[:split], data[split:]


def batches(data: Tensor, *, batch: int, context: int, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`count` random batches of (inputs, targets); a seed always draws the same ones."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        starts = torch.randint(len(data) - context, (batch, 1), generator=generator)
        windows = data[starts + torch.arange(context + 1)].long()
        yield windows[:, :-1], windows[:, 1:]
