"""In the workers: what a step launches, and what it says to other ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from adamw_triton import launch

KERNELS = ("adamw_kernel", "adamw_table_kernel", "grad_norm_kernel", "scalars_kernel")


class Collectives(TorchDispatchMode):
    """Writes down the name of every collective."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in function.namespace:
            self.names.append(function._opname.strip("_"))
        return function(*args, **(kwargs or {}))


@contextmanager
def mocked_launches() -> Iterator[list[str]]:
    """The names of the kernels that are launched meanwhile, none of which runs."""
    names: list[str] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            names.append(self.name)
            return lambda *args, **kwargs: None

    kernels = {name: getattr(launch, name) for name in KERNELS}
    for name in kernels:
        setattr(launch, name, Recorder(name))
    try:
        yield names
    finally:
        for name, kernel in kernels.items():
            setattr(launch, name, kernel)
