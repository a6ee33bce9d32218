"""The pages on what a choice is worth: lab/own_text.py and lab/accuracy/mixed.py, their figures, and the pages made of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from cuantiza.core.onnx import file as onnx_file
from cuantiza.core.store.artifact import Artifact
from lab import own_text
from lab.accuracy import mixed

from helpers import ROOT


def test_real_text_and_own_text_are_measured_alike(tiny_folder: Path, tmp_path: Path) -> None:
    fields = own_text.measure(tiny_folder, ["int8-dynamic"], 300, tmp_path)
    assert [(row["recipe"], row["text"]) for row in fields["rows"]] == [
        ("int8-dynamic", text) for text in own_text.TEXTS
    ]
    real, own = fields["rows"]
    assert real["calibration"].keys() | {"seed", "tokens_sha256"} == own["calibration"].keys()
    assert fields["tokens"] >= 300 and real["kl_divergence"] != own["kl_divergence"] > 0
    (tmp_path / "own-text.json").write_text(json.dumps(fields))
    own_text.write_page(tmp_path / "own-text.json")
    page = (tmp_path / "own-text.md").read_text(encoding="utf-8")
    assert page.count("| `int8-dynamic` | ") == 2 and "| `CORPUS=self` |" in page


def test_the_rule_by_place(es_mini_fp32: Artifact) -> None:
    """Of 6 layers, the last eighth is layer 5, and layer 2 is the first third between."""
    grids = mixed.by_place(onnx_file.load(es_mini_fp32.path / "model.onnx"), 6)
    assert set(grids) == {f"h.{n}.{name}.weight" for n in (2, 5) for name in ("attn.c_attn", "mlp.c_proj")}
    assert {grid.bits for grid in grids.values()} == {8}


def test_the_page_on_bits_is_that_of_its_figures(tmp_path: Path) -> None:
    shutil.copy(mixed.JSON, tmp_path / "mixed.json")
    mixed.write_page(tmp_path / "mixed.json")
    assert (tmp_path / "mixed.md").read_text(encoding="utf-8") == (ROOT / "docs/mixed.md").read_text(encoding="utf-8")


def test_the_page_on_own_text_is_that_of_its_figures(tmp_path: Path) -> None:
    shutil.copy(own_text.JSON, tmp_path / "own-text.json")
    own_text.write_page(tmp_path / "own-text.json")
    assert (tmp_path / "own-text.md").read_bytes() == (ROOT / "docs" / "own-text.md").read_bytes()
