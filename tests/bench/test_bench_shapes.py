"""Shapes of real models against the published parameter counts, and how lists are scaled down."""

import math

import pytest

from bench import shapes
from bench.shapes import MODELS, elements, scaled, shard

# Tensors and parameters, as published with the models' weights.
PUBLISHED = {
    "resnet-50": (161, 25_557_032),
    "vit-b/16": (152, 86_567_656),
    "convnext-b": (344, 88_591_464),
    "gpt2-124m": (148, 124_439_808),
    "gpt2-xl": (580, 1_557_611_200),
    "llama-3.2-1b": (146, 1_235_814_400),
    "llama-3-8b": (291, 8_030_261_248),
    # Every dimension 0 of these two divides by the number of ranks.
    "llama-3-8b fsdp/8": (291, 8_030_261_248 // 8),
    "llama-3-70b fsdp/64": (723, 70_553_706_496 // 64),
    "1000x1024": (1000, 1000 * 1024),
    "10000x64": (10_000, 10_000 * 64),
    "200x1Mi": (200, 200 * 2**20),
    "10x16Mi": (10, 10 * 2**24),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", MODELS)
def test_published_counts(name):
    assert (len(shapes.shapes(name)), elements(shapes.shapes(name))) == PUBLISHED[name]


def test_llama_3_70b_whole():
    assert (len(shapes.llama3_70b()), elements(shapes.llama3_70b())) == (723, 70_553_706_496)


def test_shapes_are_those_of_the_weights():
    assert shapes.shapes("resnet-50")[:3] == [(64, 3, 7, 7), (64,), (64,)]
    assert shapes.shapes("resnet-50")[-2:] == [(1000, 2048), (1000,)]
    assert {(1, 197, 768), (2304, 768), (768, 3072)} <= set(shapes.shapes("vit-b/16"))
    assert {(128, 3, 4, 4), (1024, 512, 2, 2), (512, 1, 7, 7)} <= set(shapes.shapes("convnext-b"))
    assert {(50257, 1600), (1600, 4800), (6400, 1600)} <= set(shapes.shapes("gpt2-xl"))
    assert {(128256, 4096), (1024, 4096), (14336, 4096), (4096, 14336)} <= set(shapes.shapes("llama-3-8b"))
    rows = {(2004, 8192), (128, 8192), (16, 8192), (448, 8192), (128, 28672), (128,)}
    assert set(shapes.shapes("llama-3-70b fsdp/64")) == rows


def test_first_shard_has_the_rows_left_over():
    assert shard([(16, 3), (17, 3), (1,), (5, 1, 2)], 8) == [(2, 3), (3, 3), (1,), (1, 1, 2)]


def test_what_fits_is_not_scaled():
    whole = shapes.shapes("resnet-50")
    assert scaled(whole, elements(whole)) == (whole, 1)
    assert scaled([], 0) == ([], 1)


@pytest.mark.parametrize("name", ["resnet-50", "llama-3-8b", "1000x1024", "10x16Mi"])
@pytest.mark.parametrize("part", [0.99, 0.5, 0.1])
def test_scaled_fits_as_closely_as_a_power_of_two_can(name, part):
    whole = shapes.shapes(name)
    limit = int(part * elements(whole))
    smaller, factor = scaled(whole, limit)
    assert factor > 1 and factor & (factor - 1) == 0
    assert smaller == shard(whole, factor)
    assert elements(smaller) <= limit < elements(shard(whole, factor // 2))
    assert min(map(math.prod, smaller)) >= 1


def test_refuses_what_cannot_be_scaled_enough():
    assert scaled([(4, 3), (2, 3)], 6) == ([(1, 3), (1, 3)], 4)
    with pytest.raises(ValueError, match="one row of each of 2 tensors is more than 5 elements"):
        scaled([(4, 3), (2, 3)], 5)
