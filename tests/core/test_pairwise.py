"""Cases that are left out of a run leave no pair of values out."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pairwise


def items(function, **values):
    """What pytest collects for a test with these parameters."""
    cases = [dict(zip(values, case, strict=True)) for case in itertools.product(*values.values())]
    made = {"path": Path("test_it.py"), "originalname": function}
    return [Item(**made, callspec=SimpleNamespace(params=case)) for case in cases]


class Item(SimpleNamespace):
    __hash__ = object.__hash__


def pairs(some):
    return {
        pair
        for item in some
        for pair in itertools.combinations([(n, str(v)) for n, v in item.callspec.params.items()], 2)
    }


def test_every_two_values_meet():
    values = {"a": [None, True, False], "b": [1.0, 2.0, 3.0, 4.0], "c": ["x", "y"], "d": [(), (1,), (1, 2)]}
    collected = items("test_many", **values)
    run, left_out = pairwise.split(collected)
    assert len(collected) == 72 and 12 <= len(run) <= 18
    assert [item for item in collected if item in run] == run, "in order"
    assert sorted(map(id, run + left_out)) == sorted(map(id, collected))
    assert pairs(run) == pairs(collected)


def test_two_parameters_are_run_whole():
    plain = Item(path=Path("test_it.py"), originalname="test_plain")
    collected = [*items("test_two", a=range(5), b=range(6)), plain]
    assert pairwise.split(collected) == (collected, [])


def test_functions_do_not_share_cases():
    one, other = (items(name, a=[0, 1], b=[0, 1], c=[0, 1]) for name in ("test_one", "test_other"))
    run, _ = pairwise.split([*one, *other])
    assert pairs(item for item in run if item.originalname == "test_other") == pairs(other)
