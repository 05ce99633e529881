"""A small GPT over bytes, as plain as it can be written."""

from __future__ import annotations

from dataclasses import dataclass

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
