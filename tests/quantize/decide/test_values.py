"""The values of attention are rounded for what attention makes of them."""

import numpy as np
import onnx_ir as ir
import pytest

from cuantiza.core.inputs.corpus import Source, load_splits
from cuantiza.core.inputs.gpt2_config import parse_config
from cuantiza.core.inputs.model_config import read_config
from cuantiza.core.inputs.weights.checkpoint import read_checkpoint
from cuantiza.export.graphs.gpt2 import build
from cuantiza.quantize.decide.blocks import open_block, split
from cuantiza.quantize.decide.calibrate import calibration_windows
from cuantiza.quantize.decide.observations import Moments
from cuantiza.quantize.decide.values import ValueMoments, averaged, find_values
from cuantiza.quantize.settings import Calibration
from cuantiza.quantize.weights.gptq import gptq
from cuantiza.quantize.weights.rounding import Grid

from helpers import CORPUS, ES_MINI


@pytest.fixture(scope="module")
def model():
    return build(parse_config(read_config(ES_MINI), ES_MINI), read_checkpoint(ES_MINI).weights, 21, ES_MINI)


def test_the_values_of_every_layer_are_found(model):
    found = find_values(model.graph)
    assert list(found) == [f"h.{layer}.attn.c_attn" for layer in range(6)]
    assert all(values.channels == slice(512, 768) and not values.repeated for values in found.values())


def test_attention_averages_what_the_values_are_made_of(model, tmp_path):
    """Each head's context is A·(x·W + b) of its channels, so an error in W costs A·x·(Ŵ − W)."""
    values = find_values(model.graph)["h.0.attn.c_attn"]
    window = calibration_windows(ES_MINI, load_splits(Source(str(CORPUS)))[0], Calibration(1, 64, 1))[0]
    names = [values.projection.x.name, values.weights.name, values.context.name]
    x, weights, context = open_block(model, split(model.graph)[0], names, tmp_path)(window, None)
    matrix = values.projection.matrix[:, values.channels]
    bias = values.bias.const_value.numpy()[values.channels]
    heads = context.shape[1]
    width = matrix.shape[1] // heads
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        alone = averaged(x, weights[:, head : head + 1])
        assert np.allclose(alone @ matrix[:, own] + bias[own], context[0, head], atol=1e-4)
    moments = ValueMoments.of(values.channels, x, weights, context, True)
    mean = averaged(x, weights)
    assert np.allclose(moments.averaged.gram, mean.T @ mean, rtol=1e-4, atol=1e-3)
    assert moments.read.sum() <= len(window) and (np.diff(moments.read) != 0).any()


def test_merged_moments_are_those_of_both_windows():
    generator = np.random.default_rng(0)
    x = generator.standard_normal((2, 1, 40, 8)).astype(np.float32)
    weights = generator.dirichlet(np.ones(40), (2, 1, 3, 40)).astype(np.float32)
    context = generator.standard_normal((2, 1, 3, 40, 4)).astype(np.float32)
    one, other = (ValueMoments.of(slice(0, 12), *arrays, True) for arrays in zip(x, weights, context, strict=True))
    merged = one.merge(other)
    assert np.allclose(merged.averaged.gram, one.averaged.gram + other.averaged.gram)
    assert merged.power == pytest.approx(np.square(context).sum(), rel=1e-5) and len(merged.rows) == 64
    scale, shift = np.float32(generator.uniform(0.5, 2, 8)), np.float32(generator.standard_normal(8))
    moved = ValueMoments.of(slice(0, 12), (x[0] - shift) / scale, weights[0], context[0], True)
    assert np.allclose(one.transformed(scale, shift).averaged.gram, moved.averaged.gram, rtol=1e-2, atol=1e-2)


def test_the_value_of_a_sink_is_rounded_best():
    """All positions read the first token, whose value is zero. Rounding for A·x keeps it; rounding for x does not."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((64, 32)).astype(np.float32)
    weight = generator.standard_normal((32, 16)).astype(np.float32)
    weight -= np.outer(x[0], x[0] @ weight) / (x[0] @ x[0])  # so that the value of the first token is zero
    attention = np.full((64, 64), 0.05 / 64, np.float32)
    attention[:, 0] += 0.95
    read = averaged(x, attention[None, None])

    def error(gram):
        return np.linalg.norm(read @ (gptq(weight, gram, Grid(4)).dequantize() - weight))

    plain, weighed = error(Moments.of(x, True).gram), error(Moments.of(read, True).gram)
    assert weighed < 0.3 * plain


def test_attention_without_a_softmax_has_no_values():
    x = ir.val("x", ir.DataType.FLOAT, [1, 4, 8])
    weight = ir.val("w", const_value=ir.tensor(np.eye(8, dtype=np.float32)))
    node = ir.node("MatMul", [x, weight], name="linear")
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 21})
    assert find_values(graph) == {}
