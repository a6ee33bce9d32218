"""sha256, in hex, of what a result depends on (values, files, our own code), and the versions of libraries."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import cuantiza


def digest(value: object) -> str:
    """sha256 in hex of `value` as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def code_digest(*modules: str) -> str:
    """sha256 of the source of `modules` (such as "cuantiza.export.graphs.gpt2") and of all modules of ours that they import."""
    return digest({name: sha256_file(path) for name, path in code_files(*modules).items()})


def code_files(*modules: str) -> dict[str, Path]:
    """The files of `modules` and of all that they import of this repository, by the module's name.

    Imports are read from the source, those within functions too; a module that is imported by a string does not count.
    """
    files: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        path = _source(name)
        if name in files or path is None:
            continue
        files[name] = path
        waiting.append(name.rpartition(".")[0])  # Python runs a package before its modules
        waiting += _imports(path.read_bytes())
    return files


@functools.cache
def _imports(source: bytes) -> list[str]:
    """The names that `source` may import: modules, and what it takes from them, which may be modules too."""
    names: list[str] = []
    for node in _run(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


def _run(node: ast.AST) -> Iterator[ast.AST]:
    """`node` and everything in it that runs: what stands under `if TYPE_CHECKING:` is for type checkers alone."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and child in node.body:
            continue
        yield from _run(child)


def _source(name: str) -> Path | None:
    """The file of the module or package `name` of cuantiza; None if there is no such module."""
    package, *parts = name.split(".")
    if package != "cuantiza":
        return None
    for folder in map(Path, cuantiza.__path__):
        for path in (folder.joinpath(*parts, "__init__.py"), folder.joinpath(*parts).with_suffix(".py")):
            if path.is_file():
                return path
    return None


def versions(*distributions: str) -> dict[str, str]:
    """The versions of Python and of those of `distributions` that are installed."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in distributions:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
