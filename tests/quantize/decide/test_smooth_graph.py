"""Every linear layer that a norm or a gate precedes is smoothed, in every graph, and the model computes the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from cuantiza.core.inputs.model_config import read_config
from cuantiza.core.onnx import file as onnx_file
from cuantiza.core.run.runtime import Runtime
from cuantiza.export.graphs.architectures import ARCHITECTURES
from cuantiza.quantize.decide import smooth
from cuantiza.quantize.rewrite.find import find_projections

from helpers import tiny_llama

# The layers of olmo2 end in no norm: what is multiplied by the first linear layers is the residual stream itself. In an
# MLP without a gate, an activation precedes the second linear layer, and only a ReLU lets a scale pass.
UNREACHED = {
    "olmo2": {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"},
    "arcee": {"down_proj"},
    "gpt_neo": {"c_proj"},
    "gpt_neox": {"dense_4h_to_h"},
    "phi": {"fc2"},
}
LLAMAS = ["llama", "qwen2", "qwen3", "smollm3", "granite", "gemma3_text", "olmo2", "arcee"]
OWN = {"gpt_neo": {"attention_types": [[["global"], 4]]}, "phi": {"partial_rotary_factor": 0.7}}


def build(kind: str, folder: Path) -> ir.Model:
    tiny_llama(kind, **OWN.get(kind, {})).save_pretrained(folder)
    fields, made = read_config(folder), ARCHITECTURES[kind]
    return made.build(made.parse(fields, folder / "config.json"), made.read(folder, fields).weights, 21, folder)


@pytest.mark.parametrize("kind", [*LLAMAS, "gpt_neo", "gpt_neox", "opt", "phi"])
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


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text", "gpt_neox", "opt", "phi"])
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
