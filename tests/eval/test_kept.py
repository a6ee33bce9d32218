"""Quality that was measured is not measured again; and a model for many positions takes no more time than GPT-2."""

import json
import shutil

import pytest

import cuantiza.eval.measure.latency
import cuantiza.eval.measure.quality
import cuantiza.eval.measure.report
from cuantiza.core.errors import UserError
from cuantiza.core.machine.process import Remote
from cuantiza.eval.kept import FILE
from cuantiza.eval.measure.latency import shapes
from cuantiza.eval.stage import JSON, evaluate
from cuantiza.quantize.stage import quantize

LONG = 32768


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """fp32 and int8-weight of a tiny model for 32,768 positions."""
    from helpers import copy_tokenizer, stage, tiny_gpt2

    folder = tmp_path_factory.mktemp("long") / "long"
    tiny_gpt2(n_positions=LONG, n_embd=16, n_head=1).save_pretrained(folder)
    copy_tokenizer(folder)
    result = stage("export", "--model", folder, "--output", folder.parent / "artifacts")
    assert result.status == 0, result.stderr
    fp32 = folder.parent / "artifacts/long/fp32"
    return [fp32, quantize(fp32, "int8-weight").path]


@pytest.fixture
def opened(monkeypatch):
    """The names of the subjects that quality opens, in their order."""
    names = []

    class Watched(Remote):
        def __init__(self, *args, label):
            names.append(label)
            super().__init__(*args, label=label)

    monkeypatch.setattr(cuantiza.eval.measure.quality, "Remote", Watched)
    return names


def measure(artifacts, output, **changes):
    return evaluate(artifacts, output=output, **{"tokens": 300, "rounds": 1, "window": 64, "threads": 1} | changes)


def quality_of(report):
    """All of a report's rows but what was timed."""
    timed = {"load_ms", "load_samples_ns", "peak_rss_bytes", "prefill", "decode"}
    return [row.model_dump(exclude=timed) for row in report.artifacts]


@pytest.fixture
def stopped(artifacts, tmp_path, monkeypatch):
    """A folder for reports in which a run was stopped while it measured latency."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cuantiza.eval.measure.report, "measure_latency", stop)
        measure(artifacts, tmp_path / "reports")
    assert not (tmp_path / "reports" / JSON).exists()
    return tmp_path / "reports"


def stop(*_):
    raise KeyboardInterrupt


def test_a_run_that_is_stopped_in_its_latency_keeps_the_quality(artifacts, stopped, opened, tmp_path, capfd):
    again = measure(artifacts, stopped)
    assert opened == []
    assert "quality   fp32 int8-weight: kept from an earlier run" in capfd.readouterr().err
    fresh = measure(artifacts, tmp_path / "fresh")
    assert opened == ["fp32", "int8-weight"]
    assert quality_of(again) == quality_of(fresh)
    assert [row.kl_divergence > 0 for row in again.artifacts] == [False, True]


def test_one_more_artifact_is_measured_alone(artifacts, stopped, opened, tmp_path):
    more = quantize(artifacts[0], "fp16").path
    report = measure([*artifacts, more], stopped, rounds=2)
    assert opened == ["fp32", "fp16"]
    assert quality_of(report)[:2] == quality_of(measure(artifacts, tmp_path / "fresh"))


@pytest.mark.parametrize("changes", [{"tokens": 200}, {"window": 32}])
def test_other_settings_measure_anew(artifacts, stopped, opened, changes):
    measure(artifacts, stopped, **changes)
    assert opened == ["fp32", "int8-weight"]


def test_another_baseline_measures_anew(artifacts, stopped, opened):
    measure(artifacts[::-1], stopped)
    assert opened == ["int8-weight", "fp32"]


@pytest.mark.parametrize("damage", ["digit", "cut", "other"])
def test_a_damaged_file_counts_as_none(artifacts, stopped, opened, damage):
    text = (stopped / FILE).read_text()
    rows = json.loads(text)["rows"]
    value = str(next(iter(rows.values()))["perplexity"])
    (stopped / FILE).write_text(
        {"digit": text.replace(value, "1.5"), "cut": text[: len(text) // 2], "other": "[]"}[damage]
    )
    measure(artifacts, stopped)
    assert opened == ["fp32", "int8-weight"]


def test_one_that_fails_in_its_latency_costs_no_other_its_quality(artifacts, opened, tmp_path, monkeypatch):
    """The file is removed between quality and latency."""
    shutil.copytree(artifacts[1], tmp_path / "gone")
    measure_latency = cuantiza.eval.measure.report.measure_latency

    def without(*args):
        (tmp_path / "gone/model.onnx").unlink(missing_ok=True)
        return measure_latency(*args)

    monkeypatch.setattr(cuantiza.eval.measure.report, "measure_latency", without)
    report = measure(artifacts, tmp_path / "reports", onnx=[tmp_path / "gone/model.onnx"])
    assert opened == ["fp32", "int8-weight", "model"]
    assert [item.name for item in report.left_out] == ["model"] and len(report.artifacts) == 2


def test_latency_stops_at_gpt2s_positions(artifacts, tmp_path):
    """The KV cache of a model for 32,768 positions is not filled unless --positions asks for it."""
    fp32 = measure(artifacts[:1], tmp_path / "reports").artifacts[0]
    assert [shape.at for shape in fp32.prefill] == [32, 128, 512]
    assert [shape.at for shape in fp32.decode] == [32, 128, 512, 1023]
    longer = measure(artifacts[:1], tmp_path / "reports", positions=2100)
    assert [shape.at for shape in longer.artifacts[0].prefill] == [32, 128, 512, 2048]
    assert [shape.at for shape in longer.artifacts[0].decode] == [32, 128, 512, 2048, 2099]
    assert longer.inputs.positions == 2100


def test_shapes_of_long_models():
    assert shapes(131072) == shapes(1024)
    assert shapes(131072, 131072)[1] == [32, 128, 512, 2048, 8192, 32768, 131071]
    assert shapes(1024, 4096) == shapes(1024)
    assert shapes(131072, 100) == ([32], [32, 99])


def test_too_few_positions(artifacts):
    with pytest.raises(UserError, match=r"--positions 1: give a number from 2 on"):
        measure(artifacts, None, positions=1)
