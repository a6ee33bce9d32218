"""Configurations under other names and without a type: the same graph, parity with PyTorch, and every recipe after it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cuantiza.core.inputs.gpt2_config import canonical_fields
from cuantiza.core.store.artifact import Artifact

ALIASES = {"n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}
ALIASES |= {"n_positions": "max_position_embeddings"}


def rewrite(folder: Path, change: Callable[[dict], dict]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def by_aliases(fields: dict) -> dict:
    return {ALIASES.get(key, key): value for key, value in fields.items()}


def bare(fields: dict) -> dict:
    return {key: value for key, value in fields.items() if key not in ("model_type", "architectures")}


def floats(fields: dict) -> dict:
    return {key: float(value) if key in ALIASES else value for key, value in fields.items()}


def old_length(fields: dict) -> dict:
    return {"n_ctx" if key == "n_positions" else key: value for key, value in fields.items()}


@pytest.mark.parametrize("spelling", [by_aliases, bare, floats, old_length], ids=lambda spelling: spelling.__name__)
def test_another_spelling_is_exported_under_the_usual_names(
    exported: Callable[..., Artifact], folder: Path, spelling: Callable[[dict], dict]
) -> None:
    """The export compares the graph with PyTorch's model, so that it is the same model too."""
    wanted = json.loads((folder / "config.json").read_text())
    rewrite(folder, spelling)
    artifact = exported(folder)
    fields = json.loads((artifact.path / "config.json").read_text())
    assert all(fields[key] == wanted[key] and type(fields[key]) is int for key in ALIASES)
    assert fields["model_type"] == "gpt2" and not {*ALIASES.values()} & {*fields}
    told = artifact.manifest.details.get("warnings", [])
    assert [line for line in told if "no model_type" in line] == told and bool(told) == (spelling is bare)


def test_gpt_sw3_is_a_gpt2(exported: Callable[..., Artifact], folder: Path) -> None:
    rewrite(folder, lambda fields: fields | {"model_type": "gpt-sw3"})
    artifact = exported(folder)
    assert json.loads((artifact.path / "config.json").read_text())["model_type"] == "gpt2"
    assert "gpt-sw3" in artifact.manifest.details["warnings"][0]


@pytest.mark.parametrize("spelling", [by_aliases, bare], ids=lambda spelling: spelling.__name__)
def test_the_rows_of_pytorch_load_it(make_gpt2: Callable[..., Path], spelling: Callable[[dict], dict]) -> None:
    from cuantiza.core.inputs.weights.pytorch import pytorch_loader
    from cuantiza.eval.measure.torch_engine import TorchRuntime

    usual, folder = make_gpt2("usual"), make_gpt2("other")
    rewrite(folder, spelling)
    ids = np.array([[0, 5, 6, 7]])
    wanted, found = (TorchRuntime(pytorch_loader(path), 1, quantized=False).forward(ids) for path in (usual, folder))
    np.testing.assert_array_equal(found, wanted)


def test_onnxruntimes_tools_read_its_sizes(
    exported: Callable[..., Artifact], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cuantiza.quantize.rewrite.onnxruntime_tools import ort_dynamic

    rewrite(folder, by_aliases)
    artifact, work = exported(folder), tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(tmp_path)  # the tools change the working directory
    ort_dynamic(artifact.model, work)
    assert (work / "model.onnx").stat().st_size < artifact.model.stat().st_size


def test_two_names_that_contradict_each_other(folder: Path, refused: Callable[..., str]) -> None:
    rewrite(folder, lambda fields: fields | {"hidden_size": 64})
    refused(str(folder / "config.json"), "n_embd is 32", "hidden_size", "64")


def test_a_field_that_transformers_refuses_is_one_line(folder: Path, refused: Callable[..., str]) -> None:
    rewrite(folder, lambda fields: fields | {"resid_pdrop": "0.1"})
    assert "resid_pdrop" in canonical_fields(json.loads((folder / "config.json").read_text()))
    refused(str(folder), "transformers cannot load it", "resid_pdrop")
