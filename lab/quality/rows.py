"""The rows of the page on quality, ours and the peers', and how their files are made with time and memory measured."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

from cuantiza.core.errors import UserError
from cuantiza.core.machine.child import run
from cuantiza.core.store import artifact, digests
from cuantiza.core.store.user_cache import OFF, VARIABLE
from cuantiza.quantize.recipes.registry import RECIPES, MixedWeightOnly, to_json
from lab import ROOT
from lab.bench import ours
from lab.bench.child import ask, command, require
from lab.bench.rows import code_files
from lab.big_models import anonymous
from lab.quality.peers import PEERS

# A recipe for ONNX Runtime (-ort) counts only if its arithmetic differs from that of the portable recipe.
OURS = [name for name in RECIPES if not name.endswith("-ort") or name in ("int8-weight-ort", "int4-weight-ort")]
# What `int-mixed` may spend beside its own budget, as shares of fp32's file: from little above 4 bits to little below 8.
BUDGETS = ("0.19x", "0.205x", "0.24x")
# Recipes that call ONNX Runtime's own tools: they stand for that library.
ONNX_RUNTIME = {
    "ort-dynamic": "`quantize_dynamic` as its documentation advises for transformers (our recipe `ort-dynamic`)",
    "ort-static": "`quantize_static` as its documentation advises for transformers (our recipe `ort-static`)",
}
TIMEOUT_S = 3600
_INTERVAL_S = 0.02


@dataclass(frozen=True)
class Row:
    """One row: `kind` of `module` (lab/bench/worker.py), run by the interpreter `python` on the files in `folder`.

    `bits` are those of most weights, and `how` says what was done to quantize. `recipe` is the recipe of ours that makes
    the row's artifact, with the budget `max_bytes` where that is not its own; None for a peer's row.
    """

    name: str
    kind: str
    module: str
    python: Path
    folder: Path
    bits: int
    how: str
    calibrated: bool = False
    recipe: str | None = None
    max_bytes: str | None = None

    @property
    def is_ours(self) -> bool:
        return self.recipe is not None and self.recipe not in ONNX_RUNTIME


@dataclass(frozen=True)
class Made:
    """A row's files: the bytes of the model, the versions that made them, and what that cost.

    `seconds` and `anonymous_bytes` (the largest anonymous memory of the process and its children) are None for fp32,
    which is not quantized.
    """

    bytes: int
    version: str
    seconds: float | None
    anonymous_bytes: int | None


@dataclass
class Cost:
    """What a block of code cost so far; the fields are those of Made."""

    seconds: float = 0.0
    anonymous_bytes: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)


def all_rows(artifacts: Path, folder: Path) -> list[Row]:
    """Ours, of which the artifacts are in the folder `artifacts`, and the peers', whose files go into `folder`."""
    rows = [_our_row(name, artifacts) for name in OURS]
    rows += [_mixed_row(budget, artifacts) for budget in BUDGETS]
    pythons = {
        "peers": Path(os.environ.get("PEERS_PYTHON", ROOT / ".venv-peers/bin/python")),
        "optimum": Path(os.environ.get("OPTIMUM_PYTHON", ROOT / ".venv-optimum/bin/python")),
    }
    for peer in PEERS:
        place = folder / re.sub(r"[^\w.-]+", "-", peer.name)
        python = pythons[peer.environment].absolute()
        rows.append(Row(peer.name, peer.kind, peer.module, python, place, peer.bits, peer.how, peer.calibrated))
    return rows


def _our_row(recipe: str, artifacts: Path) -> Row:
    bits = int(re.sub(r"\D", "", recipe.split("-")[0]) or 8)
    name, how = recipe, f"recipe `{recipe}`"
    if recipe in ONNX_RUNTIME:
        name, how = f"ONNX Runtime {recipe.removeprefix('ort-')}", ONNX_RUNTIME[recipe]
    return Row(name, recipe, ours.__name__, Path(sys.executable), artifacts / recipe, bits, how, recipe=recipe)


def _mixed_row(budget: str, artifacts: Path) -> Row:
    row = _our_row("int-mixed", artifacts)
    how = f"recipe `int-mixed` with `--max-bytes {budget}`"
    return replace(row, name=f"int-mixed {budget}", folder=artifacts / f"int-mixed-{budget}", how=how, max_bytes=budget)


def select(rows: list[Row], patterns: list[str] | None) -> list[Row]:
    """The rows whose name matches one of `patterns` (None: all). Raises UserError for a pattern that matches none."""
    names = [row.name for row in rows]
    for pattern in patterns or []:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"--rows {pattern}: matches none of {', '.join(names)}")
    return [row for row in rows if patterns is None or any(fnmatchcase(row.name, pattern) for pattern in patterns)]


def make(row: Row, checkpoint: Path, corpus: str, windows: Path, work: Path) -> Made:
    """Make the files of `row` unless they are up to date; time and memory are kept with them. Raises Failed.

    `corpus` is the text that our recipes calibrate on, and the file `windows` holds the tokens of its calibration split
    that the peers get. `work` is for temporary files.
    """
    if row.recipe is not None:
        return _make_ours(row, row.recipe, checkpoint, corpus)
    return _make_peer(row, checkpoint, windows, work)


def _make_ours(row: Row, recipe: str, checkpoint: Path, corpus: str) -> Made:
    note = row.folder.with_name(f"{row.folder.name}.cost.json")

    if row.max_bytes is not None:  # as a recipe of one's own, whose file names the artifact
        mixed = RECIPES[recipe]
        assert isinstance(mixed, MixedWeightOnly)
        recipe = str(row.folder.with_name(f"{row.folder.name}.json"))
        row.folder.parent.mkdir(parents=True, exist_ok=True)
        Path(recipe).write_text(json.dumps(to_json(replace(mixed, max_bytes=row.max_bytes))), encoding="utf-8")

    def quantize() -> None:
        options = ("--recipes", recipe, "--model", checkpoint, "--output", row.folder.parent.parent, "--corpus", corpus)
        # Without a cache, in which another budget of int-mixed would find what was measured for the first.
        environment = {VARIABLE: OFF}
        run(command(Path(sys.executable), "quantize", *options), timeout=TIMEOUT_S, cwd=ROOT, environment=environment)

    known = _read(note)
    if row.folder.exists():
        quantize()  # does nothing if the artifact is up to date
    # A time counts only for the artifact that was made in it.
    if not row.folder.exists() or known.get("digest") != artifact.open_artifact(row.folder).digest:
        shutil.rmtree(row.folder, ignore_errors=True)
        with measured() as cost:
            quantize()
        known = {
            "digest": artifact.open_artifact(row.folder).digest,
            "seconds": cost.seconds,
            "anonymous_bytes": cost.anonymous_bytes,
        }
        note.write_text(json.dumps(known), encoding="utf-8")
    return Made(_bytes(ours.files(row.kind, row.folder)), ours.version(), known["seconds"], known["anonymous_bytes"])


def _make_peer(row: Row, checkpoint: Path, windows: Path, work: Path) -> Made:
    require(row.python)
    fp32 = artifact.open_artifact(row.folder.parent.parent / "fp32")
    inputs = {
        "fp32": fp32.digest,
        "windows": digests.sha256_file(windows) if row.calibrated else None,
        "code": {str(file.relative_to(ROOT)): digests.sha256_file(file) for file in code_files(row.module)},
        "kind": row.kind,
        "python": str(row.python),
    }
    note = row.folder.with_name(f"{row.folder.name}.json")
    known = _read(note)
    if known.get("inputs") != inputs or not all(Path(file).is_file() for file in known["files"]):
        note.unlink(missing_ok=True)
        shutil.rmtree(row.folder, ignore_errors=True)
        row.folder.mkdir(parents=True)
        places = {"checkpoint": checkpoint, "ours": fp32.path.parent, "folder": row.folder}
        places |= {"calibration": windows} if row.calibrated else {}
        request = {"task": "prepare", "module": row.module, "kind": row.kind}
        request |= {name: str(path.absolute()) for name, path in places.items()}
        with measured() as cost:
            answer = ask(row.python, request, work, TIMEOUT_S)
        known = {"inputs": inputs, "seconds": cost.seconds, "anonymous_bytes": cost.anonymous_bytes} | answer
        note.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    spent = (None, None) if row.bits == 32 else (known["seconds"], known["anonymous_bytes"])
    return Made(_bytes([Path(file) for file in known["files"]]), known["version"], *spent)


@contextmanager
def measured() -> Iterator[Cost]:
    """The time of the block, and the largest anonymous memory of this process's children in it (lab/big_models.py)."""
    cost, start = Cost(), time.monotonic()
    thread = threading.Thread(target=_watch, args=(cost,), daemon=True)
    thread.start()
    try:
        yield cost
    finally:
        cost.stopped.set()
        thread.join()
        cost.seconds = time.monotonic() - start


def _watch(cost: Cost) -> None:
    while not cost.stopped.wait(_INTERVAL_S):
        _, children = anonymous(os.getpid())
        cost.anonymous_bytes = max(cost.anonymous_bytes, children)


def _read(note: Path) -> dict:
    """The content of a note; empty if there is none, or if it is broken."""
    try:
        return json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _bytes(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)
