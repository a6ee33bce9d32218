"""Linear layers that share a matrix, as a model may have that runs a layer several times."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from cuantiza.core.inputs.corpus import Source, load_splits
from cuantiza.core.onnx import file as onnx_file
from cuantiza.core.run.divergence import compare
from cuantiza.core.run.runtime import Runtime
from cuantiza.quantize.decide.calibrate import calibration_windows
from cuantiza.quantize.layers import decide
from cuantiza.quantize.recipes.registry import StaticInt8
from cuantiza.quantize.rewrite.static import quantize_static
from cuantiza.quantize.settings import Calibration

from helpers import CORPUS, ES_MINI

LITTLE = Calibration(windows=4, tokens=128, minimum=4)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_layers_that_share_a_matrix_have_the_same_integers(es_mini_fp32, tmp_path, rounding):
    """Each has an outlier in another channel, so that none of them may stay in float: its row would be zero for all."""
    windows, text = (calibration_windows(ES_MINI, split, LITTLE) for split in load_splits(Source(str(CORPUS))))

    def shared():
        model = onnx_file.load(es_mini_fp32.model)
        matrix = model.graph.initializers["h.0.mlp.c_fc.weight"]
        for layer, channel in enumerate((3, 70, 90)):
            next(node for node in model.graph if node.name == f"h.{layer}.mlp.c_fc").replace_input_with(1, matrix)
            norm = model.graph.initializers[f"h.{layer}.ln_2.weight"]
            scale = norm.const_value.numpy().copy()
            scale[channel] *= 40
            norm.const_value = ir.tensor(scale, name=norm.name)
        return model

    def logits(model):
        onnx_file.save(model, tmp_path)
        runtime = Runtime(tmp_path / "model.onnx", exact=False)
        return [runtime.forward(window[None])[0, :-1] for window in text]

    exact, losses = logits(shared()), []
    for limit in (0, 16):
        recipe = StaticInt8(rounding, float_channels=limit, calibration=LITTLE, max_error=None)
        decisions = decide(model := shared(), windows, recipe.plan(), tmp_path)
        assert not any(len(decisions[f"h.{layer}.mlp.c_fc"].float_channels) for layer in range(3))
        quantize_static(model, decisions)
        assert [name for name in model.graph.initializers if name.startswith("h.0.mlp.c_fc.weight_int8")] == [
            "h.0.mlp.c_fc.weight_int8"
        ]
        pairs = zip(exact, logits(model), text, strict=True)
        losses.append(np.mean([compare(p, [q], window[1:])[1][1].mean() for p, q, window in pairs]))
    assert losses[1] <= 1.1 * losses[0] < 1, losses
