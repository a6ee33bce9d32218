"""index.json: the documents of a folder, their sides, and what is said where one of them is not as listed."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import INDEX, Source, load_splits, write_index
from cuantiza.index import main

from helpers import ROOT


def sides(path: Path | str, **fields: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    calibration, test = load_splits(Source(str(path), **fields))
    assert (calibration.name, test.name) == ("calibration", "test")
    return calibration.documents, test.documents


@pytest.fixture
def indexed(tmp_path: Path) -> Path:
    """A folder with seven documents and their index."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(7):
        (folder / f"{number}.txt").write_text(f"Texto número {number}.\n", encoding="utf-8")
    write_index(folder)
    return folder


def test_index_decides(indexed: Path) -> None:
    assert sides(indexed) == (
        tuple(f"Texto número {n}." for n in (1, 4)),
        tuple(f"Texto número {n}." for n in (0, 2, 3, 5, 6)),
    )
    entries = json.loads((indexed / INDEX).read_text(encoding="utf-8"))["documents"]
    assert [entry["words"] for entry in entries] == [3] * 7
    assert [entry["sha256"] for entry in entries] == [
        hashlib.sha256((indexed / entry["file"]).read_bytes()).hexdigest() for entry in entries
    ]


def test_index_tool(indexed: Path) -> None:
    """`cuantiza index folder` writes the index of the folder as it is, the same again."""
    (indexed / "7.txt").write_text("Otro.", encoding="utf-8")
    subprocess.run([sys.executable, "-m", "cuantiza", "index", indexed], check=True, cwd=ROOT)
    first = (indexed / INDEX).read_bytes()
    assert len(sides(indexed)[1]) == 5 and "Otro." in sides(indexed)[0]
    write_index(indexed)
    assert (indexed / INDEX).read_bytes() == first


def test_changed_document(indexed: Path) -> None:
    (indexed / "3.txt").write_text("Texto número 3,\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"3\.txt.*index\.json.*cuantiza index"):
        sides(indexed)


def test_missing_document(indexed: Path) -> None:
    (indexed / "3.txt").unlink()
    with pytest.raises(UserError, match=r"3\.txt.*index\.json"):
        sides(indexed)


def test_unlisted_document(indexed: Path) -> None:
    """A text that is not in the index is an error; it is not silently ignored."""
    (indexed / "7.txt").write_text("Nuevo.", encoding="utf-8")
    with pytest.raises(UserError, match=r"7\.txt.*index\.json.*cuantiza index"):
        sides(indexed)


def test_same_text_on_both_sides(indexed: Path) -> None:
    (indexed / "1.txt").write_text("Texto número 0.", encoding="utf-8")
    write_index(indexed)
    with pytest.raises(UserError, match="both"):
        sides(indexed)


@pytest.mark.parametrize(
    "change",
    [
        lambda entries: entries[0].update(split="validation"),
        lambda entries: entries[0].update(split=["test"]),
        lambda entries: entries[0].pop("sha256"),
        lambda entries: entries[0].update(file=7),
        lambda entries: entries[0].update(file="../corpus.txt"),
        lambda entries: entries.append("8.txt"),
        lambda entries: entries.clear(),
        lambda entries: [entry.update(split="test") for entry in entries],
        lambda entries: [entry.update(split="calibration") for entry in entries],
        lambda entries: entries.append(entries[0] | {"split": "calibration"}),
    ],
    ids=["side", "list", "no-hash", "number", "outside", "text", "none", "all-test", "all-calibration", "both"],
)
def test_broken_index(indexed: Path, change: Callable[[list], object]) -> None:
    index = json.loads((indexed / INDEX).read_text(encoding="utf-8"))
    change(index["documents"])
    (indexed / INDEX).write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match=r"cuantiza index"):
        sides(indexed)


@pytest.mark.parametrize("content", ["", "{", "\udcff"])
def test_index_is_no_index(indexed: Path, content: str) -> None:
    (indexed / INDEX).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"delete it and .*cuantiza index"):
        sides(indexed)


FOREIGN = (
    '{"pages": ["a"]}',
    '{"documents": 3}',
    '{"documents": [{"id": 7}]}',
    '{"documents": [], "version": 3}',
    "[]",
)


@pytest.mark.parametrize("content", [*FOREIGN, '{"pages'])
def test_index_of_another_program(indexed: Path, content: str) -> None:
    """It is no word on the split, and is never overwritten."""
    (indexed / INDEX).write_text(content)
    if content != '{"pages':
        assert len(sides(indexed)[0]) == 2 and len(sides(indexed)[1]) == 5
    with pytest.raises(UserError, match=r"index\.json: was not written by .* move it away"):
        write_index(indexed)
    assert (indexed / INDEX).read_text() == content


@pytest.mark.parametrize("texts", [["uno"], ["uno", " "], ["uno", "", "dos"]])
def test_index_of_too_few_texts(tmp_path: Path, texts: list[str]) -> None:
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    with pytest.raises(UserError, match=r"for calibration or none for the test, .*add texts"):
        write_index(tmp_path)
    assert not (tmp_path / INDEX).exists()


def test_index_of_names_in_capitals(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("A.TXT", "B.TXT"):
        (tmp_path / name).write_text(name)
    assert main([str(tmp_path)]) == main([str(tmp_path)]) == 0
    assert [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()] == ["written", "up to date"]
    assert sides(tmp_path) == (("B.TXT",), ("A.TXT",)) and {file.name for file in tmp_path.iterdir()} == {
        "A.TXT",
        "B.TXT",
        INDEX,
    }
    with pytest.raises(UserError, match=r"holds no \.txt file; give"):
        main([str(tmp_path / "none")])
