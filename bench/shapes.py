"""Parameter shapes of real models, derived from their architecture, and synthetic lists.

Shapes are in the order of the model's `parameters()`; tied weights count once, buffers not at all. A list "fsdp/N"
is what the first of N ranks holds under FSDP2, which splits dimension 0 of every parameter: ceil(dim 0 / N) rows,
the rest unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

Shape = tuple[int, ...]


def _linear(outputs: int, inputs: int) -> list[Shape]:
    return [(outputs, inputs), (outputs,)]


def _norm(width: int) -> list[Shape]:
    return [(width,), (width,)]


def resnet50() -> list[Shape]:
    """He et al., https://arxiv.org/abs/1512.03385; convolutions without a bias, each with a batch norm."""

    def convolution(outputs: int, inputs: int, kernel: int) -> list[Shape]:
        return [(outputs, inputs, kernel, kernel), *_norm(outputs)]

    made = convolution(64, 3, 7)
    inputs = 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(depth):
            made += convolution(width, inputs, 1) + convolution(width, width, 3) + convolution(4 * width, width, 1)
            if block == 0:  # the shortcut changes width too
                made += convolution(4 * width, inputs, 1)
            inputs = 4 * width
    return made + _linear(1000, inputs)


def vit_b16() -> list[Shape]:
    """Dosovitskiy et al., https://arxiv.org/abs/2010.11929; images of 224 x 224, 1000 classes."""
    width, depth, patch = 768, 12, 16
    made: list[Shape] = [(1, 1, width), (1, (224 // patch) ** 2 + 1, width), (width, 3, patch, patch), (width,)]
    for _ in range(depth):
        made += _norm(width) + _linear(3 * width, width) + _linear(width, width)
        made += _norm(width) + _linear(4 * width, width) + _linear(width, 4 * width)
    return made + _norm(width) + _linear(1000, width)


def convnext_b() -> list[Shape]:
    """Liu et al., https://arxiv.org/abs/2201.03545; with a scale per channel for each block."""
    widths, depths = (128, 256, 512, 1024), (3, 3, 27, 3)
    made: list[Shape] = []
    inputs, kernel = 3, 4
    for width, depth in zip(widths, depths, strict=True):
        stem: list[Shape] = [(width, inputs, kernel, kernel), (width,)]
        made += stem + _norm(width) if inputs == 3 else _norm(inputs) + stem
        for _ in range(depth):
            made += [(width, 1, 1), (width, 1, 7, 7), (width,)]
            made += _norm(width) + _linear(4 * width, width) + _linear(width, 4 * width)
        inputs, kernel = width, 2
    return made + _norm(inputs) + _linear(1000, inputs)


def gpt2(width: int, depth: int) -> list[Shape]:
    """Radford et al. 2019; vocabulary 50257, context 1024, the output layer tied to the embedding."""
    made: list[Shape] = [(50257, width), (1024, width)]
    for _ in range(depth):
        # GPT-2 keeps its matrices as inputs x outputs.
        made += [*_norm(width), (width, 3 * width), (3 * width,), (width, width), (width,)]
        made += [*_norm(width), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return made + _norm(width)


def llama3(width: int, depth: int, key_value: int, hidden: int, *, tied: bool) -> list[Shape]:
    """Grattafiori et al., https://arxiv.org/abs/2407.21783; vocabulary 128256.

    Args:
        key_value: width of the keys, and of the values: grouped-query attention has fewer heads of them.
        tied: whether the output layer is the embedding.
    """
    vocabulary = 128256
    made: list[Shape] = [(vocabulary, width)]
    for _ in range(depth):
        made += [(width, width), (key_value, width), (key_value, width), (width, width)]
        made += [(hidden, width), (hidden, width), (width, hidden), (width,), (width,)]
    made.append((width,))
    return made if tied else [*made, (vocabulary, width)]


def shard(shapes: Iterable[Shape], ranks: int) -> list[Shape]:
    """What the first of `ranks` ranks of FSDP2 holds."""
    return [(-(-rows // ranks), *rest) for rows, *rest in shapes]


def _repeated(count: int, size: int) -> list[Shape]:
    return [(size,)] * count


llama3_8b = partial(llama3, 4096, 32, 1024, 14336, tied=False)
llama3_70b = partial(llama3, 8192, 80, 1024, 28672, tied=False)
llama3_405b = partial(llama3, 16384, 126, 1024, 53248, tied=False)

MODELS: dict[str, Callable[[], list[Shape]]] = {
    "resnet-50": resnet50,
    "vit-b/16": vit_b16,
    "convnext-b": convnext_b,
    "gpt2-124m": partial(gpt2, 768, 12),
    "gpt2-xl": partial(gpt2, 1600, 48),
    "llama-3.2-1b": partial(llama3, 2048, 16, 512, 8192, tied=True),
    "llama-3-8b": llama3_8b,
    "llama-3-8b fsdp/8": lambda: shard(llama3_8b(), 8),
    "llama-3-70b fsdp/64": lambda: shard(llama3_70b(), 64),
    "1000x1024": partial(_repeated, 1000, 1024),
    "10000x64": partial(_repeated, 10_000, 64),
    "200x1Mi": partial(_repeated, 200, 2**20),
    "10x16Mi": partial(_repeated, 10, 2**24),
}


def shapes(name: str) -> list[Shape]:
    """The shapes of one of MODELS."""
    return MODELS[name]()


def elements(shapes: Iterable[Shape]) -> int:
    return sum(map(math.prod, shapes))


def scaled(shapes: Sequence[Shape], max_elements: int) -> tuple[list[Shape], int]:
    """Shapes of at most `max_elements` elements, and the factor they were divided by: 1 if they fit.

    They are divided like shards: as many tensors as before, so that host time is that of the whole list; and over a
    power of two, as clusters are, so that shards are as even.

    Raises:
        ValueError: not even one row of each fits.
    """
    most = max((shape[0] for shape in shapes), default=1)
    factor = 1
    while elements(shard(shapes, factor)) > max_elements:
        if factor >= most:
            raise ValueError(f"one row of each of {len(shapes)} tensors is more than {max_elements} elements")
        factor *= 2
    return shard(shapes, factor), factor
