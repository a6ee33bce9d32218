"""Read a text as documents, split them into calibration and test without overlap, and cut tokens into windows."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.defaults import CORPUS, SELF, place
from cuantiza.core.inputs.texts import documents
from cuantiza.core.inputs.texts.divide import divided
from cuantiza.core.inputs.texts.files import read_text
from cuantiza.core.machine.progress import report
from cuantiza.core.store.digests import digest
from cuantiza.core.store.folders import publish_texts

if TYPE_CHECKING:
    import numpy as np

INDEX = "index.json"
# What CORPUS= says where no text is given and the model writes one to calibrate on, and what decides which one.
SELF_SEED = 0


@dataclass(frozen=True)
class Source:
    """The text that `CORPUS=` names: a file or folder, or a hub dataset with configuration, split and text column.

    `by` says what a document is: "document" (what the format says), "line", or "article" (lines from title to title).
    With `join`, all texts are one document, with an empty line between two of them. The spec "self" is text that the
    model writes itself, and the other fields mean nothing to it. Raises UserError where `by` would divide what is to be
    joined.
    """

    spec: str = CORPUS
    config: str | None = None
    split: str = "train"
    column: str = "text"
    by: str = "document"
    join: bool = False

    def __post_init__(self) -> None:
        if self.join and self.by != type(self).by:
            raise UserError(
                f"CORPUS_BY={self.by}: divides the text, and CORPUS_JOIN=1 (--corpus-join) joins it; give one of them"
            )


@dataclass(frozen=True)
class Split:
    """The documents of one side, calibration or test. `sha256` identifies their content and order.

    A `joined` text is one document and is read as it is: markers in it are tokens like others. Text that the model writes
    itself has a `seed` and no documents: it is written when the model calibrates.
    """

    name: str
    documents: tuple[str, ...]
    seed: int | None = None
    joined: bool = False

    @property
    def sha256(self) -> str:
        return digest([_sha256(text) for text in self.documents]) if self.seed is None else digest([SELF, self.seed])


@functools.cache
def load_calibration(source: Source) -> Split:
    """The calibration side of `source`: what is scored is never in it.

    It is a third of the documents, as in `load_splits`; of a joined data set it is the split "train", and of a joined
    folder with an index that file's calibration side. Raises UserError where a joined text has no other side, such as a
    saved data set without splits, and as `load_splits` does.
    """
    if source.spec == SELF:
        return Split("calibration", (), SELF_SEED)
    if not source.join:
        return load_splits(source)[0]
    if _has_index(source):
        return _joined(load_splits(source)[0])
    train = Source.split
    other = f'QUANTIZE="--corpus OTHER", or "--corpus {SELF}" for text that the model writes'
    # A split may be several, or a part of one: "test+train", "train[:10%]"; "all" is all of them.
    named = {part.strip() for part in re.split(r"[+[(]", source.split)}
    if named & {train, "all"} or not documents.may_have_split(source, train):
        raise UserError(
            f"CORPUS={source.spec}: all of it is scored where CORPUS_JOIN=1, so nothing is left to calibrate on; score "
            f"another split of a data set that has {train}, too (CORPUS_SPLIT=test), or calibrate on another text: {other}"
        )
    try:
        return Split("calibration", (documents.join(replace(source, split=train)),), joined=True)
    except UserError as error:
        raise UserError(
            f"{error}; where CORPUS_JOIN=1, the split {train} calibrates, or another text: {other}"
        ) from None


@functools.cache
def load_test(source: Source) -> Split:
    """The side of `source` that is scored: what does not calibrate, as in `load_splits`, and all of a joined text.

    Of a joined folder with an index it is that file's test side, and of "self" it is that of the embedded text, since
    what a model writes says nothing of its quality.
    """
    if source.spec == SELF:
        report(
            f"corpus    {SELF}: the model writes the text that calibrates; what is scored is the test split of {CORPUS}, or "
            'of another text with EVAL="--corpus TEXT"'
        )
        return load_splits(Source())[1]
    if not source.join:
        return load_splits(source)[1]
    return (
        _joined(load_splits(source)[1]) if _has_index(source) else Split("test", (documents.join(source),), joined=True)
    )


def scored(source: Source) -> Source:
    """The text that `load_test(source)` is of."""
    return Source() if source.spec == SELF else source


@functools.cache
def load_splits(source: Source) -> tuple[Split, Split]:
    """(calibration, test) of `source`: a third of its documents is for calibration, the rest for the test.

    A folder with an index.json of ours is split as that file says, and its documents must match their sha256. Otherwise the
    third with the lowest sha256 calibrates, so that a document of a corpus is always on the same side; a document that
    occurs twice counts once. Raises UserError if there are fewer than two documents, or if a file cannot be read.
    """
    if _has_index(source):
        calibration, test = _indexed(place(source.spec), source.by)
    else:
        texts = documents.read(source)
        chosen = set(sorted(texts, key=_sha256)[: max(1, len(texts) // 3)])
        calibration = [text for text in texts if text in chosen]
        test = [text for text in texts if text not in chosen]
    return Split("calibration", tuple(calibration)), Split("test", tuple(test))


def write_index(folder: Path) -> bool:
    """Write the index.json that fixes the split of the `.txt` documents in `folder`: every third name calibrates.

    Returns whether it was written, or else was the same already. Raises UserError where there are no texts for both sides,
    or where an index.json is there that is not ours.
    """
    files = _listed(folder)
    if not files:
        raise UserError(f"{folder}: holds no .txt file; give the folder of the documents")
    if (path := folder / INDEX).exists() and not _is_ours(path, if_broken=False):
        raise UserError(f"{path}: was not written by `cuantiza index`, and would be lost; move it away first")
    entries: list[dict[str, Any]] = [
        {
            "file": file.name,
            "split": "calibration" if number % 3 == 1 else "test",
            "words": len(read_text(file, documents.FILE_BYTES)[0].split()),
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for number, file in enumerate(files)
    ]
    if len({entry["split"] for entry in entries if entry["words"]}) < 2:
        raise UserError(
            f"{folder}: its {len(files)} .txt files have no text for calibration or none for the test, which need one each; "
            "add texts, and remove empty files"
        )
    return publish_texts(folder, {INDEX: json.dumps({"documents": entries}, indent=1) + "\n"})


def stream(tokens: list[list[int]], separator: int) -> np.ndarray:
    """The `tokens` of all documents as one stream of token ids [N], each after a `separator` token, as in GPT-2's training."""
    import numpy as np  # to find that the text is the same takes none of it

    return np.concatenate([np.asarray([separator, *ids], np.int64) for ids in tokens])


def full_windows(tokens: np.ndarray, length: int) -> np.ndarray:
    """The windows [n, length] of a stream, without overlap; tokens at its end that fill no window are left out."""
    count = len(tokens) // length
    return tokens[: count * length].reshape(count, length)


def _has_index(source: Source) -> bool:
    """Whether a folder has an index of ours, which may be broken: that of another program says nothing of its texts."""
    path = place(source.spec) / INDEX
    return path.is_file() and _is_ours(path, if_broken=True)


def _is_ours(path: Path, *, if_broken: bool) -> bool:
    """Whether `path` is an index of ours; `if_broken` where it is no JSON and nobody can tell."""
    try:
        return _documents(path) is not None
    except (ValueError, RecursionError):
        return if_broken


def _documents(path: Path) -> list[dict[str, Any]] | None:
    """The entries of the index `path`; None where it is JSON of another kind. Raises ValueError where it is no JSON."""
    found = json.loads(path.read_text(encoding="utf-8"))
    entries = found["documents"] if isinstance(found, dict) and found.keys() == {"documents"} else None
    if not isinstance(entries, list):
        return None
    ours = not entries or any(isinstance(entry, dict) and "split" in entry for entry in entries)
    return entries if ours else None


def _joined(split: Split) -> Split:
    return Split(split.name, (documents.BETWEEN.join(split.documents),), joined=True)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _listed(folder: Path) -> list[Path]:
    """The `.txt` files of `folder` that its index lists, sorted."""
    return [file for file in documents.visible(folder) if file.parent == folder and file.suffix.lower() == ".txt"]


def _indexed(folder: Path, by: str) -> tuple[list[str], list[str]]:
    again = f"write it again with `cuantiza index {folder}`"
    try:
        entries = _documents(folder / INDEX) or []
        wanted = [(Path(entry["file"]).name, str(entry["split"]), entry["sha256"]) for entry in entries]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder / INDEX}: broken index ({error}); delete it and {again}") from None
    sides: dict[str, list[str]] = {"calibration": [], "test": []}
    for name, side, sha256 in wanted:
        file = folder / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != sha256 or side not in sides:
            raise UserError(f"{file}: is not what {INDEX} says; {again}")
        sides[side].append(read_text(file, documents.FILE_BYTES)[0])
    if unlisted := sorted({file.name for file in _listed(folder)} - {name for name, *_ in wanted}):
        raise UserError(f"{folder / unlisted[0]}: is not in {INDEX}; {again}")
    calibration, test = ([text for one in texts for text in divided([one], by)] for texts in sides.values())
    if not calibration or not test:
        raise UserError(f"{folder / INDEX}: names no documents for calibration or none for test; {again}")
    if by == "document" and set(calibration) & set(test):
        raise UserError(f"{folder / INDEX}: has the same text on both sides; delete one copy and {again}")
    both = set(calibration)  # lines of dialogue, for example, occur on both sides
    return calibration, [text for text in test if text not in both]
