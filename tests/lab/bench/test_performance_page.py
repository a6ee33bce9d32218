"""README.md, docs/performance and docs/bench say what the JSON files in docs/data say."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from cuantiza.core.errors import UserError
from lab.bench.pages import performance as performance_page
from lab.bench.pages.markdown import page
from lab.bench.pages.performance import DATA, DOCS, TABLES, chosen, filled
from lab.bench.pages.plot import draw

from helpers import ROOT

BENCH = DATA / "bench"
ALL, TRIED = "docs/performance/tables.md", "docs/performance/tried.md"
AVX2, AMX = "docs/performance/avx2.md", "docs/performance/amx.md"


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", TABLES)
def test_the_pages_are_made_of_their_files(name: str) -> None:
    assert filled(name, text_of(name), DATA) == text_of(name)
    assert len(TABLES[name]) == len(re.findall(r"<!-- end -->", text_of(name)))


def test_every_result_has_its_page() -> None:
    pages = {file.stem: file for file in (DOCS / "bench").glob("*.md")}
    assert pages.keys() == {file.stem for file in BENCH.glob("*.json")}
    for name, file in pages.items():
        assert page(json.loads((BENCH / f"{name}.json").read_text()), name) == file.read_text(encoding="utf-8")
        assert file.with_suffix(".svg").is_file()


def test_the_figure_is_drawn_of_its_file(tmp_path: Path) -> None:
    draw(chosen(DATA), tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_text() == performance_page.FIGURE.read_text()


def test_a_table_follows_its_file(tmp_path: Path) -> None:
    shutil.copytree(DATA, tmp_path / "data")
    result = json.loads((BENCH / "gpt2.json").read_text())
    row = next(row for row in result["rows"] if row["name"] == "int8-weight-ort")
    row["settings"][0]["decode"][0]["speedups"] = [6.0] * result["rounds"]
    theirs = next(row for row in result["rows"] if row["name"] == "llama.cpp Q8_0")
    theirs["settings"][0]["decode"][0]["speedups"] = [2.0] * result["rounds"]
    (tmp_path / "data" / "bench" / "gpt2.json").write_text(json.dumps(result))
    text = filled(ALL, text_of(ALL), tmp_path / "data")
    (line,) = re.findall(r"\| llama.cpp Q8_0 \| `int8-weight-ort` \| .*", text)
    assert "3.00 [3.00–3.00]" in line


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"docs/data/bench/gpt2.json: is not there"):
        filled(ALL, text_of(ALL), tmp_path)
    with pytest.raises(UserError, match=rf"{TRIED}: has no <!-- ablation -->"):
        filled(TRIED, text_of(TRIED).replace("<!-- ablation -->", ""), DATA)


def test_the_ratios_that_the_summary_quotes_are_those_of_the_table() -> None:
    gpt2, others = text_of("docs/performance.md").split("## Llama-shaped models")
    llama, qwen = others.split("**Qwen3-0.6B's shape**")
    avx2, amx = (text_of(name).split("## Their time over ours") for name in (AVX2, AMX))
    bench = {name: text_of(f"docs/bench/{name}.md") for name in ("smollm2-135m", "qwen3-0.6b")}
    places = [(gpt2, text_of(ALL)), (llama, bench["smollm2-135m"]), (qwen, bench["qwen3-0.6b"])]
    for text, table in [*places, avx2, amx]:
        words = " ".join(text.split())
        quoted = set(re.findall(r"(\d\.\d\d)(?: times as fast)?(?: at \d+)? \(?(\[\d\.\d\d–\d\.\d\d\])", words))
        assert len(quoted) >= 4, text
        for ratio, spread in quoted:
            assert f"{ratio} {spread}" in table, ratio


def test_every_pair_was_measured() -> None:
    results = [json.loads(file.read_text()) for file in BENCH.glob("gpt2*.json")]
    names = {row["name"] for result in results for row in result["rows"]}
    assert {name for pair in performance_page.PAIRS for name in pair} <= names
