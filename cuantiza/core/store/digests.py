"""sha256, in hex, of what a result depends on (values, files, our own code), and the versions of libraries.

A large file is read again only where it may have changed. Its sha256 is kept with its size, its times of change, its
inode and its device (cuantiza/core/store/records.py), and holds as long as these are the same. The time of the inode's
last change (ctime) is among them, which programs cannot set back. Three functions differ in what they take on trust:

sha256_file    nothing: reads the file
sha256_once    what this process itself read before; for what an artifact or a report is made from
sha256_known   what any earlier run of this user read, unless CUANTIZA_HASH_ALL is set; to find that nothing is to do
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import cuantiza
from cuantiza.core.store.records import read_record, write_record

# With this variable of the environment set, every file is read, whatever was recorded of it.
HASH_ALL = "CUANTIZA_HASH_ALL"
LEAST_BYTES = 2**20  # a smaller file is read in less time than a record of it
# The longest step of a file system's clock (FAT's). A file that is younger may change again without another time.
_TICK_NS = 2 * 10**9
_read_here: dict[str, dict[str, Any]] = {}  # what this process read whole, by path


def digest(value: object) -> str:
    """sha256 in hex of `value` as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def sha256_file(path: Path, place: Path | None = None) -> str:
    """sha256 of the content of `path`, all of which is read; `place` is where the file will lie, if not there."""
    with path.open("rb") as file:
        before, now = _identity(file), time.time_ns()
        found = hashlib.file_digest(file, "sha256").hexdigest()
        same = _identity(file) == before
    # As in git's index, what changed a moment ago is "racy": a second change may leave the same times.
    if before["bytes"] >= LEAST_BYTES and same and max(before["mtime_ns"], before["ctime_ns"]) < now - _TICK_NS:
        key = os.path.realpath(place or path)
        _read_here[key] = before | {"sha256": found}
        write_record("file", key, _read_here[key])
    return found


def sha256_once(path: Path) -> str:
    """sha256 of `path`, which is read unless this process did so and the file has not changed since."""
    return _recorded(path, _read_here.get(os.path.realpath(path))) or sha256_file(path)


def sha256_known(path: Path) -> str:
    """sha256 of `path`, which is read unless an earlier run of this user did so and the file has not changed since.

    A disk that flips a bit by itself changes no time, so this is not for what a result is made from.
    """
    if os.environ.get(HASH_ALL) or path.stat().st_size < LEAST_BYTES:
        return sha256_file(path)
    return _recorded(path, read_record("file", os.path.realpath(path))) or sha256_file(path)


def graph_hashes(model: Path, sha256: Callable[[Path], str]) -> dict[str, str]:
    """What `sha256` says of the ONNX file `model` and of its external data beside it, by name."""
    return {file.name: sha256(file) for file in sorted(model.parent.glob(f"{model.name}*"))}


def _recorded(path: Path, record: dict[str, Any] | None) -> str | None:
    """The sha256 in `record` if it is of the file `path` as it is now."""
    if record is None:
        return None
    # Opened, as a network file system asks its server for the times then, and may show older ones otherwise.
    with path.open("rb") as file:
        now = _identity(file)
    return record["sha256"] if now.items() <= record.items() else None


def _identity(file: BinaryIO) -> dict[str, Any]:
    """What a file that was written to, or put in the place of another, does not have in common with it."""
    found = os.fstat(file.fileno())
    return {
        "bytes": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
        "inode": found.st_ino,
        "device": found.st_dev,
    }


@functools.cache
def code_digest(*modules: str) -> str:
    """sha256 of the source of `modules` (such as "cuantiza.export.graphs.gpt2") and of all modules of ours that they import."""
    return digest({name: sha256_file(path) for name, path in code_files(*modules).items()})


def code_files(*modules: str) -> dict[str, Path]:
    """The files of `modules` and of all that they import of this repository, by the module's name.

    Imports are read from the source, those within functions too; a module that is imported by a string does not count.
    What a source imports is kept by the source's sha256, since parsing takes a hundred times as long as hashing.
    """
    files: dict[str, Path] = {}
    waiting = list(modules)
    key = json.dumps([_parser(), *modules])
    kept, found = read_record("imports", key) or {}, {}
    while waiting:
        name = waiting.pop()
        path = _source(name)
        if name in files or path is None:
            continue
        files[name] = path
        waiting.append(name.rpartition(".")[0])  # Python runs a package before its modules
        source = path.read_bytes()
        sha256 = hashlib.sha256(source).hexdigest()
        found[sha256] = kept[sha256] if sha256 in kept else _imports(source)
        waiting += found[sha256]
    if found.keys() != kept.keys():
        write_record("imports", key, found)
    return files


@functools.cache
def _parser() -> str:
    """sha256 of this file, which decides what counts as an import."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


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
    folders = _installed()
    told = {name: _version(name, folders.get(_normal(name), [])) for name in distributions}
    return found | {name: version for name, version in told.items() if version is not None}


def _version(distribution: str, folders: list[Path]) -> str | None:
    """The version of a distribution, from METADATA in the first of `folders` that has it; None if it is not installed."""
    for folder in folders:
        with suppress(OSError):
            fields = (folder / "METADATA").read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0]
            if told := re.search(r"^Version:\s*(\S+)", fields, re.MULTILINE):
                return told[1]
    # What is installed in another form is left to Python's own module, which takes longer to import than all this.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _installed() -> dict[str, list[Path]]:
    """The folders NAME-VERSION.dist-info of Python's path, by NAME."""
    found: dict[str, list[Path]] = {}
    for place in sys.path:
        with suppress(OSError):
            for name in os.listdir(place or "."):  # noqa: PTH208 - one listing of some hundred names
                if name.endswith(".dist-info"):
                    found.setdefault(_normal(name.partition("-")[0]), []).append(Path(place, name))
    return found


def _normal(distribution: str) -> str:
    """`distribution` in the one form in which names are compared (PyPA's name normalization)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()
