"""lab/own_text.py: the figures that it measures, and the page that it makes of them."""

from __future__ import annotations

import json
from pathlib import Path

from lab.own_text import TEXTS, measure, write_page


def test_real_text_and_own_text_are_measured_alike(tiny_folder: Path, tmp_path: Path) -> None:
    fields = measure(tiny_folder, ["int8-dynamic"], 300, tmp_path)
    assert [(row["recipe"], row["text"]) for row in fields["rows"]] == [("int8-dynamic", text) for text in TEXTS]
    real, own = fields["rows"]
    assert real["calibration"].keys() | {"seed", "tokens_sha256"} == own["calibration"].keys()
    assert fields["tokens"] >= 300 and real["kl_divergence"] != own["kl_divergence"] > 0
    (tmp_path / "own-text.json").write_text(json.dumps(fields))
    write_page(tmp_path / "own-text.json")
    page = (tmp_path / "own-text.md").read_text(encoding="utf-8")
    assert page.count("| `int8-dynamic` | ") == 2 and "| `CORPUS=self` |" in page
