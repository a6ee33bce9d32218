"""Open a file of text as people have it: packed or not, under any name, in UTF-8 or with a byte order mark."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from cuantiza.core.errors import UserError

Kind = Literal["text", "lines", "json", "parquet", "arrow"]
TABLES = ("parquet", "arrow")
# What is read of a folder whatever it holds; a file of another name is read if its content is text.
SUFFIXES: dict[str, Kind] = {
    ".txt": "text",
    ".text": "text",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
PACKED = (".gz", ".bz2", ".xz", ".zst")
_HEAD = 1 << 16  # how many bytes of a file say what it holds
_LINE = 128_000_000  # characters; a longer line would be read into memory whole, however small it is while packed
# How a JSON array of objects or strings begins; a text may begin with a word in brackets as well.
_ARRAY = re.compile(r'\[\s*(?:\{\s*"[^"\n]*"\s*:|"(?:[^"\\]|\\.)*(?:"\s*(?:,\s*["{]|\]\s*\Z)|\Z))')
# How a file of zstd begins: with a frame, or with one that readers skip, as pzstd and seekable files have.
_FRAME = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")
_UTF16 = "looks like UTF-16 without a byte order mark; convert it, for example with `iconv -f utf-16le -t utf8`"
_BY_PANDAS = (
    'is a table of text; write it as .jsonl, for example with `python -c "import pandas; '
    "pandas.read_csv('{name}'{how}).to_json('{stem}.jsonl', orient='records', lines=True)\"`"
)
_UNPACK = "is an archive; unpack it, and give the folder"
_BY_PANDOC = "is no plain text; convert it, for example with `pandoc {name} -t plain -o {stem}.txt`"
# What holds text in a form that has to be converted first, by suffix: what to say when a user names such a file.
_CONVERT = {
    ".csv": _BY_PANDAS.replace("{how}", ""),
    ".tsv": _BY_PANDAS.replace("{how}", ", sep='\\t'"),
    ".pdf": "is a PDF; convert it, for example with `pdftotext {name} {stem}.txt`",
    **dict.fromkeys((".docx", ".odt", ".epub", ".html", ".htm", ".rtf", ".tex", ".ipynb", ".fb2"), _BY_PANDOC),
    **dict.fromkeys((".xml", ".tei", ".tmx"), "is XML; write its text to a .txt or .jsonl file"),
    ".doc": "is a Word document; save it as plain text (.txt)",
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), _UNPACK),
}
# What a file is that begins so, whatever its name.
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", _UNPACK),
    (b"Rar!\x1a\x07", _UNPACK),
    (b"%PDF-", _CONVERT[".pdf"]),
    (b"{\\rtf", _BY_PANDOC),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", _CONVERT[".doc"]),
    (b"SQLite format 3\0", "is a SQLite database; write its text to a .txt or .jsonl file"),
)
# Files beside the texts of a folder that are no texts of it, though they may hold some.
_BESIDE = {".md", ".rst", ".py", ".sh", ".yaml", ".yml", ".toml", ".cfg", ".ini", ".log", ".lock", ".bak", ".sha256"}
_BESIDE |= {".md5", ".css", ".js", ".bib", ".srt", ".vtt", ".conllu", ".dvc", ".url"}
_BESIDE_NAMES = {"readme", "license", "licence", "copying", "notice", "authors", "changelog", "makefile", "dockerfile"}
_BESIDE_NAMES |= {"checksums", "md5sums", "sha256sums", "_success", "_metadata", "_common_metadata"}


class NoText(UserError):
    """The file is none that a text can be read from. The message says what it is and how to mend that."""


class OtherColumn(NoText):
    """The file holds objects with texts, but none in the column that was asked for."""


@contextmanager
def opened(file: Path) -> Iterator[io.BufferedReader[Any]]:
    """Open `file` for reading, unpacked where its first bytes are those of gzip, bzip2, xz or zstd.

    Raises UserError where the packed content is broken.
    """
    with ExitStack() as held:
        raw = held.enter_context(file.open("rb"))
        unpacked = _unpacked(raw, file)
        stream: io.BufferedReader[Any] = raw
        if unpacked is not None:
            stream = held.enter_context(io.BufferedReader(unpacked))
        try:
            yield stream
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            if unpacked is None or getattr(error, "errno", None):
                raise
            raise UserError(f"{file}: its packed content is broken ({error}); download or pack it again") from None


def _unpacked(raw: io.BufferedReader[Any], file: Path) -> Any:
    """A stream of what `raw` has packed; None where it is not packed."""
    head = raw.peek(10)
    if head.startswith(b"\x1f\x8b"):
        return gzip.open(raw)
    if head.startswith(b"BZh") and head[4:10] == b"1AY&SY":
        return bz2.open(raw)
    if head.startswith(b"\xfd7zXZ\x00"):
        return lzma.open(raw)
    if _FRAME.match(head):
        import pyarrow  # Python's own module for zstd is of 3.14

        return pyarrow.CompressedInputStream(raw, "zstd")
    if file.suffix.lower() in PACKED and head:
        raise UserError(f"{file}: is not packed as {file.suffix} says; download or pack it again")
    return None


def suffix_of(file: Path) -> str:
    """The suffix that names the format, in lower case and without that of the packing: `.txt` of `A.TXT.gz`."""
    path = Path(file.name.lower())
    return Path(path.stem).suffix if path.suffix in PACKED else path.suffix


def is_beside(file: Path) -> bool:
    """Whether a file of this name, in a folder of texts, is no text of it: a README, code, a table, an archive."""
    suffix = suffix_of(file)
    named = suffix not in SUFFIXES and file.name.lower().split(".")[0] in _BESIDE_NAMES
    return named or suffix in _BESIDE or suffix in _CONVERT


def kind_of(file: Path) -> Kind:
    """How `file` is read: by its suffix or, where that says nothing, by its content.

    Raises NoText where it holds no text, or text in a form that has to be converted first.
    """
    suffix = suffix_of(file)
    if SUFFIXES.get(suffix) in TABLES:
        if file.suffix.lower() in PACKED:
            raise NoText(f"{file}: is a packed table; unpack it first ({suffix} is packed inside)")
        return SUFFIXES[suffix]
    remedy = {"name": file.name, "stem": file.stem}
    if suffix in _CONVERT:
        raise NoText(f"{file}: {_CONVERT[suffix].format(**remedy)}")
    with opened(file) as stream:
        head = stream.read(_HEAD)
    for magic, what in _MAGIC:
        if head.startswith(magic):
            raise NoText(f"{file}: {what.format(**remedy)}")
    if head[257:262] == b"ustar":
        raise NoText(f"{file}: {_UNPACK}")
    kind = SUFFIXES.get(suffix)
    return _json_or_text(head) if kind == "text" else kind or _sniffed(file, head)


def _sniffed(file: Path, head: bytes) -> Kind:
    """The kind of a file whose name does not say it, from its first bytes."""
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1\0\0", b"\xff\xff\xff\xff")):
        return "arrow"
    encoding = _encoding(head)
    if encoding == "utf-8-sig" and b"\0" in head:
        raise NoText(f"{file}: is binary; give .txt, .jsonl or .parquet files")
    text = _decoded(head)
    if text.startswith("<?xml") or text[:9].lower().startswith(("<!doctype", "<html")):
        raise NoText(f"{file}: is markup; write its text to a .txt or .jsonl file")
    return _json_or_text(head)


def _decoded(head: bytes) -> str:
    return codecs.getincrementaldecoder(_encoding(head))(errors="replace").decode(head).lstrip()


def _json_or_text(head: bytes) -> Kind:
    text = _decoded(head)
    line = text.split("\n", 1)[0]
    if line.startswith("["):
        return "json" if _ARRAY.match(text) else "text"
    # The first line of JSON lines may be longer than the head.
    return "lines" if line.startswith("{") and (_is_json(line) or len(head) == _HEAD == len(line.encode())) else "text"


def _is_json(line: str | bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _encoding(head: bytes) -> str:
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    return "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def read_text(file: Path, most: int) -> tuple[str, bool]:
    r"""The text of `file` with `\n` as line ends, and whether it has more than the first `most` bytes, which are read.

    Raises UserError where it is neither UTF-8 nor begins with the byte order mark of UTF-16 or UTF-32.
    """
    with opened(file) as stream:
        data = stream.read(most + 1)
    longer = len(data) > most
    encoding = _checked_encoding(file, data[:_HEAD])
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(data[:most], final=not longer)
    except UnicodeDecodeError as error:
        raise UserError(_not_utf8(file, encoding, f"byte {error.start}")) from None
    del data
    return (text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text), longer


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of `file`, numbered from 1, as they are read; errors as of `read_text`, and for a line without end.

    Unicode's other line ends do not end a line: JSON may contain them.
    """
    number = 0
    with opened(file) as stream:
        encoding = _checked_encoding(file, stream.peek(1 << 12))
        try:
            text = io.TextIOWrapper(stream, encoding)
            while line := text.readline(_LINE + 1):
                number += 1
                if len(line) > _LINE:
                    raise UserError(
                        f"{file}: line {number} is longer than {_LINE / 1e6:.0f} MB; write one object a line, as .jsonl"
                    )
                yield number, line
        except UnicodeDecodeError:
            raise UserError(_not_utf8(file, encoding, f"after line {number}")) from None


def _checked_encoding(file: Path, head: bytes) -> str:
    encoding = _encoding(head)
    # Spanish in UTF-16 is a zero at every other byte, which is valid UTF-8.
    if encoding == "utf-8-sig" and head.count(0) > len(head) // 4:
        raise UserError(f"{file}: {_UTF16}")
    return encoding


def _not_utf8(file: Path, encoding: str, place: str) -> str:
    if encoding != "utf-8-sig":
        return f"{file}: has the byte order mark of {encoding.upper()} and is not in it ({place}); save it as UTF-8"
    return f"{file}: is not UTF-8 ({place}); convert it, for example with `iconv -f cp1252 -t utf8`"
