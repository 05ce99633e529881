"""Cases in which every two values of different factors meet."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def pairwise(factors: Mapping[str, Sequence[Any]], allowed: Callable[..., bool]) -> list[dict[str, Any]]:
    """Choose few of all combinations, so that each pair of values that some allowed one has is in a chosen one.

    Args:
        factors: the values of each.
        allowed: takes a combination as keyword arguments.
    """
    combinations = (dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values()))
    candidates = [case for case in combinations if allowed(**case)]
    bits: dict[Any, int] = {}  # of sets of pairs, which integers are faster than
    pairs_of = []
    for case in candidates:
        numbers = (bits.setdefault(pair, len(bits)) for pair in itertools.combinations(case.items(), 2))
        pairs_of.append(sum(1 << number for number in numbers))
    uncovered = (1 << len(bits)) - 1
    chosen = []
    while uncovered:
        best = max(range(len(candidates)), key=lambda i: (pairs_of[i] & uncovered).bit_count())
        chosen.append(candidates[best])
        uncovered &= ~pairs_of[best]
    return chosen


def one_of_each(cases: Sequence[Mapping[str, Any]], *factors: str) -> list[Mapping[str, Any]]:
    """Choose few of the cases, so that each value of these factors, or of all, is in a chosen one."""
    items_of = [{item for item in case.items() if not factors or item[0] in factors} for case in cases]
    uncovered = set().union(*items_of)
    chosen = []
    while uncovered:
        best = max(range(len(cases)), key=lambda i: len(uncovered & items_of[i]))
        chosen.append(cases[best])
        uncovered -= items_of[best]
    return chosen
