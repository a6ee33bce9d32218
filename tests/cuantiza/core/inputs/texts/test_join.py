"""A text that is joined to one document, and text that the model writes: what calibrates and what is scored."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from cuantiza.core.cli import Parser, add_corpus, source_of
from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Source, load_calibration, load_splits, load_test, scored, write_index
from cuantiza.core.inputs.texts import hub
from cuantiza.core.inputs.tokenizer import token_ids
from cuantiza.eval.measure.quality import make_task

from helpers import CORPUS, ES_MINI

# Rows as WikiText has them: blank ones, titles, lines with their end, and one twice.
ROWS = ["", " = Robert Boulter = \n", "", " Robert Boulter is an actor . \n", " He acted . \n", " He acted . \n", ""]


def test_rows_are_joined_as_they_are(tmp_path: Path) -> None:
    """Blank rows, white space and copies stay, as in "\\n\\n".join(dataset["text"]); only rows without text do not."""
    pyarrow.parquet.write_table(pyarrow.table({"text": [*ROWS, None]}), tmp_path / "test.parquet")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    for name in ("test.parquet", "rows.jsonl"):
        (joined,) = load_test(Source(str(tmp_path / name), join=True)).documents
        assert joined == "\n\n".join(ROWS)


def test_one_document_joined_is_that_document(tmp_path: Path) -> None:
    text = "  Un texto.\n\nCon un final.<|endoftext|>\n"
    (tmp_path / "one.txt").write_text(text)
    test = load_test(Source(str(tmp_path / "one.txt"), join=True))
    assert test.documents == (text,) and test.name == "test"


def test_markers_in_a_joined_text_are_scored(tmp_path: Path) -> None:
    """As papers' code does. In documents they say where one ends, and are no text."""
    text = "Un texto.<|endoftext|> Otro texto.\n"
    (tmp_path / "one.txt").write_text(text)
    joined = load_test(Source(str(tmp_path / "one.txt"), join=True))
    task = make_task(ES_MINI, joined, 100, 64)
    assert [*task.stream] == [*token_ids(task.tokenizer, text)] and len(task.documents) == 1
    assert len(make_task(ES_MINI, replace(joined, joined=False), 100, 64).documents) == 2


def test_files_of_a_folder_are_joined_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n")
    assert load_test(Source(str(tmp_path), join=True)).documents == ("a\n\n\nb\n\n\nc\n",)


def test_nothing_that_is_scored_calibrates(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """All of a joined file is scored, so it calibrates nothing; an index keeps its two sides."""
    (tmp_path / "one.txt").write_text("Uno.\n")
    with pytest.raises(UserError, match=r'CORPUS=.*nothing is left to calibrate on.*QUANTIZE="--corpus OTHER'):
        load_calibration(Source(str(tmp_path / "one.txt"), join=True))
    folder = tmp_path / "indexed"
    folder.mkdir()
    for file in sorted(CORPUS.glob("*.txt"))[:6]:
        shutil.copy(file, folder)
    write_index(folder)
    sides = load_calibration(Source(str(folder), join=True)), load_test(Source(str(folder), join=True))
    for joined, divided in zip(sides, load_splits(Source(str(folder))), strict=True):
        assert joined.documents == ("\n\n".join(divided.documents),) and joined.sha256 != divided.sha256


def test_a_saved_data_set_calibrates_on_its_train_split(tmp_path: Path) -> None:
    import datasets

    splits = {"train": ["Uno.", "Dos."], "test": ROWS}
    tables = {name: datasets.Dataset.from_dict({"text": rows}) for name, rows in splits.items()}
    datasets.DatasetDict(tables).save_to_disk(str(tmp_path / "saved"))
    source = Source(str(tmp_path / "saved"), split="test", join=True)
    assert load_calibration(source).documents == ("Uno.\n\nDos.",)
    assert load_test(source).documents == ("\n\n".join(ROWS),)
    with pytest.raises(UserError, match="CORPUS_SPLIT=test"):
        load_calibration(Source(str(tmp_path / "saved"), join=True))


def test_a_saved_data_set_without_a_split_for_calibration_is_refused(tmp_path: Path) -> None:
    """A table that was saved alone is the same whatever split is named, so that all of it is scored."""
    import datasets

    table = datasets.Dataset.from_dict({"text": ROWS})
    table.save_to_disk(str(tmp_path / "table"))
    datasets.DatasetDict({"test": table}).save_to_disk(str(tmp_path / "test"))
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "both"))
    for name, split in (
        ("table", "test"),
        ("table", "train"),
        ("test", "test"),
        ("both", "test + train"),
        ("both", "all"),
    ):
        source = Source(str(tmp_path / name), split=split, join=True)
        with pytest.raises(UserError, match=r"nothing is left to calibrate on.* has train, too") as told:
            load_calibration(source)
        assert "\n" not in str(told.value)


def test_a_data_set_of_the_hub_without_a_split_for_calibration_says_what_it_would_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(source: Source, *_: object) -> list[str]:
        if source.split != "test":
            raise UserError(f"CORPUS={source.spec}: Unknown split {source.split}")
        return ["Uno."]

    monkeypatch.setattr(hub, "hub_texts", read)
    source = Source("owner/one", split="test", join=True)
    assert load_test(source).documents == ("Uno.",)
    with pytest.raises(UserError, match=r'Unknown split train; where CORPUS_JOIN=1, .*QUANTIZE="--corpus OTHER"'):
        load_calibration(source)


@pytest.mark.parametrize("first", [[], ["--corpus-config=a", "--corpus-split=test", "--corpus-column=c"]])
def test_what_the_refusal_advises_works_beside_the_options_of_the_first_text(first: list[str], tmp_path: Path) -> None:
    """make puts what QUANTIZE= holds behind the options of CORPUS=, which are about another text."""
    (tmp_path / "one.txt").write_text("Uno.\n")
    with pytest.raises(UserError) as told:
        load_calibration(Source(str(tmp_path / "one.txt"), join=True))
    advised = re.search(r'QUANTIZE="([^"]+)"', str(told.value))[1].replace("OTHER", str(CORPUS)).split()
    add_corpus(parser := Parser("quantize", None, ""))
    args = parser.parse_args([f"--corpus={tmp_path / 'one.txt'}", *first, "--corpus-join=1", *advised])
    assert source_of(args) == Source(str(CORPUS))
    assert load_calibration(source_of(args)).documents
    # Options before and after the only text, or after the second one, are about it.
    for again in ([], ["--corpus", "other"]):
        args = parser.parse_args([*again, "--corpus-split=a", "--corpus", "b", "--corpus-split", "b"])
        assert source_of(args) == Source("b", split="b")
    assert source_of(parser.parse_args(["--corpus-split=a", "--corpus", "b"])) == Source("b", split="a")


def test_what_cannot_be_joined_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="CORPUS_BY=line: divides the text, and CORPUS_JOIN=1"):
        Source("text.txt", by="line", join=True)
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n{"text": null}\n')
    with pytest.raises(UserError, match=r"has no text \(1 row has no text \(null\)"):
        load_test(Source(str(tmp_path / "blank.jsonl"), join=True))


def test_text_that_the_model_writes_calibrates_and_the_embedded_one_is_scored(
    capsys: pytest.CaptureFixture,
) -> None:
    source = Source("self", split="test", join=True)
    calibration = load_calibration(source)
    assert calibration.documents == () and calibration.seed == 0
    assert calibration.sha256 != load_splits(Source())[0].sha256
    load_test.cache_clear()
    assert load_test(source) == load_splits(Source())[1] and scored(source) == Source()
    assert 'what is scored is the test split of corpus/es, or of another text with EVAL="--corpus TEXT"' in (
        capsys.readouterr().err
    )
