"""Every linear layer of the graph of a Llama is smoothed, and the model computes the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from cuantiza.core.inputs.model_config import read_config
from cuantiza.core.inputs.weights.checkpoint import read_by_names
from cuantiza.core.onnx import file as onnx_file
from cuantiza.core.run.runtime import Runtime
from cuantiza.export.graphs import llama, llama_weights
from cuantiza.export.graphs.llama_config import parse_llama
from cuantiza.quantize.decide import smooth
from cuantiza.quantize.rewrite.find import find_projections

from helpers import tiny_llama

# Their layers end in no norm: what is multiplied by the first linear layers is the residual stream itself.
UNREACHED = {"olmo2": {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}, "arcee": {"down_proj"}}


def build(kind: str, folder: Path) -> ir.Model:
    tiny_llama(kind).save_pretrained(folder)
    fields = read_config(folder)
    weights = read_by_names(folder, fields, llama_weights.EMBEDDING).weights
    return llama.build(parse_llama(fields, folder / "config.json"), weights, 21, folder)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "smollm3", "granite", "gemma3_text", "olmo2", "arcee"])
def test_linear_layers_are_smoothed(kind: str, tmp_path: Path) -> None:
    model = build(kind, tmp_path)
    reached = {layer.name for group in smooth.find_groups(model.graph).values() for layer in group.projections}
    missed = {layer.name for layer in find_projections(model.graph)} - reached
    assert {name.rpartition(".")[2] for name in missed} == UNREACHED.get(kind, set())


def test_heads_that_share_values_share_scales(tmp_path: Path) -> None:
    groups = smooth.find_groups(build("llama", tmp_path).graph)
    sources = [group.source for group in groups.values() if group.source is not None]
    # 4 heads of 6 channels: heads 0 and 1 read the first head of the values, heads 2 and 3 the second.
    wanted = np.arange(12).reshape(2, 1, 6).repeat(2, axis=1).ravel()
    assert len(sources) == 4 and all(np.array_equal(source, wanted) for source in sources)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text"])
def test_the_model_computes_the_same(kind: str, tmp_path: Path) -> None:
    model, random = build(kind, tmp_path), np.random.default_rng(0)
    ids = random.integers(0, 8192, (1, 20))
    onnx_file.save(model, tmp_path)
    before = Runtime(tmp_path / "model.onnx").forward(ids)
    for group in smooth.find_groups(model.graph).values():
        count = group.projections[0].matrix.shape[0]
        scale = group.shared(random.uniform(0.5, 2, count).astype(np.float32))
        shift = random.normal(size=count).astype(np.float32) * (group.shift is not None)
        smooth.apply(model.graph, group, smooth.Smoothing(scale, shift, 0.5))
    onnx_file.save(model, tmp_path)
    np.testing.assert_allclose(Runtime(tmp_path / "model.onnx").forward(ids), before, atol=2e-4)
