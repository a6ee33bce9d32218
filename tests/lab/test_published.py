"""lab/published.py on a hub of this machine: the whole command, and a page of nothing but what was measured."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lab.published import MODELS, PUBLISHED, join, write_page

from helpers import CORPUS, stage
from hub_stub import files_of, serving

CARD = """---
configs:
- config_name: wikitext-2-raw-v1
  data_files:
  - {split: test, path: raw-test.parquet}
  - {split: train, path: raw-train.parquet}
---
"""


def table_of(rows: list[str]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), file)
    return file.getvalue()


def test_one_command_measures_a_model_of_the_hub(tiny_folder: Path, tmp_path: Path) -> None:
    """The rows are joined as they are, train calibrates, and the figures of one model are those of the report."""
    lines = [line + "\n" for file in sorted(CORPUS.glob("*.txt")) for line in file.read_text("utf-8").split("\n")]
    data = {"README.md": CARD.encode()}
    data["raw-test.parquet"] = table_of(["", *lines[:24]])
    data["raw-train.parquet"] = table_of(lines[24:])
    output = tmp_path / "data" / "published.json"
    output.parent.mkdir()
    with serving() as hub:
        hub.add("openai-community/gpt2", files_of(tiny_folder))
        hub.add("Salesforce/wikitext", data, kind="datasets")
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
        options = ("--models", "gpt2", "--recipes", "int8-dynamic", "--work", tmp_path / "work", "--output", output)
        result = stage("lab.published", *options, env=os.environ | env)
        assert result.status == 0, result.stderr
    fields = json.loads(output.read_text(encoding="utf-8"))
    (row,) = fields["rows"]
    fp32, dynamic = row["artifacts"]
    assert (row["model"], fp32["name"], dynamic["name"]) == ("gpt2", "fp32", "int8-dynamic")
    strided, full = fp32["protocols"]
    assert strided["tokens_scored"] == row["tokens"] - 1 and full["windows"] == row["tokens"] // 128
    assert full["tokens_scored"] == 127 * full["windows"] and full["window_tokens"] == 128
    for ours, base in zip(dynamic["protocols"], fp32["protocols"], strict=True):
        assert ours["delta_ln_ppl"] == pytest.approx(math.log(ours["perplexity"] / base["perplexity"]), abs=1e-9)
    page = (tmp_path / "published.md").read_text(encoding="utf-8")
    assert page.count("Intel Neural Compressor, dynamic int8 | +2.4 % |") == 2
    assert "AutoGPTQ, 4 bits" not in page and "gpt2-medium" not in page


def protocol(name: str, delta: float) -> dict:
    sizes = {"windows": 10, "window_tokens": 1024, "stride_tokens": 512, "tokens_scored": 5000}
    quality = {"perplexity": 20 * math.exp(delta), "perplexity_stderr": 1.0, "delta_ln_ppl": delta}
    return {"name": name, **quality, "delta_ln_ppl_stderr": 0.001, **sizes}


def row_of(model: str, **deltas: float) -> dict:
    items = {"fp32": 0.0} | {name.replace("_", "-"): delta for name, delta in deltas.items()}
    artifacts = [{"name": name, "protocols": [protocol("gptq", delta)]} for name, delta in items.items()]
    return {"model": model, "tokens": 6000, "artifacts": artifacts}


def test_a_page_has_what_was_measured_and_no_more(tmp_path: Path) -> None:
    facts = {"cpu": "a CPU", "versions": {"onnxruntime": "1.32.0"}, "code": "0", "text_sha256": "1"}
    path = tmp_path / "published.json"
    for row in (row_of("gpt2-large", int4_weight=0.01), row_of("gpt2", int4_weight=0.02, int8_static=0.003)):
        path.write_text(json.dumps(join(path, facts, row)), encoding="utf-8")
    write_page(path)
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "|  | gpt2 | gpt2-large |" in page
    assert "| `int4-weight` | +2.02 ± 0.10 % | +1.01 ± 0.10 % |" in page
    assert "| AutoGPTQ, 4 bits in groups of 128 | +5.2 % | +1.4 % |" in page
    assert "| `int8-static` | +0.30 ± 0.10 % |  |" in page and "dynamic" not in page
    assert "19.44" in page and "16.45" not in page and "Windows that overlap" not in page
    # Another text, code or version begins anew, and a second measurement of a model takes the first one's place.
    assert [row["model"] for row in join(path, facts | {"code": "2"}, row_of("gpt2-xl"))["rows"]] == ["gpt2-xl"]
    again = join(path, facts, row_of("gpt2", int4_weight=0.05))["rows"]
    assert len(again) == 2 and again[0]["artifacts"][1]["protocols"][0]["delta_ln_ppl"] == 0.05


def test_published_figures_are_of_models_that_are_measured() -> None:
    assert all(set(entry.rises) <= set(MODELS) for entry in PUBLISHED)
