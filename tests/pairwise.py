"""Few cases out of many: those in which every two values of different parameters meet."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any


def pairwise(factors: Mapping[str, Sequence[Any]], allowed: Callable[..., bool]) -> list[dict[str, Any]]:
    """Choose few of all combinations, so that each pair of values that some allowed one has is in a chosen one.

    Args:
        factors: the values of each.
        allowed: takes a combination as keyword arguments.
    """
    combinations = (dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values()))
    candidates = [case for case in combinations if allowed(**case)]
    return [candidates[i] for i in _cover(itertools.combinations(case.items(), 2) for case in candidates)]


def one_of_each(cases: Sequence[Mapping[str, Any]], *factors: str) -> list[Mapping[str, Any]]:
    """Choose few of the cases, so that each value of these factors is in a chosen one."""
    return [cases[i] for i in _cover([(name, case[name]) for name in factors] for case in cases)]


def split(items: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Divide pytest's items into those to run and those left out.

    Of a test with three parameters or more as many cases are run as every two values of different parameters meet in.
    """
    by_function = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec") and len(item.callspec.params) > 2:
            by_function[item.path, item.originalname].append(item)
    left_out = set()
    for cases in by_function.values():
        # Values are told apart as objects, of which all cases of a test have the same.
        values = ([(name, id(value)) for name, value in case.callspec.params.items()] for case in cases)
        chosen = set(_cover(itertools.combinations(of_case, 2) for of_case in values))
        left_out |= {case for i, case in enumerate(cases) if i not in chosen}
    return [item for item in items if item not in left_out], [item for item in items if item in left_out]


def _cover(sets: Iterable[Iterable[Hashable]]) -> list[int]:
    """Choose greedily, and return the indices of, sets that hold everything that is in one of them."""
    bits: dict[Hashable, int] = {}  # sets are integers here, which is faster
    masks = [sum(1 << bits.setdefault(member, len(bits)) for member in members) for members in sets]
    uncovered = (1 << len(bits)) - 1
    chosen = []
    while uncovered:
        best = max(range(len(masks)), key=lambda i: (masks[i] & uncovered).bit_count())
        chosen.append(best)
        uncovered &= ~masks[best]
    return chosen
