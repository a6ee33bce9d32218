"""Packages that can be called: `cuantiza.export` and `cuantiza.quantize` are each a package and a function."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Stage(ModuleType):
    """A package that is called through the function of its own name in its module `stage`, imported at the call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(f"{self.__name__}.stage"), self.__name__.rpartition(".")[2])(*args, **kwargs)


def make_callable(package: str) -> None:
    """Let the imported `package` be called."""
    sys.modules[package].__class__ = _Stage
