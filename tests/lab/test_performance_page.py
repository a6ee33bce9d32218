"""docs/performance.md and docs/bench agree with their JSON files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from cuantiza.core.errors import UserError
from lab.bench.pages import performance as performance_page
from lab.bench.pages.markdown import page
from lab.bench.pages.performance import DOCS, PAGE, TABLES, filled

from helpers import ROOT

BENCH = DOCS / "bench"


def test_the_pages_are_made_of_their_files() -> None:
    text = (DOCS / PAGE).read_text(encoding="utf-8")
    assert filled(text, BENCH) == text
    for file in BENCH.glob("*.json"):
        assert page(json.loads(file.read_text()), file.stem) == file.with_suffix(".md").read_text(encoding="utf-8")
        assert file.with_suffix(".svg").is_file()
    assert {file.stem for file in BENCH.glob("*.md")} == {file.stem for file in BENCH.glob("*.json")}


def test_a_table_follows_its_file(tmp_path: Path) -> None:
    shutil.copytree(BENCH, tmp_path / "bench")
    result = json.loads((BENCH / "gpt2.json").read_text())
    row = next(row for row in result["rows"] if row["name"] == "int8-weight-ort")
    row["settings"][0]["decode"][0]["speedups"] = [6.0] * result["rounds"]
    theirs = next(row for row in result["rows"] if row["name"] == "llama.cpp Q8_0")
    theirs["settings"][0]["decode"][0]["speedups"] = [2.0] * result["rounds"]
    (tmp_path / "bench" / "gpt2.json").write_text(json.dumps(result))
    text = filled((DOCS / PAGE).read_text(encoding="utf-8"), tmp_path / "bench")
    (line,) = re.findall(r"\| llama.cpp Q8_0 \| `int8-weight-ort` \| .*", text)
    assert "3.00 [3.00–3.00]" in line


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    text = (DOCS / PAGE).read_text(encoding="utf-8")
    with pytest.raises(UserError, match=r"docs/bench/gpt2.json: is not there"):
        filled(text, tmp_path)
    with pytest.raises(UserError, match=r"has no <!-- ablation -->"):
        filled(text.replace("<!-- ablation -->", ""), BENCH)


def test_every_pair_is_a_row_of_the_main_table() -> None:
    names = {row["name"] for row in json.loads((BENCH / "gpt2.json").read_text())["rows"]}
    assert {name for pair in performance_page.PAIRS for name in pair} <= names
    assert len(TABLES) == len(re.findall(r"<!-- end -->", (ROOT / "docs" / PAGE).read_text()))
