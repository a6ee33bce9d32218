"""docs/python.md and docs/use.md: their code runs as it is written, as a script and without a guard for child processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cuantiza.bundle.files import DTYPES, graph_name
from cuantiza.core.store.artifact import Artifact
from cuantiza.model import load

from helpers import ROOT, report_fields, report_row

OPTIMUM = ROOT / ".venv-optimum/bin/python"


def test_the_page_runs_as_written(tmp_path: Path) -> None:
    text = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    (tmp_path / "script.py").write_text("\n".join(blocks), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    folder, *rows = done.stdout.splitlines()
    shape, story = rows[-1], rows[2:-1]
    assert folder.startswith("artifacts/es-mini/int8-dynamic ") and shape.endswith(", 8192)") and any(story)
    assert [row.split()[0] for row in rows[:2]] == ["fp32", "int8-dynamic"]
    assert (tmp_path / "artifacts/es-mini/int8-dynamic/manifest.json").is_file()


def blocks(page: str) -> list[str]:
    """The blocks of Python of a page."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    ("number", "python"),
    [
        pytest.param(0, Path(sys.executable), id="onnxruntime"),
        pytest.param(
            1,
            OPTIMUM,
            id="optimum",
            marks=pytest.mark.skipif(not OPTIMUM.exists(), reason="no .venv-optimum here; `make optimum` creates it"),
        ),
    ],
)
def test_programs_without_cuantiza_give_the_reports_text(
    number: int, python: Path, es_mini_fp32: Artifact, tmp_path: Path
) -> None:
    (tmp_path / "artifacts/es-mini").mkdir(parents=True)
    (tmp_path / "artifacts/es-mini/int8-dynamic").symlink_to(es_mini_fp32.path)
    assert len(blocks("use.md")) == 2
    (tmp_path / "script.py").write_text(blocks("use.md")[number], encoding="utf-8")
    command = [python, "script.py"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    prompt = "Me gusta mucho el futbol"
    expected = load(es_mini_fp32).generate(prompt, 32, temperature=0, no_repeat_ngram=0)
    assert done.stdout.rstrip("\n") == prompt + expected


def test_the_recipes_that_bundle_are_those_of_the_page() -> None:
    text = (ROOT / "docs/use.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| `(\w+)` \| `([\w.]+)` \|$", text, re.MULTILINE)
    assert rows == [(recipe, dtype, graph_name(recipe)) for recipe, dtype in DTYPES.items()]


def test_one_name_or_path_need_not_stand_in_a_list(
    es_mini_fp32: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python would read a text as a list of its letters."""
    from cuantiza.eval import stage
    from cuantiza.eval.compare.stage import compare

    asked = []
    monkeypatch.setattr(stage, "_evaluate", lambda *those: asked.append(those))
    path = es_mini_fp32.path
    stage.evaluate(str(path), protocols="gptq", onnx=str(path / "model.onnx"), output=str(tmp_path))
    stage.evaluate([path], protocols=["gptq"], onnx=[path / "model.onnx"], output=tmp_path)
    assert asked[0] == asked[1] and asked[0][2].protocols == ("gptq",)

    (tmp_path / "report.json").write_text(json.dumps(report_fields([report_row("fp32"), report_row("q")])))
    one, listed = (compare(tmp_path, tmp_path, recipes=names, latency=False) for names in ("q", ["q"]))
    assert {check.recipe for check in one.checks} == {"q"} and one.checks == listed.checks
