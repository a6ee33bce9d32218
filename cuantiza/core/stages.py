"""`cuantiza.export` and `cuantiza.quantize` are a package and a function of one name: a package that can be called."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Stage(ModuleType):
    """A package whose call is that of the function of its own name in its module `stage`, imported at the call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(f"{self.__name__}.stage"), self.__name__.rpartition(".")[2])(*args, **kwargs)


def make_callable(package: str) -> None:
    """Let the imported `package` be called."""
    sys.modules[package].__class__ = _Stage
