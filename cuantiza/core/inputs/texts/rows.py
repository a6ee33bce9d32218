"""Rows of tables and of JSON: the value of the text column in each of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.texts.files import NoText, OtherColumn, read_lines, read_text

Row = tuple[str, Any]  # where it is, and the value of its text column
# Among so many rows one must have the column. Of a large file, a mistyped name would else be told after all of it.
_SEARCHED = 10_000
_OTHER_COLUMN = "name another with CORPUS_COLUMN="


@dataclass
class Seen:
    """What was left out of a corpus, and what its rows look like, counted while it is read."""

    rows: int = 0
    blank: int = 0
    nulls: int = 0
    copies: int = 0
    first_null: str = ""
    skipped: list[str] = field(default_factory=list)
    longer: bool = False


def texts_of(rows: Iterable[Row], name: str, column: str, seen: Seen) -> Iterator[str]:
    """The texts of `rows`; rows without one (null) are counted and left out.

    Raises UserError, which begins with `name`, where a row holds something else than text.
    """
    some = False
    for place, value in rows:
        seen.rows += 1
        if value is None or value != value:  # a missing value may be NaN
            seen.nulls += 1
            seen.first_null = seen.first_null or f"{place} of {Path(name).name}"
        elif isinstance(value, str):
            seen.blank += not value or value.isspace()
            some = True
            yield value
        elif some and not _is_conversation(value):  # it is the column of the texts, and a row of it is wrong
            raise UserError(
                f"{name}: {place}: column {column!r} holds {type(value).__name__}, and text in the rows before; write this one "
                "as text, or null for none"
            )
        else:
            raise UserError(f"{name}: {place}: column {column!r} holds {_what(value)}")


def bounded(texts: Iterable[str], most: int, seen: Seen) -> Iterator[str]:
    """The first of `texts`, up to the one with which they have `most` bytes in UTF-8."""
    size = 0
    for text in texts:
        if size >= most:
            seen.longer = True
            return
        size += len(text.encode())
        yield text


def _what(value: Any) -> str:
    if _is_conversation(value):
        return (
            "conversations (lists of messages), not text; write each as one text in the form that the model is to read, "
            "and name that column with CORPUS_COLUMN="
        )
    return f"{type(value).__name__}, not text; {_OTHER_COLUMN}"


def without_column(name: str, column: str, names: Iterable[str]) -> UserError:
    """The error for a table that lacks the text column."""
    return UserError(f"{name}: has no column {column!r} but {', '.join(names)}; name one with CORPUS_COLUMN=")


def json_lines(file: Path, column: str) -> Iterator[Row]:
    """Rows of a file with one JSON object, or one string, a line. Raises UserError as `_columns` does."""
    return _columns(_lines(file), column, file)


def _lines(file: Path) -> Iterator[Row]:
    for number, line in read_lines(file):
        row = _parsed(line) if line.strip() else None
        if isinstance(row, list):
            raise NoText(f"{file}: line {number} is a JSON array; name the file .json, or write one object a line")
        if line.strip():
            yield f"line {number}", row


def json_file(file: Path, column: str, most: int) -> Iterator[Row]:
    """Rows of a .json file: an array of objects or strings, one object with a text, or JSON lines under that name.

    Raises NoText where it is another object or value, and UserError as `_columns` does or where it is no JSON or has more
    than `most` bytes, which cannot be read in part.
    """
    beginning = list(islice((line for _, line in read_lines(file) if line.strip()), 2))
    if len(beginning) == 2 and isinstance(_parsed(beginning[0]), dict | str):
        yield from json_lines(file, column)
        return
    text, longer = read_text(file, most)
    if longer:
        raise UserError(
            f"{file}: is larger than {most / 1e6:.0f} MB, too large to be read as one JSON value; write it as .jsonl, one object a line"
        )
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: is not JSON ({error}); write one object a line, as .jsonl") from None
    if isinstance(found, dict) and isinstance(found.get(column), str):
        found = [found]
    if not isinstance(found, list):
        raise _kind(found)(f"{file}: {_one_value(found, file)}")
    yield from _columns(((f"item {number}", row) for number, row in enumerate(found, 1)), column, file)


def _columns(rows: Iterable[Row], column: str, file: Path) -> Iterator[Row]:
    """The value of `column` in `rows` of JSON; None where an object lacks it that others have, as Spark writes null.

    Raises NoText where no row, or none of the first ones, has a text, and UserError where another is no row of texts.
    """
    lacking: list[str] = []
    first: Any = None
    some = False
    for place, row in rows:
        if not isinstance(row, dict | str | tuple):
            raise (UserError if some else NoText)(_without_text(row, column, f"{file}: {place}"))
        lacks = isinstance(row, dict) and column not in row
        if lacks and not some:
            first = first if lacking else row
            lacking.append(place)
            if len(lacking) == _SEARCHED:
                break
            continue
        value = None if lacks else _column(row, column, f"{file}: {place}")
        yield from ((before, None) for before in lacking)
        lacking, some = [], True
        yield place, value
    if lacking:
        raise _kind(first)(_without_text(first, column, f"{file}: {lacking[0]}"))


def _kind(row: Any) -> type[NoText]:
    """What is raised of a file whose first row is `row`, which lacks the column."""
    values = row.values() if isinstance(row, dict) else ()
    return OtherColumn if any(isinstance(value, str) or _is_conversation(value) for value in values) else NoText


def _parsed(line: str) -> Any:
    """The JSON value of `line`; an empty tuple, which is none of JSON's values, where it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return ()


def _one_value(found: Any, file: Path) -> str:
    if not isinstance(found, dict):
        return f"is one JSON {type(found).__name__}, not an array of objects; write one object a line, as .jsonl"
    inner = next((key for key, value in found.items() if isinstance(value, list)), None)
    what = f"is one JSON object with the keys {', '.join(map(repr, list(found)[:5]))}, not an array of objects; "
    if inner is None and any(isinstance(value, str) for value in found.values()):
        return what + "name the column of its text with CORPUS_COLUMN=, or write one object a line, as .jsonl"
    if inner is None:
        return what + "write one object a line, as .jsonl (pandas: orient='records', lines=True)"
    return what + (
        f'write its array alone, for example with `python -c "import json; '
        f"json.dump(json.load(open('{file.name}'))[{inner!r}], open('{file.stem}-rows.json', 'w'))\"`"
    )


def _column(row: Any, column: str, place: str) -> Any:
    """What `row`, a string or an object with `column`, has as its text. Raises UserError where it is () or no Unicode."""
    value = row[column] if isinstance(row, dict) else row
    if isinstance(value, str) and _is_unicode(value):
        return value
    if row == ():
        raise UserError(
            f"{place} is not JSON; each line has to be one whole object, or string (a file that is one array is named .json)"
        )
    if isinstance(value, str):
        raise UserError(
            f"{place} has half of a surrogate pair (\\ud800 to \\udfff) in {column!r}; write that text again"
        )
    return value


def _without_text(row: Any, column: str, place: str) -> str:
    """What is said of a row that is neither a string nor an object with `column`."""
    talks = [key for key, item in row.items() if _is_conversation(item)] if isinstance(row, dict) else []
    if talks:
        return f"{place} has no text in {column!r}; {talks[0]!r} holds {_what(row[talks[0]])}"
    names = f" (it has {', '.join(map(repr, list(row)[:8]))})" if isinstance(row, dict) and row else ""
    return f"{place} is not a JSON object with a text in {column!r}{names}; name its column with CORPUS_COLUMN="


def _is_unicode(text: str) -> bool:
    """Whether `text` has no half of a surrogate pair, which JSON can write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_conversation(value: Any) -> bool:
    """Whether `value` is a list of messages, as chat models are fine-tuned on: {"role": .., "content": ..}."""
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and not value[0].keys().isdisjoint(("content", "value"))
    )


def parquet(file: Path, column: str) -> Iterator[Row]:
    """Rows of a Parquet file, read in batches."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            if column not in table.schema_arrow.names:
                raise without_column(str(file), column, table.schema_arrow.names)
            yield from _numbered(batch.column(0) for batch in table.iter_batches(columns=[column]))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as Parquet ({error})") from None


def arrow(file: Path, column: str) -> Iterator[Row]:
    """Rows of an Arrow file, in the stream format (as data sets are cached and saved) or the file format."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(file)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            table = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
            if column not in table.schema.names:
                raise without_column(str(file), column, table.schema.names)
            batches = (table.get_batch(n) for n in range(table.num_record_batches)) if is_file else table
            yield from _numbered(_valid(batch.column(batch.schema.get_field_index(column))) for batch in batches)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as Arrow ({error})") from None


def _valid(values: Any) -> Any:
    """`values`, after a check of the offsets that a broken file may have. Raises ArrowInvalid."""
    values.validate(full=True)
    return values


def _numbered(columns: Iterable[Any]) -> Iterator[Row]:
    number = 0
    for values in columns:
        for value in values.to_pylist():
            number += 1
            yield f"row {number}", value
