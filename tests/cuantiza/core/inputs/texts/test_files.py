"""Files of text as people have them: packed, under any name, in several encodings, as JSON and as tables."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Source, load_splits
from cuantiza.core.inputs.texts import documents, files

TEXTS = [f"Documento {number}: «¿qué día?»\n\nOtro párrafo {'ñ' * (number + 1)}." for number in range(11)]


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}
LINES = "".join(json.dumps({"id": n, "text": text}, ensure_ascii=False) + "\n" for n, text in enumerate(TEXTS)).encode()
PLAIN = "\n<|endoftext|>\n".join(TEXTS).encode()
EXTRACTED = "".join(f'<doc id="{n}" url="u" title="t">\n{text}\n</doc>\n' for n, text in enumerate(TEXTS)).encode()


def read(path: Path, **fields: str) -> set[str]:
    """The documents of both sides, after a check that they have none in common."""
    calibration, test = load_splits(Source(str(path), **fields))
    assert not set(calibration.documents) & set(test.documents)
    return {*calibration.documents, *test.documents}


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize(("name", "content"), [("a.jsonl", LINES), ("A.TXT", PLAIN), ("wiki_00", LINES)])
def test_packed(tmp_path: Path, suffix: str, name: str, content: bytes) -> None:
    """The packing is told by the content: the name may have its suffix, in any case, or not."""
    packed = PACKERS[suffix](content)
    for given in (name + suffix, name + suffix.upper(), name):
        assert read(written(tmp_path / given, packed)) == set(TEXTS)
    # Packed files may be joined as they are.
    twice = packed + PACKERS[suffix](content.replace(b"Documento", b"Hoja"))
    more = {text.replace("Documento", "Hoja") for text in TEXTS} - set(TEXTS)
    joined = read(written(tmp_path / ("twice" + name + suffix), twice))
    # The last document of the first part of .txt goes on with the second.
    assert len(joined & (set(TEXTS) | more)) >= 20


@pytest.mark.parametrize("suffix", PACKERS)
def test_broken_packing(tmp_path: Path, suffix: str) -> None:
    whole = PACKERS[suffix](LINES)
    for spoilt in (whole[: len(whole) // 2], whole[:12] + b"\xa5" * 40 + whole[52:]):
        with pytest.raises(UserError, match=r"a\.jsonl.*(broken|UTF-8|line)") as raised:
            read(written(tmp_path / f"a.jsonl{suffix}", spoilt))
        assert "\n" not in str(raised.value)
        load_splits.cache_clear()
    with pytest.raises(UserError, match="is not packed as"):
        read(written(tmp_path / f"b.txt{suffix}", PLAIN))


def test_zstd_that_begins_with_a_frame_to_skip(tmp_path: Path) -> None:
    """As pzstd writes it, which says the size of what follows there."""
    skipped = b"\x50\x2a\x4d\x18\x04\0\0\0" + len(zstd(LINES)).to_bytes(4, "little")
    for name in ("a.jsonl.zst", "a.jsonl"):
        assert read(written(tmp_path / name, skipped + zstd(LINES))) == set(TEXTS)


@pytest.mark.parametrize("name", ["LIBRO.TXT", "libro.text", "libro", "news.2020.es", "notas.md"])
def test_names_of_plain_text(tmp_path: Path, name: str) -> None:
    assert read(written(tmp_path / name, PLAIN)) == set(TEXTS)


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson", "a.json", "wiki_00", "part-00000", "a.txt"])
def test_names_of_json_lines(tmp_path: Path, name: str) -> None:
    assert read(written(tmp_path / name, LINES)) == set(TEXTS)


def test_long_first_line_of_json(tmp_path: Path) -> None:
    """A first line that is longer than what a name is guessed from is JSON all the same."""
    long = "texto " * 20_000
    lines = LINES.decode() + json.dumps({"text": long})
    content = "\n".join(reversed(lines.splitlines())).encode()
    assert read(written(tmp_path / "wiki_00", content)) == {*TEXTS, long.strip()}


def test_texts_that_begin_as_packed_files_do(tmp_path: Path) -> None:
    for text in ("BZh, dijo", "{no es JSON}", "[ni esto]"):
        content = f"{text}\n<|endoftext|>\nOtro texto."
        for name in ("a.txt", "a"):
            assert read(written(tmp_path / name, content.encode())) == {text, "Otro texto."}
            load_splits.cache_clear()


def test_what_wikiextractor_writes_as_text(tmp_path: Path) -> None:
    assert read(written(tmp_path / "wiki_00", EXTRACTED)) == set(TEXTS)


@pytest.mark.parametrize("indent", [None, 2])
def test_json_array(tmp_path: Path, indent: int | None) -> None:
    for name, rows in (("a.json", [{"n": 1, "text": text} for text in TEXTS]), ("b.json", TEXTS), ("c", TEXTS)):
        content = json.dumps(rows, ensure_ascii=False, indent=indent).encode()
        assert read(written(tmp_path / name, content)) == set(TEXTS)


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ({"version": 1, "data": [{"text": "a"}, {"text": "b"}]}, "['data']"),
        ({"text": {"0": "a", "1": "b"}}, "orient='records'"),
        ("una cadena", "is one JSON str"),
        ([{"cuerpo": "a"}, {"cuerpo": "b"}], "item 1 .*'cuerpo'.*CORPUS_COLUMN="),
        ([{"text": "a"}, 3], "item 2"),
    ],
)
def test_other_json(tmp_path: Path, content: object, fragment: str) -> None:
    for indent in (None, 1):
        file = written(tmp_path / f"{indent}.json", json.dumps(content, indent=indent).encode())
        with pytest.raises(UserError, match=fragment.replace("[", r"\[").replace("]", r"\]")):
            read(file)


@pytest.mark.parametrize("value", [1987, 1.5, True, [], {}], ids=repr)
def test_one_row_that_is_no_text(tmp_path: Path, value: object) -> None:
    """The column is right where other rows have their text there, so no other is to be named."""
    kind = type(value).__name__
    lines = [json.dumps({"text": item}) for item in (*TEXTS, value)]
    file = written(tmp_path / "a.jsonl", "\n".join(lines).encode())
    with pytest.raises(
        UserError, match=rf"line {len(lines)}: column 'text' holds {kind}, and text .*; write this"
    ) as raised:
        read(file)
    assert "CORPUS_COLUMN" not in str(raised.value)
    with pytest.raises(UserError, match=rf"line 1: column 'text' holds {kind}, not text; name another"):
        read(written(tmp_path / "b.jsonl", "\n".join(lines[::-1]).encode()))


def test_command_that_is_named_for_an_object_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shlex
    import subprocess
    import sys

    file = written(tmp_path / "a.json", json.dumps({"data": [{"text": text} for text in TEXTS]}).encode())
    with pytest.raises(UserError) as raised:
        read(file)
    _, flag, code = shlex.split(str(raised.value).split("`")[1])
    subprocess.run([sys.executable, flag, code], cwd=tmp_path, check=True)
    assert read(tmp_path / "a-rows.json") == set(TEXTS)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-be", "utf-8-sig"])
@pytest.mark.parametrize(("name", "content"), [("a.txt", PLAIN), ("a.jsonl", LINES), ("a", LINES), ("b.json", LINES)])
def test_byte_order_mark(tmp_path: Path, encoding: str, name: str, content: bytes) -> None:
    text = content.decode().replace("\n", "\r\n")
    data = ("\ufeff" * (encoding == "utf-16-be") + text).encode(encoding)
    assert read(written(tmp_path / name, data)) == set(TEXTS)


def test_other_encodings(tmp_path: Path) -> None:
    for encoding, fragment in (("latin1", "cp1252"), ("utf-16-le", "utf-16le")):
        for name in ("a.txt", "a.jsonl"):
            text = (PLAIN if name == "a.txt" else LINES).decode()
            text = text.replace("«", "").replace("»", "")
            with pytest.raises(UserError, match=rf"{name}.*iconv -f {fragment}"):
                read(written(tmp_path / name, text.encode(encoding)))
            load_splits.cache_clear()
    cut = PLAIN.decode().encode("utf-16")[:-1]
    with pytest.raises(UserError, match="byte order mark of UTF-16"):
        read(written(tmp_path / "b.txt", cut))


@pytest.mark.parametrize(
    ("name", "content", "fragment"),
    [
        ("a.csv", b"text\nuno\ndos\n", r"pandas\.read_csv\('a\.csv'\).*a\.jsonl"),
        ("a.tsv", b"text\nuno\ndos\n", r"sep='\\t'"),
        ("a.pdf", b"%PDF-1.7 \xff", "pdftotext"),
        ("a.txt", b"%PDF-1.7 \xff", "pdftotext"),
        ("a.docx", b"PK\x03\x04\0\0", "pandoc"),
        ("a.zip", b"PK\x03\x04\0\0", "unpack"),
        ("a.txt", b"PK\x03\x04\0\0", "unpack"),
        ("a.tar.gz", gzip.compress(b"a.txt".ljust(257, b"\0") + b"ustar\0" + bytes(300), mtime=0), "unpack"),
        ("a.dat", b"\x01\x02\0\0\xff", "binary"),
        ("a.html", b"<!DOCTYPE html><p>uno", "pandoc"),
        ("pagina", b"<!DOCTYPE html><p>uno", "markup"),
        ("pagina", b"<html><p>uno", "markup"),
        ("pagina", b'\n<HTML lang="es"><p>uno', "markup"),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), "unpack it first"),
    ],
)
def test_no_text(tmp_path: Path, name: str, content: bytes, fragment: str) -> None:
    with pytest.raises(UserError, match=fragment) as raised:
        read(written(tmp_path / name, content))
    assert str(tmp_path / name) in str(raised.value) and "\n" not in str(raised.value)


def test_tables_of_arrow(tmp_path: Path) -> None:
    """A file of datasets' cache (stream format), one of Feather's kind (file format), and both without a suffix."""
    table = pyarrow.table({"n": range(11), "text": TEXTS})
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as out:
        out.write_table(table, max_chunksize=4)
    with pyarrow.ipc.new_file(tmp_path / "b.arrow", table.schema) as out:
        out.write_table(table, max_chunksize=4)
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    for file in ("a.arrow", "b.arrow", "c.parquet"):
        assert read(tmp_path / file) == read(Path(shutil.copy(tmp_path / file, tmp_path / file[0]))) == set(TEXTS)
        with pytest.raises(UserError, match=r"no column 'cuerpo' but n, text; .*CORPUS_COLUMN="):
            read(tmp_path / file, column="cuerpo")
    whole = (tmp_path / "a.arrow").read_bytes()
    with pytest.raises(UserError, match="Arrow"):
        read(written(tmp_path / "d.arrow", whole[: len(whole) // 2]))


def test_saved_data_sets(tmp_path: Path) -> None:
    """`save_to_disk` of a Dataset, and of a DatasetDict, whose split CORPUS_SPLIT= names."""
    table = datasets.Dataset.from_dict({"text": [*TEXTS, None], "n": list(range(12))})
    table.save_to_disk(tmp_path / "uno")
    assert read(tmp_path / "uno") == set(TEXTS)
    datasets.DatasetDict({"train": table.select(range(5)), "validation": table}).save_to_disk(tmp_path / "dos")
    assert read(tmp_path / "dos") == set(TEXTS[:5])
    assert read(tmp_path / "dos", split="validation") == set(TEXTS)
    for fields, fragment in (
        ({"split": "dev"}, "no split 'dev' but train, validation; .*CORPUS_SPLIT="),
        ({"column": "cuerpo"}, "no column 'cuerpo' but text, n; .*CORPUS_COLUMN="),
        ({"column": "n"}, "holds int, not text"),
    ):
        with pytest.raises(UserError, match=fragment):
            read(tmp_path / "dos", **fields)
    (tmp_path / "dos" / "dataset_dict.json").write_text('{"splits": ["train", "../uno"]}')
    load_splits.cache_clear()
    with pytest.raises(UserError, match=r"'../uno', which is outside"):
        read(tmp_path / "dos")
    shutil.copy(tmp_path / "uno" / "data-00000-of-00001.arrow", tmp_path / "outside.arrow")
    for content in ('{"_data_files": [{"filename": "../outside.arrow"}]}', "{", "[]", '{"_data_files": []}'):
        (tmp_path / "uno" / "state.json").write_text(content)
        load_splits.cache_clear()
        with pytest.raises(UserError, match="saved data set"):
            read(tmp_path / "uno")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_only_the_beginning_of_a_large_corpus_is_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The text up to the document that reaches the limit is used, which is said; what follows is not read."""
    monkeypatch.setattr(documents, "FILE_BYTES", size := len("".join(TEXTS[:6]).encode()) - 5)
    file = tmp_path / name
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), file)
    else:
        # What follows is no UTF-8, and nobody notices.
        written(file, LINES + 20_000 * LINES[:20] + b"\xff" if name == "a.jsonl" else PLAIN + b"\xff")
    found = read(file)
    assert len(found & set(TEXTS)) >= 4 and len("".join(found).encode()) <= size + 100
    assert f"{len(found)} documents" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.jsonl.xz", "a.json.gz"])
def test_a_line_without_end_is_not_read_whole(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few kilobytes unpack to gigabytes of one line."""
    monkeypatch.setattr(files, "_LINE", 1_000_000)
    packed = PACKERS[Path(name).suffix](b'[{"text": "' + b"a" * 3_000_000)
    with pytest.raises(UserError, match=r"line 1 is longer than 1 MB; .*\.jsonl"):
        read(written(tmp_path / name, packed))
