"""The accuracy page is made only from its JSON, and its rows include the defaults of common tools."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Split
from cuantiza.core.run.runtime import Runtime
from cuantiza.core.store.artifact import Artifact
from cuantiza.quantize.inspect.costs import costs_of
from lab.accuracy import __main__ as accuracy
from lab.accuracy import page as accuracy_page
from lab.accuracy.naive import make_naive

from helpers import ES_MINI, ROOT, Result, assert_user_error

ROW = {
    "name": "int8-static",
    "bytes": 7_000_000,
    "ratio": 0.25,
    "perplexity": 66.123456,
    "delta_ln_ppl": 0.0123,
    "delta_ln_ppl_stderr": 0.0011,
    "kl_divergence": 0.0042,
    "kl_divergence_p50": 0.00312,
    "kl_divergence_p99": 0.04567,
    "top1_agreement": 0.9512,
    "top1_agreement_stderr": 0.0021,
}
REPORT = {
    "schema": accuracy_page.SCHEMA,
    "machine": {"cpu": "A processor", "threads": 1},
    "versions": {"onnxruntime": "1.2.3"},
    "models": [
        {
            "model": model,
            "corpus": corpus,
            "window_tokens": 512,
            "tokens_scored": 33000,
            "documents": 45,
            "fp32_perplexity": 65.2,
            "artifacts": [ROW, ROW | {"name": "int8-weight-ort", "delta_ln_ppl": -0.00001}],
        }
        for model in ("es-mini", "theirs")
        for corpus in ("corpus/es", "novels.txt")
    ],
    "skipped": {"optimum-dynamic": "there is no environment"},
}
SENTENCES = [[5, 6, 7, 8, 9], [10, 11]]


# --- the page ---


def test_page_shows_every_model_on_every_text() -> None:
    page = accuracy_page.page(REPORT)
    for model in ("es-mini", "theirs"):
        for corpus in ("corpus/es", "novels.txt"):
            assert f"\n## {model} on {corpus}: 33,000 tokens, 45 documents\n" in page
    assert page.count("| int8-static | 0.250 | 66.12 | 0.0123 ± 0.0011 | 0.00312 | 0.04567 | 95.1 ± 0.2 |") == 4
    assert page.count("| fp32 | 1.000 | 65.20 | baseline |") == 4
    assert "| 0.0000 ± 0.0011 |" in page  # and not -0.0000
    assert "Not measured: `optimum-dynamic`: there is no environment." in page
    for name in ("theirs", "novels.txt"):
        assert f"`{name}` does not belong to the project" in " ".join(page.split())
    assert "{" not in page and "None" not in page


def test_published_losses_stand_beside_ours_in_percent() -> None:
    lines = accuracy_page.page(REPORT).split("## Published losses")[1].splitlines()
    static, dynamic, gptq, llama_cpp = [line for line in lines if line.startswith("| ")][1:]
    # exp(0.0123) − 1, and its standard error exp(0.0123) · 0.0011, on the first text, for both models
    assert static.count("| +1.24 ± 0.11 %") == 2 and "+4.3 %" in static
    assert dynamic.endswith("| — | — |") and gptq.endswith("| — | — |")  # recipes that the report lacks
    assert llama_cpp.count("| 0.0042, 95.1 %") == 2


def test_a_model_of_english_has_tables_of_its_own() -> None:
    """It takes no part in what compares models on the project's text."""
    large = [REPORT["models"][0] | {"model": "large", "corpus": corpus} for corpus in ("corpus/es", "lab/texts/en")]
    report = REPORT | {"models": REPORT["models"] + large}
    page = accuracy_page.page(report)
    for corpus in ("corpus/es", "lab/texts/en"):
        assert f"\n## large on {corpus}: " in page
    words = " ".join(page.split())
    assert "`large` is a language model that people use" in words and "`large` does not belong" not in words
    assert "`lab/texts/en` is an English text" in words and "SmolLM2" not in page
    assert page.split("## Published losses")[1] == accuracy_page.page(REPORT).split("## Published losses")[1]
    assert costs_of(report) == costs_of(REPORT) and len(costs_of(REPORT)["models"]) == 2


@pytest.mark.parametrize("option", ["--models", "--english"])
def test_options_that_are_wrong(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "es-mini").mkdir()
    for folder, words in ((tmp_path / "none", "is not a folder"), (tmp_path / "es-mini", "called 'es-mini'")):
        monkeypatch.setattr(sys, "argv", ["accuracy", option, str(folder), "--output", str(tmp_path)])
        with pytest.raises(UserError, match=words):
            accuracy.main()


def test_one_document_has_no_standard_error() -> None:
    report = copy.deepcopy(REPORT)
    for item in report["models"]:
        for row in item["artifacts"]:
            row |= {"delta_ln_ppl_stderr": None, "top1_agreement_stderr": None}
    page = accuracy_page.page(report)
    assert "| int8-static | 0.250 | 66.12 | 0.0123 | 0.00312 | 0.04567 | 95.1 |" in page and "| +1.24 % |" in page


def test_publish_rounds_and_writes_both_files(tmp_path: Path) -> None:
    report = REPORT | {"skipped": {}, "more": [1 / 3, 123456789, {"x": 1e-9 / 3, "none": None}]}
    accuracy_page.publish(report, tmp_path / "docs")
    assert sorted(file.name for file in (tmp_path / "docs").rglob("*.*")) == ["accuracy.json", "accuracy.md"]
    written = json.loads((tmp_path / "docs" / "data" / "accuracy.json").read_text(encoding="utf-8"))
    assert written["more"] == [0.333333, 123456789, {"x": 3.33333e-10, "none": None}]
    assert (tmp_path / "docs" / "accuracy.md").read_text(encoding="utf-8") == accuracy_page.page(written)


def test_the_committed_page_is_that_of_the_committed_json(tmp_path: Path) -> None:
    committed = json.loads((ROOT / "docs" / "data" / "accuracy.json").read_text(encoding="utf-8"))
    accuracy_page.publish(committed, tmp_path)
    for name in ("data/accuracy.json", "accuracy.md"):
        assert (tmp_path / name).read_bytes() == (ROOT / "docs" / name).read_bytes(), (
            f"docs/{name}: run `make accuracy`"
        )
    assert committed["schema"] == accuracy_page.SCHEMA
    assert {"es-mini", "es-mini-twin", "es-mini-sink"} <= {item["model"] for item in committed["models"]}
    for item in committed["models"]:
        assert all({"name", "bytes", "ratio", *accuracy_page.FIELDS} == row.keys() for row in item["artifacts"])


# --- the rows ---


def test_first_sentences_are_no_headlines() -> None:
    texts = (
        "Un titular\n\nPrimera frase, con 3.5 cosas. Segunda.",
        "—¿Diga? —Yo.",
        "sin punto",
        "A… B.",
        *["C. D."] * 9,
    )
    sentences = accuracy.first_sentences(Split("calibration", texts))
    assert sentences[:4] == ("Primera frase, con 3.5 cosas.", "—¿Diga?", "A…", "C.") and len(sentences) == 7


def operators(item: Artifact) -> set[str]:
    return {node.op_type for node in onnx.load(item.model).graph.node}


def test_naive_rows_are_artifacts_that_run(tiny_folder: Path, exported: Callable[..., Artifact]) -> None:
    fp32 = exported(tiny_folder)
    ids = np.arange(20, 40)[None]
    logits = Runtime(fp32.model).forward(ids)
    for name, operator in (("naive-dynamic", "DynamicQuantizeLinear"), ("naive-static", "QuantizeLinear")):
        target = fp32.path.parent / name
        made = make_naive(name, fp32, target, SENTENCES)
        assert operator in operators(made) and made.manifest.parent == fp32.digest
        assert 1e-4 < np.abs(Runtime(made.model).forward(ids) - logits).max() < np.abs(logits).max()
        before = target.stat().st_ino
        make_naive(name, fp32, target, SENTENCES)
        assert target.stat().st_ino == before
    make_naive("naive-static", fp32, target, SENTENCES[:1])
    assert target.stat().st_ino != before


def test_without_its_environment_optimum_is_skipped_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_folder: Path, exported: Callable[..., Artifact]
) -> None:
    monkeypatch.setenv("OPTIMUM_PYTHON", str(tmp_path / "nowhere" / "python"))
    monkeypatch.setattr(accuracy, "NAIVE", ("optimum-dynamic", "optimum-static"))
    skipped: dict[str, str] = {}
    assert accuracy.naive_artifacts(exported(tiny_folder), SENTENCES, skipped) == []
    assert skipped.keys() == {"optimum-dynamic", "optimum-static"}
    assert "`make optimum`" in skipped["optimum-static"]


def test_an_optimum_that_fails_is_named(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, exported: Callable[..., Artifact]
) -> None:
    monkeypatch.setenv("OPTIMUM_PYTHON", sys.executable)  # an environment without optimum
    fp32 = exported(tiny_folder)
    with pytest.raises(UserError, match=r"optimum failed on tiny .*No module named 'optimum"):
        make_naive("optimum-dynamic", fp32, fp32.path.parent / "optimum-dynamic", SENTENCES)
    assert [path.name for path in fp32.path.parent.iterdir() if path.is_dir()] == ["fp32"]


@pytest.mark.skipif(not (ROOT / ".venv-optimum").exists(), reason="no .venv-optimum here; `make optimum` creates it")
def test_optimum_calibrates_on_the_sentences(tiny_folder: Path, exported: Callable[..., Artifact]) -> None:
    fp32 = exported(tiny_folder)
    made = make_naive("optimum-static", fp32, fp32.path.parent / "optimum-static", SENTENCES)
    assert "QuantizeLinear" in operators(made) and np.isfinite(Runtime(made.model).forward(np.arange(9)[None])).all()


def test_scores_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_folder: Path, exported: Callable[..., Artifact]
) -> None:
    fp32 = exported(tiny_folder)
    items = [fp32, make_naive("naive-dynamic", fp32, fp32.path.parent / "naive-dynamic", SENTENCES)]
    text = accuracy.Text("two", Split("test", ("Una frase corta.", "Otra frase, algo más larga.")))
    first = accuracy._measure_on(text, items, tmp_path / "scores")
    monkeypatch.setattr(accuracy, "measure_quality", None)
    assert accuracy._measure_on(text, items, tmp_path / "scores") == first
    assert first["documents"] == 2 and first["tokens_scored"] > 5 and first["corpus"] == "two"
    (row,) = first["artifacts"]
    assert row["name"] == "naive-dynamic" and row["bytes"] == items[1].model.stat().st_size
    assert row["ratio"] == row["bytes"] / fp32.model.stat().st_size and row["kl_divergence"] > 0
    with pytest.raises(TypeError):  # another text is measured
        accuracy._measure_on(accuracy.Text("two", Split("test", text.test.documents[:1])), items, tmp_path / "scores")


# --- the command ---


def test_bad_options_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    places = ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "docs")]
    for options, message in (
        (["--models", "nowhere"], "--models nowhere: is not a folder"),
        (["--models", str(ES_MINI)], "two models are called 'es-mini'"),
    ):
        monkeypatch.setattr(sys, "argv", ["accuracy", *options, *places])
        with pytest.raises(UserError, match=message):
            accuracy.main()
    command = [sys.executable, "-m", "lab.accuracy", "--text", "nowhere.txt", *places]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert_user_error(Result(done.returncode, done.stdout, done.stderr), "--text nowhere.txt", "is not a file")
    assert not list(tmp_path.iterdir())
