"""Optimizer state that notes when entries are replaced: looking for that would cost a step as much as all else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any


class Changes:
    """Whether all changes of some dicts have been seen: by the plan, and by the step under torch.compile.

    The dicts make it False, who looks makes it True.
    """

    __slots__ = ("seen", "seen_compiled")

    def __init__(self) -> None:
        self.seen = self.seen_compiled = False


class ParamState(dict):
    """State of one parameter: name -> value."""

    def __init__(self, changes: Changes, entries: Mapping[str, Any]) -> None:
        super().__init__(entries)
        self.changes = changes

    def __reduce__(self) -> tuple[Any, ...]:  # copied and pickled as what any optimizer's is
        return dict, (), None, None, iter(self.items())


class State(dict):
    """State of all parameters, as `torch.optim.Optimizer.state`: parameter -> state, empty where there is none."""

    def __init__(self, entries: Mapping[Any, Any]) -> None:
        super().__init__(entries)
        self.changes = Changes()

    def watch(self, param: Any) -> ParamState:
        """The state of `param`, whose changes are noted from now on."""
        entries = self.get(param, {})
        if not isinstance(entries, ParamState) or entries.changes is not self.changes:
            self[param] = entries = ParamState(self.changes, entries)
        return entries

    __missing__ = watch

    def __reduce__(self) -> tuple[Any, ...]:
        return defaultdict, (dict,), None, None, iter(self.items())


def _noting(method: Callable[..., Any]) -> Callable[..., Any]:
    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.changes.seen = self.changes.seen_compiled = False
        return method(self, *args, **kwargs)

    return noted


for _class in (ParamState, State):
    for _name in ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update"):
        setattr(_class, _name, _noting(getattr(dict, _name)))
