"""Measurements of adamw_triton: `python -m bench --help`."""

import importlib
from types import ModuleType

IN_CODEGEN = ("static", "arithmetic", "tune")


def module_of(command: str) -> ModuleType:
    """The module of a command of `python -m bench`."""
    return importlib.import_module(f"bench.codegen.{command}" if command in IN_CODEGEN else f"bench.{command}")
