"""What is measured together: forms of one model that were made from one fp32 artifact, as they lie there at that moment."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import cuantiza.eval.stage
from cuantiza.core.errors import UserError
from cuantiza.core.store.artifact import Artifact, open_artifact
from cuantiza.core.store.folders import locked
from cuantiza.eval.measure.engines import Subject
from cuantiza.eval.measure.size import companion_bytes, loaded_bytes, onnx_bytes
from cuantiza.eval.report.html import render
from cuantiza.eval.report.schema import Report
from cuantiza.eval.stage import evaluate
from cuantiza.quantize.stage import quantize

from helpers import copy_tokenizer, stage, tiny_gpt2, variant


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("family") / "small"
    tiny_gpt2().save_pretrained(folder)
    copy_tokenizer(folder)
    result = stage("export", "--model", folder, "--output", folder.parent / "artifacts")
    assert result.status == 0, result.stderr
    return open_artifact(folder.parent / "artifacts/small/fp32")


@pytest.fixture(scope="module")
def quantized(fp32: Artifact) -> Artifact:
    return quantize(fp32.path, "int8-weight")


def measure(artifacts: list[Path], output: Path, **options: object) -> Report:
    return evaluate(artifacts, output=output, **{"tokens": 300, "rounds": 1, "window": 64, "threads": 1} | options)


def scaled(name: str, factor: float) -> Callable[[ir.Model], None]:
    def change(model: ir.Model) -> None:
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(factor), name=name)

    return change


def test_an_artifact_of_another_fp32_is_refused(fp32: Artifact, quantized: Artifact, tmp_path: Path) -> None:
    """As after `make export` of a checkpoint that was trained on, without `make quantize`."""
    other = variant(fp32, tmp_path / "small", scaled("wte.weight", 1.5))
    with pytest.raises(UserError, match=r"not made from the same fp32 artifact as .*; run `make quantize`"):
        measure([other.path, quantized.path], tmp_path / "reports")
    report = measure([fp32.path, quantized.path], tmp_path / "reports")
    assert [row.name for row in report.artifacts] == ["fp32", "int8-weight"] and report.model == "small"


def test_two_artifacts_of_one_name_are_refused(fp32: Artifact, tmp_path: Path) -> None:
    shutil.copytree(fp32.path, tmp_path / "copy")
    with pytest.raises(UserError, match=f"fp32 and {tmp_path}/copy: both are artifacts named 'fp32'.*cuantiza compare"):
        measure([fp32.path, tmp_path / "copy"], tmp_path / "reports")


def test_what_a_running_stage_replaces_is_opened_after_it(
    fp32: Artifact, quantized: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(fp32.path.parent, tmp_path / "small")
    paths = [tmp_path / "small/fp32", tmp_path / "small/int8-weight"]
    measure(paths, tmp_path / "reports")

    @contextmanager
    def waited(*_: Path):
        shutil.rmtree(paths[1])
        variant(quantized, tmp_path / "small", scaled("ln_f.bias", 2))
        yield

    monkeypatch.setattr(cuantiza.eval.stage.folders, "held", waited)
    report = measure(paths, tmp_path / "reports")
    assert dict(report.inputs.artifacts)["int8-weight"] == open_artifact(paths[1]).digest != quantized.digest


def test_a_baseline_without_numbers_is_refused_and_no_other_is_blamed(
    fp32: Artifact, quantized: Artifact, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """From its first position on, or from its 40th, which few tokens do not show."""

    def without(start: int) -> Callable[[ir.Model], None]:
        def change(model: ir.Model) -> None:
            table = model.graph.initializers["wpe.weight"]
            rows = table.const_value.numpy().copy()
            rows[start:] = np.nan
            table.const_value = ir.tensor(rows, name=table.name)

        return change

    broken = {start: variant(fp32, tmp_path / str(start), without(start)) for start in (40, 0)}
    shutil.copytree(quantized.path, tmp_path / "theirs")
    for start in (40, 0):
        with pytest.raises(UserError, match="fp32: gives logits that are not numbers"):
            measure([broken[start].path], tmp_path / "reports", onnx=tmp_path / "theirs")
    assert "left out" not in capfd.readouterr().err


def test_a_layer_whose_keys_are_zero_is_reported(fp32: Artifact, tmp_path: Path) -> None:
    """As pruning leaves it."""

    def without_keys(model: ir.Model) -> None:
        for name in ("h.0.attn.c_attn.weight", "h.0.attn.c_attn.bias"):
            value = model.graph.initializers[name]
            weight = value.const_value.numpy().copy()
            third = weight.shape[-1] // 3
            weight[..., third : 2 * third] = 0
            value.const_value = ir.tensor(weight, name=name)

    pruned = variant(fp32, tmp_path / "small", without_keys)
    with locked(tmp_path / "other"):
        pruned.path.rename(tmp_path / "other/fp32")
    paths = [tmp_path / "other/fp32", quantize(tmp_path / "other/fp32", "int8-dynamic").path]
    report = measure(paths, tmp_path / "reports")
    errors = report.artifacts[1].key_error
    assert errors is not None and errors[0] == 0 and errors[1] > 0


def test_a_row_that_is_not_finite_is_left_out_of_the_plots(fp32: Artifact, quantized: Artifact, tmp_path: Path) -> None:
    fields = measure([fp32.path, quantized.path], tmp_path / "reports").model_dump(mode="json", by_alias=True)
    nan = float("nan")
    fields["artifacts"][1] |= {"delta_ln_ppl": nan, "delta_ln_ppl_stderr": nan, "key_error": [nan, nan]}
    assert '="nan"' not in render(Report.model_validate(fields))


def test_a_link_of_the_hub_s_cache_keeps_its_name(fp32: Artifact, quantized: Artifact, tmp_path: Path) -> None:
    """There, a file is a link to a blob whose name is its hash, and tokenizer and configuration lie beside the link."""
    shutil.copytree(quantized.path, tmp_path / "theirs")
    model = tmp_path / "theirs/model.onnx"
    model.rename(tmp_path / "5f3c")
    model.symlink_to(tmp_path / "5f3c")
    row = measure([fp32.path], tmp_path / "reports", onnx=model).artifacts[1]
    assert row.name == "model" and row.bytes == onnx_bytes(quantized.model)["bytes"]


def test_a_folder_of_transformers_js_is_counted_whole(fp32: Artifact, tmp_path: Path) -> None:
    """Its graphs lie in a folder `onnx`, configuration and tokenizer above."""
    shutil.copytree(fp32.path, tmp_path / "theirs")
    (tmp_path / "theirs/onnx").mkdir()
    model = (tmp_path / "theirs/model.onnx").rename(tmp_path / "theirs/onnx/model.onnx")
    assert onnx_bytes(model) == onnx_bytes(fp32.model)
    assert loaded_bytes(Subject("theirs", "onnx", model)) == model.stat().st_size + companion_bytes(fp32.path)
