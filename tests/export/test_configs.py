"""Configurations under other names and without a type: the same graph, parity with PyTorch, and every recipe after it."""

from __future__ import annotations

import json
import os
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


def without_type(fields: dict) -> dict:
    return {key: value for key, value in fields.items() if key != "model_type"}


def bare(fields: dict) -> dict:
    return {key: value for key, value in without_type(fields).items() if key != "architectures"}


def floats(fields: dict) -> dict:
    return {key: float(value) if key in ALIASES else value for key, value in fields.items()}


def old_length(fields: dict) -> dict:
    return {"n_ctx" if key == "n_positions" else key: value for key, value in fields.items()}


def sw3(fields: dict) -> dict:
    return fields | {"model_type": "gpt-sw3"}


SPELLINGS = [by_aliases, without_type, bare, floats, old_length, sw3]


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.__name__)
def test_another_spelling_is_the_same_artifact(
    exported: Callable[..., Artifact], make_gpt2: Callable[..., Path], spelling: Callable[[dict], dict]
) -> None:
    usual, folder = exported(make_gpt2("usual")), make_gpt2("other")
    rewrite(folder, spelling)
    artifact = exported(folder)
    assert artifact.manifest.files["model.onnx"] == usual.manifest.files["model.onnx"]
    fields, wanted = (json.loads((made.path / "config.json").read_text()) for made in (artifact, usual))
    assert {key: value for key, value in fields.items() if key in wanted} == {
        key: value for key, value in wanted.items() if key in fields
    }
    assert all(fields[key] == wanted[key] for key in (*ALIASES, "model_type"))
    told = artifact.manifest.details.get("warnings", [])
    assert bool(told) == (spelling in (without_type, bare, sw3)) and all("gpt2" in line for line in told)


@pytest.mark.parametrize("spelling", [by_aliases, bare], ids=lambda spelling: spelling.__name__)
def test_the_rows_of_pytorch_load_it(make_gpt2: Callable[..., Path], spelling: Callable[[dict], dict]) -> None:
    from cuantiza.eval.measure.torch_engine import TorchRuntime

    usual, folder = make_gpt2("usual"), make_gpt2("other")
    rewrite(folder, spelling)
    ids = np.array([[0, 5, 6, 7]])
    wanted, found = (TorchRuntime(path, 1, quantized=False).forward(ids) for path in (usual, folder))
    np.testing.assert_array_equal(found, wanted)


def test_onnxruntimes_tools_read_its_sizes(
    exported: Callable[..., Artifact], make_gpt2: Callable[..., Path], tmp_path: Path
) -> None:
    from cuantiza.quantize.rewrite.onnxruntime_tools import ort_dynamic

    folder = make_gpt2("aliases")
    rewrite(folder, by_aliases)
    artifact, here = exported(folder), os.getcwd()
    try:
        ort_dynamic(artifact.model, tmp_path)
    finally:
        os.chdir(here)
    assert (tmp_path / "model.onnx").stat().st_size < artifact.model.stat().st_size


def test_two_names_that_contradict_each_other(folder: Path, refused: Callable[..., str]) -> None:
    rewrite(folder, lambda fields: fields | {"hidden_size": 64})
    refused(str(folder / "config.json"), "n_embd is 32", "hidden_size", "64")


def test_a_field_that_transformers_refuses_is_one_line(folder: Path, refused: Callable[..., str]) -> None:
    rewrite(folder, lambda fields: fields | {"resid_pdrop": "0.1"})
    assert "resid_pdrop" in canonical_fields(json.loads((folder / "config.json").read_text()))
    refused(str(folder), "transformers cannot load it", "resid_pdrop")
