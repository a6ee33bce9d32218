"""The benchmark's rows, and how their files are made. A row is a recipe of ours, a peer, or a step of the ablation."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.checkpoints import checkpoint_digest
from cuantiza.core.machine.child import Failed, run
from cuantiza.core.store import digests
from lab import CORPUS, ROOT
from lab.bench import ours
from lab.bench.child import ask, command, require
from lab.checkpoints.shapes import Shape

# Every row's logits are compared with the first of these. It is also the baseline, unless --baseline names another row.
RECIPES = (
    "fp32",
    "fp32-ort",
    "int8-dynamic",
    "int8-dynamic-ort",
    "int8-static",
    "int8-static-ort",
    "int8-weight-ort",
    "int4-weight",
    "int4-weight-ort",
)
# (row, recipe, fields of Options). Each row shows the gain of one design choice.
ABLATION: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("fp32 portable, all logits", "fp32", {"last_only": False, "chunk": None}),
    ("fp32 portable, last logits only", "fp32", {"chunk": None}),
    ("fp32-ort, cache concatenated", "fp32-ort", {"in_place": False, "chunk": None}),
    ("fp32-ort, cache in place", "fp32-ort", {"chunk": None}),
    ("fp32-ort, and prefill in chunks", "fp32-ort", {}),
    ("int8-dynamic portable", "int8-dynamic", {}),
    ("int8-dynamic-ort, all logits", "int8-dynamic-ort", {"last_only": False}),
    ("int8-dynamic-ort, cache concatenated", "int8-dynamic-ort", {"in_place": False}),
    ("int8-dynamic-ort, small pages", "int8-dynamic-ort", {"large_pages": False}),
    ("int8-dynamic-ort", "int8-dynamic-ort", {}),
    ("int8-weight-ort, small pages", "int8-weight-ort", {"large_pages": False}),
    ("int8-weight-ort", "int8-weight-ort", {}),
    ("int4-weight-ort", "int4-weight-ort", {}),
)
# For random models these fields replace a recipe's own, which makes it cheap to apply. The quality of a random model
# means nothing, and its speed does not depend on calibration.
CHEAP = {"rounding": "nearest", "smoothing": [], "calibration": {"windows": 8, "tokens": 128, "minimum": 8}}
PREPARE_TIMEOUT_S = 1800


@dataclass(frozen=True)
class Row:
    """One row: an Engine (lab/bench/worker.py) of `module` that runs in the interpreter `python` on files in `folder`.

    `kind` is one of our recipes, or a kind that the peer's module knows. `cache_bytes` is the size of one element of
    keys and values. `options` are the fields of cuantiza.core.run.runtime.Options.
    """

    name: str
    kind: str
    module: str
    python: Path
    folder: Path
    precision: str
    cache_bytes: int = 4
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        return self.module == ours.__name__


@dataclass(frozen=True)
class Prepared:
    """A row's prepared files: the bytes that count as its size, and the versions of the libraries that made them."""

    bytes: int
    version: str


def our_rows(artifacts: Path) -> list[Row]:
    """One row per recipe of RECIPES; `artifacts` is the folder of a model's artifacts."""
    return [_our_row(name, name, artifacts, {}) for name in RECIPES]


def ablation_rows(artifacts: Path) -> list[Row]:
    return [_our_row(name, recipe, artifacts, options) for name, recipe, options in ABLATION]


def peer_rows(folder: Path) -> list[Row]:
    """One row per peer; the files of each go to a folder of their own in `folder`."""
    from lab.bench.peers import PEERS

    pythons = {
        "peers": Path(os.environ.get("PEERS_PYTHON", ROOT / ".venv-peers/bin/python")),
        "optimum": Path(os.environ.get("OPTIMUM_PYTHON", ROOT / ".venv-optimum/bin/python")),
    }
    return [
        Row(
            peer.name,
            peer.kind,
            peer.module,
            pythons[peer.environment].absolute(),
            folder / re.sub(r"[^\w.-]+", "-", peer.name),
            peer.precision,
            peer.cache_bytes,
        )
        for peer in PEERS
    ]


def select(rows: list[Row], patterns: list[str] | None, baseline: str | None) -> list[Row]:
    """The rows that match one of `patterns` (None: all rows). The first row and the baseline are always included.

    Raises UserError if a pattern or the baseline matches no row.
    """
    names = [row.name for row in rows]
    for pattern in patterns or []:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"--rows {pattern}: matches none of {', '.join(names)}")
    if baseline is not None and baseline not in names:
        raise UserError(f"--baseline {baseline}: is none of {', '.join(names)}")
    wanted = {names[0], baseline}
    return [
        row
        for row in rows
        if patterns is None or row.name in wanted or any(fnmatchcase(row.name, pattern) for pattern in patterns)
    ]


def export(checkpoint: Path, output: Path) -> None:
    """Export `checkpoint` to our fp32 artifact in `output`/<its name>. Raises UserError if the export fails."""
    try:
        _run("export", "--model", checkpoint, "--output", output)
    except Failed as error:
        raise UserError(f"python -m export --model {checkpoint}: {error}") from None


def prepare_ours(row: Row, shape: Shape, checkpoint: Path) -> Prepared:
    """Make the artifact of one of our rows with `python -m quantize`, unless it is up to date. Raises Failed."""
    if row.kind != "fp32":
        recipe = row.kind if shape.folder else _cheap_recipe(row.kind, row.folder.parent.parent / "recipes")
        common = ("--model", checkpoint, "--output", row.folder.parent.parent, "--corpus", CORPUS)
        _run("quantize", "--recipes", recipe, *common)
    return Prepared(_bytes(ours.files(row.kind, row.folder)), ours.version())


def peer_inputs(checkpoint: Path, artifacts: Path) -> dict:
    """The inputs of every peer's files: digests of the model and of our artifacts of it in the folder `artifacts`."""
    content = {path.parent.name: digests.sha256_file(path) for path in sorted(artifacts.glob("*/model.onnx"))}
    return {"checkpoint": checkpoint_digest(checkpoint), "ours": content}


def prepare_peer(row: Row, checkpoint: Path, artifacts: Path, inputs: dict, work: Path) -> Prepared:
    """Make the files of a peer's row again only if `inputs` (from `peer_inputs`) or the peer's code has changed.

    A .json file beside the row's folder records the inputs and the files that were made from them. `work` is for
    temporary files. Raises Failed.
    """
    require(row.python)
    code = {str(file.relative_to(ROOT)): digests.sha256_file(file) for file in code_files(row.module)}
    inputs = inputs | {"code": code, "kind": row.kind, "python": str(row.python)}
    note = row.folder.with_name(f"{row.folder.name}.json")
    made = _noted(note, inputs)
    if made is None:
        note.unlink(missing_ok=True)
        shutil.rmtree(row.folder, ignore_errors=True)
        row.folder.mkdir(parents=True)
        places = {"checkpoint": checkpoint, "ours": artifacts, "folder": row.folder}
        request = {"task": "prepare", "module": row.module, "kind": row.kind}
        request |= {name: str(path.absolute()) for name, path in places.items()}
        made = ask(row.python, request, work, PREPARE_TIMEOUT_S)
        note.write_text(json.dumps({"inputs": inputs} | made, indent=1) + "\n", encoding="utf-8")
    return Prepared(_bytes([Path(file) for file in made["files"]]), made["version"])


def code_files(module: str) -> list[Path]:
    """The file of a module of the lab, and of all modules of the lab that it imports (by `from`, on one line)."""
    found: list[Path] = []
    waiting = [module]
    while waiting:
        path = (ROOT / waiting.pop().replace(".", "/")).with_suffix(".py")
        if path in found or not path.is_file():
            continue
        found.append(path)
        for package, names in re.findall(
            r"^\s*from (lab[\w.]*) import ([\w ,]+)$", path.read_text("utf-8"), re.MULTILINE
        ):
            waiting += [package, *(f"{package}.{name.strip()}" for name in names.split(","))]
    return sorted(found)


def _run(module: str, *arguments: object) -> str:
    """Standard output of one of our stages in this interpreter. Raises Failed."""
    return run(command(Path(sys.executable), module, *arguments), timeout=PREPARE_TIMEOUT_S, cwd=ROOT)


def _our_row(name: str, recipe: str, artifacts: Path, options: dict[str, Any]) -> Row:
    precision = recipe.split("-")[0]
    return Row(name, recipe, ours.__name__, Path(sys.executable), artifacts / recipe, precision, options=options)


def _cheap_recipe(name: str, folder: Path) -> Path:
    """Write `folder`/<name>.json: the built-in recipe with the fields of CHEAP, and return its path."""
    fields = json.loads(_run("cuantiza", "recipes", "--json", name))
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(fields | {key: CHEAP[key] for key in CHEAP if key in fields}), encoding="utf-8")
    return path


def _noted(note: Path, inputs: dict) -> dict | None:
    """The content of `note` if it was made from the same `inputs` and all its files exist; otherwise None."""
    try:
        made = json.loads(note.read_text(encoding="utf-8"))
        whole = made["inputs"] == inputs and all(Path(file).is_file() for file in made["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return made if whole else None


def _bytes(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)
