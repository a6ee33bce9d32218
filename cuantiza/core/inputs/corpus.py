"""Read a text as documents, split them into calibration and test without overlap, and cut tokens into windows."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.defaults import CORPUS, place
from cuantiza.core.store.digests import digest

SEPARATOR = "<|endoftext|>"
INDEX = "index.json"
_SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Source:
    """The text that `CORPUS=` names: a file or folder, or a hub dataset with configuration, split and text column."""

    spec: str = CORPUS
    config: str | None = None
    split: str = "train"
    column: str = "text"


@dataclass(frozen=True)
class Split:
    """The documents of one side, calibration or test. `sha256` identifies their content and order."""

    name: str
    documents: tuple[str, ...]

    @property
    def sha256(self) -> str:
        return digest([_sha256(text) for text in self.documents])


@functools.cache
def load_splits(source: Source) -> tuple[Split, Split]:
    """(calibration, test) of `source`: a third of its documents is for calibration, the rest for the test.

    A folder with an index.json is split as that file says, and its documents must match their sha256. Otherwise the
    third with the lowest sha256 calibrates, so that a document of a corpus is always on the same side; a document that
    occurs twice counts once. Raises UserError if there are fewer than two documents, or if a file cannot be read.
    """
    folder = place(source.spec)
    if (folder / INDEX).is_file():
        calibration, test = _indexed(folder)
    else:
        documents = list(dict.fromkeys(text for text in map(str.strip, _documents(source)) if text))
        if len(documents) < 2:
            raise UserError(
                f"CORPUS={source.spec}: has {len(documents)} non-empty documents where calibration and test need one each; "
                f"add files, or lines {SEPARATOR} between documents"
            )
        ranked = sorted(documents, key=_sha256)
        chosen = set(ranked[: max(1, len(ranked) // 3)])
        calibration = [text for text in documents if text in chosen]
        test = [text for text in documents if text not in chosen]
    return Split("calibration", tuple(calibration)), Split("test", tuple(test))


def write_index(folder: Path) -> None:
    """Write the index.json that fixes the split of the `.txt` documents in `folder`: every third name calibrates."""
    files = sorted(folder.glob("*.txt"))
    documents = [
        {
            "file": file.name,
            "split": "calibration" if number % 3 == 1 else "test",
            "words": len(file.read_text(encoding="utf-8").split()),
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for number, file in enumerate(files)
    ]
    (folder / INDEX).write_text(json.dumps({"documents": documents}, indent=1) + "\n", encoding="utf-8")


def stream(documents: list[list[int]], separator: int) -> np.ndarray:
    """All documents as one stream of token ids [N], each after a `separator` token, as in GPT-2's training."""
    return np.concatenate([np.asarray([separator, *tokens], np.int64) for tokens in documents])


def full_windows(tokens: np.ndarray, length: int) -> np.ndarray:
    """The windows [n, length] of a stream, without overlap; tokens at its end that fill no window are left out."""
    count = len(tokens) // length
    return tokens[: count * length].reshape(count, length)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _indexed(folder: Path) -> tuple[list[str], list[str]]:
    again = f"write it again with `cuantiza index {folder}`"
    try:
        entries = json.loads((folder / INDEX).read_text(encoding="utf-8"))["documents"]
        wanted = [(Path(entry["file"]).name, str(entry["split"]), entry["sha256"]) for entry in entries]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder / INDEX}: broken index ({error}); {again}") from None
    sides: dict[str, list[str]] = {"calibration": [], "test": []}
    for name, side, sha256 in wanted:
        file = folder / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != sha256 or side not in sides:
            raise UserError(f"{file}: is not what {INDEX} says; {again}")
        sides[side].append(_read_text(file).strip())
    if unlisted := sorted({file.name for file in folder.glob("*.txt")} - {name for name, *_ in wanted}):
        raise UserError(f"{folder / unlisted[0]}: is not in {INDEX}; {again}")
    if not all(sides.values()):
        raise UserError(f"{folder / INDEX}: names no documents for calibration or none for test; {again}")
    if set(sides["calibration"]) & set(sides["test"]):
        raise UserError(f"{folder / INDEX}: has the same text on both sides; delete one copy and {again}")
    return sides["calibration"], sides["test"]


def _documents(source: Source) -> Iterator[str]:
    if not source.spec:
        raise UserError("CORPUS= is empty; give a file, a folder or a hub dataset id")
    path = place(source.spec)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
        if not files:
            raise UserError(f"CORPUS={path}: holds no {', '.join(_SUFFIXES)} file")
    elif path.is_file():
        files = [path]
    else:
        yield from _hub_documents(source)
        return
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    for file in files:
        if file.suffix not in readers:
            raise UserError(f"CORPUS={file}: is none of {', '.join(_SUFFIXES)}")
        yield from readers[file.suffix](file, source.column)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: is not UTF-8 (byte {error.start}); convert it, for example with `iconv -f latin1 -t utf8`"
        ) from None


def _read_txt(file: Path, _column: str) -> Iterator[str]:
    document: list[str] = []
    for line in _read_text(file).splitlines(keepends=True):
        if line.strip() == SEPARATOR:
            yield "".join(document)
            document = []
        else:
            document.append(line)
    yield "".join(document)


def _read_jsonl(file: Path, column: str) -> Iterator[str]:
    # Not splitlines(), which also breaks at Unicode's other line ends; JSON may contain these.
    for number, line in enumerate(_read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[column]
            text.encode()  # fails on half a surrogate pair
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise UserError(
                f"{file}: line {number} is not a JSON object with a text in {column!r}; name its column with CORPUS_COLUMN="
            )
        yield text


def _read_parquet(file: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            if column not in table.schema_arrow.names:
                raise UserError(
                    f"{file}: has no column {column!r} but {', '.join(table.schema_arrow.names)}; name one with CORPUS_COLUMN="
                )
            for batch in table.iter_batches(columns=[column]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str):
                        raise UserError(
                            f"{file}: column {column!r} holds {type(text).__name__}, not text; name another with CORPUS_COLUMN="
                        )
                    yield text
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as Parquet ({error})") from None


def _hub_documents(source: Source) -> Iterator[str]:
    import datasets

    try:
        table = datasets.load_dataset(source.spec, source.config, split=source.split)
    except (datasets.exceptions.DatasetsError, FileNotFoundError, ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(
            f"CORPUS={source.spec}: is neither a file or folder here nor a dataset that the hub gives "
            f"(config {source.config}, split {source.split}): {error}"
        ) from None
    if source.column not in table.column_names:
        raise UserError(
            f"CORPUS={source.spec}: has no column {source.column!r} but {', '.join(table.column_names)}; name one with CORPUS_COLUMN="
        )
    for text in table[source.column]:
        if not isinstance(text, str):
            raise UserError(
                f"CORPUS={source.spec}: column {source.column!r} holds {type(text).__name__}, not text; name another with CORPUS_COLUMN="
            )
        yield text
