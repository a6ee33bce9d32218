"""Corpora: what counts as a document, which split it belongs to, and the error messages for bad files."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import INDEX, Source, Split, full_windows, load_splits, stream

from helpers import CORPUS, ROOT, SPANISH, Result, assert_user_error
from hub_stub import Hub, serving

DOCUMENTS = [f"Documento {number}: «¿qué día?» {'ñ' * (number + 1)}" for number in range(11)]


def sides(path: Path | str, **fields: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    calibration, test = load_splits(Source(str(path), **fields))
    assert (calibration.name, test.name) == ("calibration", "test")
    return calibration.documents, test.documents


def write_jsonl(path: Path, documents: list, column: str = "text") -> Path:
    path.write_text(
        "".join(json.dumps({column: text, "n": 1}, ensure_ascii=False) + "\n" for text in documents), encoding="utf-8"
    )
    return path


def write_parquet(path: Path, documents: list, column: str = "text", **kwargs) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({column: documents, "n": range(len(documents))}), path, **kwargs)
    return path


def write_txt(path: Path, documents: list[str]) -> Path:
    path.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    return path


WRITERS = {".txt": write_txt, ".jsonl": write_jsonl, ".parquet": write_parquet}


# The embedded corpus


def test_embedded_corpus() -> None:
    calibration, test = sides(CORPUS)
    documents = [*calibration, *test]
    assert len(documents) >= 60 and len(set(documents)) == len(documents)
    assert len(documents) == len(list(CORPUS.glob("*.txt")))
    assert sum(len(text.split()) for text in documents) >= 25_000
    assert 0.3 <= len(calibration) / len(documents) <= 0.36
    entries = json.loads((CORPUS / INDEX).read_text(encoding="utf-8"))["documents"]
    assert [entry["file"] for entry in entries] == sorted(file.name for file in CORPUS.glob("*.txt"))
    assert sum(entry["words"] for entry in entries) == sum(len(text.split()) for text in documents)


def test_embedded_corpus_is_spanish_prose() -> None:
    """The corpus has at least eight kinds of text in both splits, in clean UTF-8."""
    entries = json.loads((CORPUS / INDEX).read_text(encoding="utf-8"))["documents"]
    kinds: dict[str, set[str]] = {}
    for entry in entries:
        kinds.setdefault(entry["file"].split("-")[1], set()).add(entry["split"])
    assert len(kinds) >= 8
    assert sum(sides == {"calibration", "test"} for sides in kinds.values()) >= 8
    text = "".join((CORPUS / entry["file"]).read_text(encoding="utf-8") for entry in entries)
    assert set("áéíóúñü¿¡«»—") <= set(text)
    assert not set(text) & set("\ufffd\ufeff\x00\r") and "Ã" not in text


# The split


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_split(tmp_path: Path, suffix: str) -> None:
    calibration, test = sides(WRITERS[suffix](tmp_path / f"corpus{suffix}", DOCUMENTS))
    assert set(calibration) | set(test) == set(DOCUMENTS) and not set(calibration) & set(test)
    assert len(calibration) == len(DOCUMENTS) // 3
    ranked = sorted(DOCUMENTS, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    assert set(calibration) == set(ranked[:3])
    for side in (calibration, test):
        assert list(side) == [text for text in DOCUMENTS if text in side]  # in the order of the corpus


@pytest.mark.parametrize("suffix", WRITERS)
def test_duplicates_never_meet(tmp_path: Path, suffix: str) -> None:
    """A repeated text counts once and is in one split only, also if the white space around it differs."""
    many = [*DOCUMENTS, *(f"\n  {text}\t\n" for text in DOCUMENTS), *reversed(DOCUMENTS)]
    once = sides(WRITERS[suffix](tmp_path / f"once{suffix}", DOCUMENTS))
    assert sides(WRITERS[suffix](tmp_path / f"many{suffix}", many)) == once


def test_order_of_documents_does_not_move_them(tmp_path: Path) -> None:
    shuffled = random.Random(0).sample(DOCUMENTS, len(DOCUMENTS))
    first, second = (
        sides(write_jsonl(tmp_path / f"{n}.jsonl", texts)) for n, texts in enumerate((DOCUMENTS, shuffled))
    )
    assert [set(side) for side in first] == [set(side) for side in second]


@pytest.mark.parametrize("count", range(2, 13))
def test_sizes_of_the_split(tmp_path: Path, count: int) -> None:
    texts = [f"texto {number}" for number in range(count)]
    calibration, test = sides(write_jsonl(tmp_path / "c.jsonl", texts))
    assert (len(calibration), len(test)) == (max(1, count // 3), count - max(1, count // 3))


def test_identity_of_a_split() -> None:
    """The sha256 of a split depends on its documents, their order, and where each of them ends."""
    splits = [Split("test", texts) for texts in (("a", "b"), ("b", "a"), ("ab",), ("a", "b", ""), ("a", "c"))]
    assert len({split.sha256 for split in splits}) == len(splits)
    assert Split("test", ("a", "b")).sha256 == Split("calibration", ("a", "b")).sha256


# Files


def test_folder_of_mixed_files(tmp_path: Path) -> None:
    """All three formats are read, in subfolders as well; other files are ignored."""
    (tmp_path / "below").mkdir()
    write_txt(tmp_path / "a.txt", DOCUMENTS[:4])
    write_jsonl(tmp_path / "below" / "b.jsonl", DOCUMENTS[4:8])
    write_parquet(tmp_path / "c.parquet", DOCUMENTS[8:])
    (tmp_path / "README.md").write_text("# not a document")
    calibration, test = sides(tmp_path)
    assert set(calibration) | set(test) == set(DOCUMENTS)


def test_separator_has_a_line_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text(
        "uno\n dos\n  <|endoftext|>  \ntres <|endoftext|> tres\n<|endoftext|>\n<|endoftext|>\ncuatro", encoding="utf-8"
    )
    calibration, test = sides(tmp_path / "c.txt")
    assert {*calibration, *test} == {"uno\n dos", "tres <|endoftext|> tres", "cuatro"}


@pytest.mark.parametrize("suffix", WRITERS)
def test_text_comes_through_unchanged(tmp_path: Path, suffix: str) -> None:
    """Unicode's line and paragraph separators, control characters and emoji are text; they do not end a line."""
    odd = [*SPANISH, "a\u2028b\u2029c", "d\x85e\x0bf\x0cg\x1ch", "🦎\u200d🦎", "i\x00j"]
    calibration, test = sides(WRITERS[suffix](tmp_path / f"c{suffix}", odd))
    assert {*calibration, *test} == set(odd)


def test_windows_files(tmp_path: Path) -> None:
    """A byte order mark and CRLF, which Windows editors write, are not part of the text."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfuno\r\ndos\r\n<|endoftext|>\r\ntres\r\n")
    assert {text for side in sides(tmp_path / "a.txt") for text in side} == {"uno\ndos", "tres"}
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "uno"}\r\n\r\n{"text": "dos"}\r\n')
    assert {text for side in sides(tmp_path / "b.jsonl") for text in side} == {"uno", "dos"}


@pytest.mark.parametrize(
    "kind",
    [pyarrow.large_string(), pyarrow.string_view(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())],
    ids=str,
)
def test_parquet_kinds_of_text(tmp_path: Path, kind: pyarrow.DataType) -> None:
    path = write_parquet(tmp_path / "c.parquet", pyarrow.array(DOCUMENTS).cast(kind), row_group_size=4)
    assert {text for side in sides(path) for text in side} == set(DOCUMENTS)


def test_other_column(tmp_path: Path) -> None:
    for path in (
        write_jsonl(tmp_path / "c.jsonl", DOCUMENTS, "cuerpo"),
        write_parquet(tmp_path / "c.parquet", DOCUMENTS, "cuerpo"),
    ):
        assert {text for side in sides(path, column="cuerpo") for text in side} == set(DOCUMENTS)
        with pytest.raises(UserError, match=r"CORPUS_COLUMN="):
            sides(path)
        with pytest.raises(UserError, match=r"'n'.*CORPUS_COLUMN="):
            sides(path, column="n")


BAD = {
    "latin1.txt": ("año\n<|endoftext|>\nniño".encode("latin1"), "UTF-8 (byte 1)"),
    "no-mark.jsonl": ('{"text": "año"}'.encode("utf-16-le"), "UTF-16 without a byte order mark"),
    "empty.txt": (b"", "0 non-empty documents"),
    "blank.txt": (b" \n\t\n<|endoftext|>\n \n", "0 non-empty documents"),
    "one.txt": ("un solo documento\n\ncon dos párrafos".encode(), "1 non-empty documents"),
    "twice.txt": (b"lo mismo\n<|endoftext|>\n lo mismo \n", "1 non-empty documents"),
    "empty.jsonl": (b"", "0 non-empty documents"),
    "cut.jsonl": (b'{"text": "uno"}\n{"text": "do', "line 2"),
    "list.jsonl": (b'{"text": "uno"}\n["text"]\n', "line 2"),
    "number.jsonl": (b'{"text": "uno"}\n\n{"text": 3}\n', "line 3"),
    "null.jsonl": (b'{"text": null}\n', "line 1"),
    "deep.jsonl": (b"[" * 100_000 + b"\n", "line 1"),
    "surrogate.jsonl": (rb'{"text": "uno"}' b"\n" rb'{"text": "dos \ud83d"}' b"\n", "line 2"),
    "array.jsonl": (b'[\n{"text": "uno"}\n]\n', "line 1"),
    "empty.parquet": (b"", "Parquet"),
    "text.parquet": (b"PAR1 this is not PAR1", "Parquet"),
    "corpus.csv": (b"text\nuno\ndos\n", ".jsonl"),
    "corpus": (b"uno", ".jsonl"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file(tmp_path: Path, name: str) -> None:
    content, fragment = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as raised:
        sides(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value) and fragment in str(raised.value)


def test_truncated_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "c.parquet", [text * 1000 for text in DOCUMENTS])
    whole = path.read_bytes()
    for kept in (len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(UserError, match="Parquet"):
            sides(path)
    # The file's footer is intact, but its data pages are not.
    path.write_bytes(whole[:100] + bytes(len(whole) // 2) + whole[100 + len(whole) // 2 :])
    with pytest.raises(UserError, match="Parquet"):
        sides(path)


def test_folder_without_documents(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("nothing")
    with pytest.raises(UserError, match=r"holds no \.txt"):
        sides(tmp_path)


# Windows


def test_stream() -> None:
    np.testing.assert_array_equal(stream([[5, 6], [], [7]], 0), [0, 5, 6, 0, 0, 7])


@pytest.mark.parametrize("length", [1, 3, 7, 20, 21])
def test_full_windows(length: int) -> None:
    tokens = np.arange(20)
    windows = full_windows(tokens, length)
    assert windows.shape == (20 // length, length)
    np.testing.assert_array_equal(windows.ravel(), tokens[: windows.size])


# Hub datasets


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as stub:
        yield stub


@pytest.fixture
def load(hub: Hub, tmp_path: Path) -> Callable[..., Result]:
    """`load(spec, config=..., ...)` loads with the stub hub in a child process, and prints the two splits as JSON."""
    code = (
        "import json, sys; from cuantiza.core.errors import run; from cuantiza.core.inputs.corpus import Source, load_splits\n"
        "run(lambda: print(json.dumps([split.documents for split in load_splits(Source(**json.loads(sys.argv[1])))])) or 0)"
    )

    def call(spec: str, env: dict[str, str] | None = None, **fields: str) -> Result:
        given = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""} | (
            env or {}
        )
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps({"spec": spec, **fields})],
            cwd=ROOT,
            env={**os.environ, **given},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return call


def test_hub_dataset(hub: Hub, load: Callable[..., Result], tmp_path: Path) -> None:
    """A data set is downloaded, split like a file with the same documents, and later read without a network."""
    hub.add(
        "owner/corpus",
        {"train.jsonl": write_jsonl(tmp_path / "c.jsonl", DOCUMENTS).read_bytes(), "README.md": b"# corpus"},
        kind="datasets",
    )
    first = load("owner/corpus")
    assert first.status == 0, first.stderr
    assert json.loads(first.stdout) == [list(side) for side in sides(tmp_path / "c.jsonl")]
    hub.requests.clear()
    offline = load("owner/corpus", env={"HF_HUB_OFFLINE": "1"})
    assert offline.stdout == first.stdout and not hub.requests, offline.stderr


def test_hub_dataset_config_split_and_column(hub: Hub, load: Callable[..., Result], tmp_path: Path) -> None:
    card = (
        "---\nconfigs:\n- config_name: es\n  data_files:\n  - {split: train, path: es/train.parquet}\n"
        "  - {split: validation, path: es/val.parquet}\n- config_name: pt\n  data_files: pt.parquet\n---\n"
    )
    files = {
        name: write_parquet(tmp_path / "c.parquet", texts, "cuerpo").read_bytes()
        for name, texts in (
            ("es/train.parquet", ["a", "b", "c"]),
            ("es/val.parquet", DOCUMENTS),
            ("pt.parquet", ["d", "e"]),
        )
    }
    hub.add("owner/corpus", files | {"README.md": card.encode()}, kind="datasets")
    wanted = {"config": "es", "split": "validation", "column": "cuerpo"}
    result = load("owner/corpus", **wanted)
    assert result.status == 0, result.stderr
    assert {text for side in json.loads(result.stdout) for text in side} == set(DOCUMENTS)
    assert_user_error(
        load("owner/corpus", **wanted | {"column": "text"}), "CORPUS=owner/corpus", "'text'", "cuerpo", "CORPUS_COLUMN="
    )
    assert_user_error(load("owner/corpus", **wanted | {"column": "n"}), "CORPUS=owner/corpus", "'n'", "CORPUS_COLUMN=")
    assert_user_error(load("owner/corpus", **wanted | {"split": "dev"}), "CORPUS=owner/corpus", "dev")
    assert_user_error(load("owner/corpus", **wanted | {"config": "fr"}), "CORPUS=owner/corpus", "fr")
    del wanted["config"]
    assert_user_error(load("owner/corpus", **wanted), "CORPUS=owner/corpus", "es")


def test_no_such_dataset(load: Callable[..., Result]) -> None:
    assert_user_error(load("owner/nothing"), "CORPUS=owner/nothing", "neither a file or folder")


def test_dataset_script_is_not_run(hub: Hub, load: Callable[..., Result], tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    hub.add(
        "owner/script", {"script.py": f"open({str(marker)!r}, 'w')".encode(), "README.md": b"# script"}, kind="datasets"
    )
    assert_user_error(load("owner/script"), "CORPUS=owner/script")
    assert not marker.exists()


def test_broken_file_in_a_dataset(hub: Hub, load: Callable[..., Result]) -> None:
    hub.add("owner/broken", {"train.parquet": b"PAR1 this is not PAR1"}, kind="datasets")
    assert_user_error(load("owner/broken"), "CORPUS=owner/broken")


@pytest.mark.parametrize(
    "spec", ["missing.txt", "./corpus/missing", "/no/such/folder", "", "owner/name/more", "corpus/es/*.txt"]
)
def test_path_that_is_not_there(load: Callable[..., Result], spec: str) -> None:
    """A misspelt path is not taken for a data set; the message says what was looked for."""
    assert_user_error(load(spec, env={"HF_HUB_OFFLINE": "1"}), f"CORPUS={spec}")
