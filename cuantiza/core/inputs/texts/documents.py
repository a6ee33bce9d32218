"""The documents of a corpus: which files of a folder are read and how, and what the user is told about the others."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.defaults import place
from cuantiza.core.inputs.texts import files, hub, rows
from cuantiza.core.inputs.texts.divide import (
    BY,
    SEPARATOR,
    divided,
    has_titles,
    is_list_of_lines,
    other_markers,
    speaks_of_markers,
)
from cuantiza.core.inputs.texts.rows import Seen
from cuantiza.core.machine.progress import report, working

if TYPE_CHECKING:
    from cuantiza.core.inputs.corpus import Source

# How much of a corpus is read: the first text of its files, or of a data set of the hub, in bytes of UTF-8. A
# calibration needs less than one of them, an evaluation rarely more.
FILE_BYTES, HUB_BYTES = 128_000_000, 32_000_000
# What stands between two texts that are joined.
BETWEEN = "\n\n"
_EXAMPLES = 3
# Rows of which so many are blank are probably the lines of longer texts.
_BLANK = 0.1


def read(source: Source) -> list[str]:
    """All documents of `source` in their order, each once, without white space around them.

    What is left out is said in a line each. Raises UserError where something cannot be read, or where there are fewer
    than two documents.
    """
    _check(source)
    seen = Seen()
    with working(f"corpus    {source.spec}"):
        found = [document for texts in _texts_of(source, seen) for document in divided(texts, source.by)]
        documents = list(dict.fromkeys(found))
        seen.copies = len(found) - len(documents)
    if len(documents) < 2:
        raise UserError(_too_few(source, documents, seen))
    _say(source, documents, seen)
    return documents


def join(source: Source) -> str:
    r"""All texts of `source` as one, with `\n\n` between two of them, as GPTQ and transformers' documentation join WikiText.

    A text is what the format says, such as a row or a file, as it is: with white space around it, blank ones and copies
    as well. Rows without text (null) are left out. Raises UserError where something cannot be read, or where there is
    no text.
    """
    _check(source)
    seen = Seen()
    with working(f"corpus    {source.spec}"):
        texts = [text for texts in _texts_of(source, seen) for text in texts]
    joined = BETWEEN.join(texts)
    if not joined.strip():
        raise UserError(f"CORPUS={source.spec}: has no text{f' ({_nulls(seen)})' if seen.nulls else ''}; give some")
    if len(texts) > 1:
        report(
            f"corpus    {source.spec}: {len(texts):,} texts are joined to one of {len(joined.encode()) / 1e6:,.1f} MB"
        )
    _say_left_out(source, texts, "texts", seen)
    return joined


def may_have_split(source: Source, name: str) -> bool:
    """Whether `source` is a data set with a split `name`: a saved one, or any of the hub, which says so when it is read."""
    path = place(source.spec)
    return not path.exists() or name in hub.saved_splits(path)


def _check(source: Source) -> None:
    if not source.spec:
        raise UserError("CORPUS= is empty; give a file, a folder or a hub dataset id")
    if source.by not in BY:
        raise UserError(f"CORPUS_BY={source.by}: choose one from {', '.join(BY)}")


def visible(folder: Path) -> list[Path]:
    """The files below `folder`, sorted, without hidden ones and what systems and editors leave (`__MACOSX`, `a.txt~`)."""
    found, walked = [], set()
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in walked:  # a link to a folder above it
            folders.clear()
            continue
        walked.add(real)
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        found += [Path(where, name) for name in names if not _is_hidden(name)]
    return sorted(file for file in found if file.is_file())


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX" or name.endswith("~")


def _texts_of(source: Source, seen: Seen) -> Iterator[Iterable[str]]:
    """The texts of each file, or of a data set: rows as they are, and a file that is one text."""
    path = place(source.spec)
    if not path.exists():
        yield hub.hub_texts(source, HUB_BYTES, seen)
    elif path.is_dir() and hub.is_saved(path):
        texts = rows.texts_of(hub.saved_rows(path, source), f"CORPUS={path}", source.column, seen)
        yield rows.bounded(texts, FILE_BYTES, seen)
    else:
        if source.split != type(source).split or source.config:
            raise UserError(
                f"CORPUS={source.spec}: is no data set with a split {source.split!r}"
                + (f" and a configuration {source.config!r}" if source.config else "")
                + "; give the files of that split alone, without CORPUS_SPLIT= and CORPUS_CONFIG="
            )
        yield from _texts_of_files(path, source.column, seen)


def _texts_of_files(path: Path, column: str, seen: Seen) -> Iterator[list[str]]:
    """The texts of each file. Of a folder, JSON without any text is left out, such as what datasets keeps beside its data.

    Raises UserError where a file cannot be read, where no file has a text, or where most of what there is has its text in
    another column.
    """
    left, elsewhere, without = FILE_BYTES, 0, None
    for file, kind in _files(path, seen):
        if left <= 0:
            seen.longer = True
            return
        try:
            read = list(_texts(file, kind, column, left, seen))
        except files.NoText as error:
            if isinstance(error, files.OtherColumn):
                elsewhere += file.stat().st_size
            if without is None or (isinstance(error, files.OtherColumn) and not isinstance(without, files.OtherColumn)):
                without = error
            seen.skipped.append(str(file.relative_to(path)))
            continue
        left -= sum(len(text.encode()) for text in read)
        yield read
    if without and (left == FILE_BYTES or elsewhere > FILE_BYTES - left):
        raise without


def _files(path: Path, seen: Seen) -> list[tuple[Path, files.Kind]]:
    """The files that are read, and how. Raises UserError where there is none."""
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"CORPUS={path}: is neither a file nor a folder; write the text to a file first")
        return [(path, files.kind_of(path))]
    found: list[tuple[Path, files.Kind]] = []
    for file in visible(path):
        if files.is_beside(file) or not file.stat().st_size:
            seen.skipped.append(str(file.relative_to(path)))
            continue
        try:
            found.append((file, files.kind_of(file)))
        except files.NoText:
            seen.skipped.append(str(file.relative_to(path)))
    if not found:
        others = f" (but {_examples(seen.skipped)}; name a single file to read it)" if seen.skipped else ""
        raise UserError(f"CORPUS={path}: holds no {', '.join(files.SUFFIXES)} file or other text{others}")
    return found


def _texts(file: Path, kind: files.Kind, column: str, most: int, seen: Seen) -> Iterable[str]:
    if kind == "text":
        text, longer = files.read_text(file, most)
        seen.longer |= longer
        return [text]
    if kind == "lines":
        found = rows.json_lines(file, column)
    elif kind == "json":
        found = rows.json_file(file, column, FILE_BYTES)
    else:
        found = (rows.parquet if kind == "parquet" else rows.arrow)(file, column)
    return rows.bounded(rows.texts_of(found, str(file), column, seen), most, seen)


def _examples(names: list[str]) -> str:
    more = f" and {len(names) - _EXAMPLES} more" if len(names) > _EXAMPLES else ""
    return ", ".join(names[:_EXAMPLES]) + more


def _nulls(seen: Seen) -> str:
    if seen.nulls == 1:
        return f"1 row has no text (null) and is left out: {seen.first_null}"
    return f"{seen.nulls:,} rows have no text (null) and are left out, the first is {seen.first_null}"


def _too_few(source: Source, documents: list[str], seen: Seen) -> str:
    left_out = [_nulls(seen)] * (seen.nulls > 0) + [f"{seen.copies:,} copies count once"] * (seen.copies > 0)
    why = f" ({'; '.join(left_out)})" if left_out else ""
    line = f"CORPUS={source.spec}: has {len(documents)} non-empty documents{why} where calibration and test need one each; "
    if source.by == "document" and documents and has_titles(documents):
        return line + "its articles are documents of their own with CORPUS_BY=article (--corpus-by article)"
    if documents and (found := other_markers(documents[0])):
        return f"{line}if {found[0]} ends a document of it, put a line {SEPARATOR} in the place of each"
    if any(map(speaks_of_markers, documents)):
        return f"{line}a marker amid a sentence is text; put {SEPARATOR} on a line of its own where it ends a document"
    if source.by == "document" and documents and is_list_of_lines(documents[0]):
        return (
            line + "if each of its lines is a document, say CORPUS_BY=line (--corpus-by line); "
            f"else put lines {SEPARATOR} between documents"
        )
    return line + (
        f"add files (.txt, .jsonl, .parquet), or lines {SEPARATOR} between documents, or take each line as a document "
        "with CORPUS_BY=line"
    )


def _say_left_out(source: Source, used: list[str], what: str, seen: Seen) -> None:
    """Say what was left out of a corpus, of which `used` is what is there; `what` is what they are called."""
    start = f"corpus    {source.spec}: "
    if seen.skipped:
        files_are = "1 file is" if len(seen.skipped) == 1 else f"{len(seen.skipped):,} files are"
        report(f"{start}{files_are} left out, as they hold no text or stand beside texts: {_examples(seen.skipped)}")
    if seen.nulls:
        report(start + _nulls(seen))
    if seen.copies:
        copies = "1 document is a copy" if seen.copies == 1 else f"{seen.copies:,} documents are copies"
        report(f"{start}{copies} of another and left out")
    if seen.longer:
        size = sum(len(text.encode()) for text in used) / 1e6
        report(f"{start}only its first {size:,.0f} MB of text are used, {len(used):,} {what}")


def _say(source: Source, documents: list[str], seen: Seen) -> None:
    """Say what was left out, and what makes figures that the user may not have meant."""
    _say_left_out(source, documents, "documents", seen)
    if speaking := sum(map(speaks_of_markers, documents)):
        report(
            f"warning   {source.spec}: {speaking:,} of its documents have {SEPARATOR} or <|startoftext|> amid their text, where it is "
            "taken as a mention and divides nothing"
        )
    if source.by != "document":
        return
    if has_titles(documents):
        report(
            f"warning   {source.spec}: looks like lines or files of articles with titles ( = Title = ), of which each counts as a "
            "document; CORPUS_BY=article (--corpus-by article) makes every article one"
        )
    elif seen.blank > max(10, _BLANK * seen.rows):
        report(
            f"warning   {source.spec}: {seen.blank} of its {seen.rows} rows are blank, so the others may be lines of longer "
            "texts, and each is scored without those before it; join them first if so"
        )
    elif any(map(is_list_of_lines, documents)):
        report(
            f"warning   {source.spec}: looks like one document a line; if so, CORPUS_BY=line (--corpus-by line) makes each line one"
        )
