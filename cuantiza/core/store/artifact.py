"""Artifacts: folders that are published whole or not at all, and verified by their manifest.

artifacts/<model>/.cuantiza.lock      marks the folder as ours; one stage at a time holds it
artifacts/<model>/<recipe>/manifest.json and the files that it lists
artifacts/<model>/.tmp-*              work in progress; swept by the next holder of the lock
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import cuantiza
from cuantiza.core.errors import UserError

SCHEMA = "cuantiza/artifact/1"
MODEL = "model.onnx"
MANIFEST = "manifest.json"
LOCK = ".cuantiza.lock"
# What an artifact holds beside its graph, manifest and external data.
COMPANIONS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class File:
    """A file of an artifact: its size in bytes and the sha256 of its content, in hex."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What an artifact is and what it was made from. Holds no measurement that a rerun could change.

    `inputs` names everything that the bytes depend on; equal inputs mean that nothing has to be rebuilt.
    `details` is the stage's own account (parity, what was quantized, what stays in floating point).
    """

    name: str
    model: str
    recipe: dict
    inputs: dict
    parent: str | None
    calibration: str | None
    files: dict[str, File]
    versions: dict[str, str]
    details: dict
    schema: str = SCHEMA


@dataclass(frozen=True)
class Artifact:
    """A published folder and its manifest."""

    path: Path
    manifest: Manifest

    @property
    def model(self) -> Path:
        return self.path / MODEL

    @property
    def digest(self) -> str:
        """sha256 over the names and hashes of the files: the identity of the content."""
        return digest({name: file.sha256 for name, file in self.manifest.files.items()})


def digest(value: object) -> str:
    """sha256 in hex of `value` as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def code_digest(*modules: str) -> str:
    """sha256 of the source of `modules` and of all that they import of this repository, such as "cuantiza.export.gpt2"."""
    files: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        path = _source(name)
        if name in files or path is None:
            continue
        source = path.read_bytes()
        files[name] = hashlib.sha256(source).hexdigest()
        waiting.append(name.rpartition(".")[0])  # Python runs a package before its modules
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module:
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
    return digest(files)


def _source(name: str) -> Path | None:
    """The file of module or package `name` of cuantiza; None where there is no such module."""
    package, *parts = name.split(".")
    if package != "cuantiza":
        return None
    for folder in map(Path, cuantiza.__path__):
        for path in (folder.joinpath(*parts, "__init__.py"), folder.joinpath(*parts).with_suffix(".py")):
            if path.is_file():
                return path
    return None


def versions(*distributions: str) -> dict[str, str]:
    """Installed versions of `distributions` and of Python."""
    return {"python": ".".join(map(str, sys.version_info[:3]))} | {name: version(name) for name in distributions}


def open_artifact(path: Path) -> Artifact:
    """Read and verify a published artifact.

    Raises UserError where the manifest is missing or broken, or a file's size or sha256 differs.
    """
    manifest_path = path / MANIFEST
    try:
        text = manifest_path.read_bytes().decode()
        fields = json.loads(text)
        if fields["schema"] != SCHEMA:
            raise ValueError(f"schema {fields['schema']!r} is not {SCHEMA!r}")
        # Those of before have no sum of their own.
        if "sha256" in fields and (fields.pop("sha256") != digest(fields) or _manifest_text(fields) != text):
            raise ValueError("changed since it was published")
        files = {name: File(**file) for name, file in fields.pop("files").items()}
        manifest = Manifest(**fields, files=files)
        if not isinstance(manifest.inputs, dict) or MODEL not in files:
            raise ValueError(f"no inputs, or no {MODEL}")
    except FileNotFoundError:
        raise UserError(f"{path}: no {MANIFEST}, so not a whole artifact; run `make export quantize`") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{manifest_path}: broken manifest ({error}); delete the folder and run make again") from None
    for name, file in files.items():
        if Path(name).name != name:
            raise UserError(
                f"{manifest_path}: file name {name!r} leaves the folder; delete the folder and run make again"
            )
        target = path / name
        if not target.is_file() or target.stat().st_size != file.bytes or sha256_file(target) != file.sha256:
            raise UserError(f"{target}: missing or changed since it was published; run make again to rebuild it")
    return Artifact(path, manifest)


def rebuild_reason(path: Path, inputs: dict) -> str | None:
    """Why the artifact at `path` has to be built, in a few words; None where it is whole and up to date."""
    if not path.exists():
        return "new"
    try:
        built = open_artifact(path).manifest.inputs
    except UserError as error:
        return str(error).split(";")[0]
    changed = sorted(key for key in inputs.keys() | built.keys() if inputs.get(key) != built.get(key))
    return f"changed: {', '.join(changed)}" if changed else None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` (created where missing) for one stage, and sweep what a killed stage left there.

    The lock is the kernel's and dies with its process. Raises UserError where `folder` holds files
    that no stage of ours has put there.
    """
    from filelock import FileLock, Timeout

    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; choose another output folder (OUT=, REPORTS=, DIST=)")
    names = os.listdir(folder) if folder.is_dir() else []  # noqa: PTH208 - one listing: another run may be starting here
    if names and LOCK not in names:
        raise UserError(
            f"{folder}: holds files that are not ours; move them away or choose another output folder (OUT=, REPORTS=, DIST=)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another run to finish with {folder}", file=sys.stderr)
        lock.acquire()
    try:
        _sweep(folder)
        yield
    finally:
        with suppress(OSError):
            _sweep(folder)  # a signal may have broken off a removal
        lock.release()


def _sweep(folder: Path) -> None:
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink()


def publish_texts(folder: Path, texts: dict[str, str]) -> bool:
    """Write {name: text} as files of `folder`, each renamed into place, where one differs from what is there; whether so."""
    if all(_holds(folder / name, text) for name, text in texts.items()):
        return False
    with staging(folder / "texts") as work:
        for name, text in texts.items():
            (work / name).write_text(text, encoding="utf-8")
        for name in texts:
            (work / name).replace(folder / name)
    return True


def _holds(file: Path, text: str) -> bool:
    try:
        return file.read_bytes() == text.encode()
    except OSError:
        return False


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`: whatever is left in it at the end goes."""
    folder = Path(tempfile.mkdtemp(prefix=".tmp-", dir=target.parent))
    try:
        yield folder
    except OSError as error:
        if error.filename is None:  # of a write: say at least which disk it was
            error.filename = str(target)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replace(source: Path, target: Path) -> None:
    """Put folder `source` in the place of `target` by renaming, after everything in it has reached the disk.

    A kill between the two renames leaves no `target`, an error there the old one; no moment shows a mixture.
    """
    for path in source.rglob("*"):
        _fsync(path)
    _fsync(source)
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=".tmp-", dir=target.parent))
        try:
            target.rename(old / "old")
            source.rename(target)
        finally:
            if not target.exists():
                (old / "old").rename(target)
            shutil.rmtree(old, ignore_errors=True)
    else:
        source.rename(target)
    _fsync(target.parent)


def publish(
    work: Path,
    target: Path,
    *,
    name: str,
    model: str,
    recipe: dict,
    inputs: dict,
    parent: str | None,
    calibration: str | None,
    versions: dict[str, str],
    details: dict,
) -> Artifact:
    """Write the manifest of the files in `work` and publish them as `target`."""
    files = {file.name: File(file.stat().st_size, sha256_file(file)) for file in sorted(work.iterdir())}
    manifest = Manifest(name, model, recipe, inputs, parent, calibration, files, versions, details)
    fields = json.loads(json.dumps(dataclasses.asdict(manifest)))  # keys as whoever reads it sorts them
    (work / MANIFEST).write_bytes(_manifest_text(fields).encode())
    work.chmod(0o755)
    replace(work, target)
    return Artifact(target, manifest)


def _manifest_text(fields: dict) -> str:
    """manifest.json of `fields`, with their digest as `sha256`."""
    return json.dumps(fields | {"sha256": digest(fields)}, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
