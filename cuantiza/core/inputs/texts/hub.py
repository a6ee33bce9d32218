"""Rows of data sets: of the Hugging Face Hub, downloaded or, where they are large, streamed; and of a saved folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cuantiza.core.errors import UserError, taken_for_hub_id
from cuantiza.core.inputs.texts.rows import Row, Seen, bounded, texts_of, without_column
from cuantiza.core.machine.progress import report
from cuantiza.core.store.digests import digest

if TYPE_CHECKING:
    from cuantiza.core.inputs.corpus import Source

# What datasets' save_to_disk writes beside the data: of one table, and of several splits.
_TABLE, _SPLITS = "state.json", "dataset_dict.json"


def is_saved(folder: Path) -> bool:
    """Whether datasets' `save_to_disk` wrote `folder`."""
    return any((folder / name).is_file() for name in (_TABLE, _SPLITS))


def saved_splits(folder: Path) -> list[str]:
    """The splits that `save_to_disk` wrote to `folder`; none where it wrote a single table, or nothing that can be read."""
    try:
        return [str(name) for name in json.loads((folder / _SPLITS).read_text(encoding="utf-8"))["splits"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def saved_rows(folder: Path, source: Source) -> Iterator[Row]:
    """Rows of a data set that `save_to_disk` wrote to `folder`. Raises UserError where it lacks the split or column."""
    import datasets

    broken = (datasets.exceptions.DatasetsError, OSError, ValueError, LookupError, TypeError, AttributeError)
    try:
        for state in folder.rglob(_TABLE):
            _check_inside(
                state, [file["filename"] for file in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
            )
        if (splits := folder / _SPLITS).is_file():
            _check_inside(splits, json.loads(splits.read_text(encoding="utf-8"))["splits"])
        table = datasets.load_from_disk(str(folder))
    except (*broken, RecursionError) as error:
        raise UserError(f"CORPUS={folder}: cannot be read as a saved data set ({error}); save it again") from None
    if isinstance(table, datasets.DatasetDict):
        if source.split not in table:
            raise UserError(
                f"CORPUS={folder}: has no split {source.split!r} but {', '.join(table)}; name one with CORPUS_SPLIT="
            )
        table = table[source.split]
    return _rows(table, f"CORPUS={folder}", source.column)


def _check_inside(file: Path, names: list[str]) -> None:
    """Raise ValueError if one of `names`, which `file` gives, is none of a file or folder beside it."""
    if odd := next((name for name in names if Path(name).name != name or name == ".."), None):
        raise ValueError(f"{file.name} names {odd!r}, which is outside of its folder")


def hub_texts(source: Source, most: int, seen: Seen) -> list[str]:
    """The texts of the hub's data set `source`, until there are `most` bytes of them.

    It is downloaded, or streamed where its files have more than `most` bytes; what was streamed is kept for later runs.
    Raises UserError where the hub has none of that name, configuration and split, or it has no text in that column.
    """
    with taken_for_hub_id(f"CORPUS={source.spec}"):
        import datasets
        import httpx2 as http

    name, copy = f"CORPUS={source.spec}", _copy_of(source)
    if copy.is_file():
        report(f"corpus    {source.spec}: its text as it was streamed before; delete {copy} to read it anew")
        seen.longer = True
        return [json.loads(line) for line in copy.read_text(encoding="utf-8").split("\n") if line]
    failures = (datasets.exceptions.DatasetsError, FileNotFoundError, ConnectionError, ValueError, RuntimeError)
    try:
        builder = datasets.load_dataset_builder(source.spec, source.config)
        streaming = _is_larger(builder, most)
        if streaming:
            report(f"corpus    {source.spec}: has more than {most / 1e6:.0f} MB, so only its beginning is streamed")
        table = datasets.load_dataset(source.spec, source.config, split=source.split, streaming=streaming)
        rows = (_streamed if streaming else _rows)(table, name, source.column)
        texts = list(bounded(texts_of(rows, name, source.column, seen), most, seen))
    except (*failures, http.HTTPError) as error:
        raise UserError(
            f"{name}: is neither a file or folder here nor a dataset that the hub gives "
            f"(config {source.config}, split {source.split}): {error}"
        ) from None
    if streaming:
        _keep(copy, texts)
    return texts


def _is_larger(builder: Any, most: int) -> bool:
    """Whether a data set has more than `most` bytes. False where it was downloaded before.

    The files of all its splits count, since whoever downloads one split downloads them all.
    """
    from huggingface_hub import HfFileSystem

    files = [file for files in (builder.config.data_files or {}).values() for file in files]
    hub = HfFileSystem()
    size = 0
    for file in files:
        if not str(file).startswith("hf://"):
            return False
        size += hub.info(str(file))["size"]
        if size > most:
            return not Path(builder.cache_dir).is_dir()
    return False


def _rows(table: Any, name: str, column: str) -> Iterator[Row]:
    if column not in table.column_names:
        raise without_column(name, column, table.column_names)
    return ((f"row {number}", text) for number, text in enumerate(table[column], 1))


def _streamed(table: Any, name: str, column: str) -> Iterator[Row]:
    if table.column_names:  # of Parquet; of JSON the first row says them
        if column not in table.column_names:
            raise without_column(name, column, table.column_names)
        table = table.select_columns([column])
    rows = iter(table)
    first = next(rows, None)
    if first is None:
        return
    if column not in first:
        raise without_column(name, column, first)
    for number, row in enumerate(chain([first], rows), 1):
        yield f"row {number}", row.get(column)


def _copy_of(source: Source) -> Path:
    """Where the streamed beginning of a data set is kept, so that later runs have the same text and need no network."""
    import datasets

    which = digest([source.spec, source.config or "", source.split, source.column])
    return Path(datasets.config.HF_DATASETS_CACHE) / "cuantiza" / f"{source.spec.replace('/', '--')}-{which[:16]}.jsonl"


def _keep(copy: Path, texts: list[str]) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    part = copy.with_suffix(f".{os.getpid()}.part")
    try:
        part.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
        part.replace(copy)
    finally:
        part.unlink(missing_ok=True)
