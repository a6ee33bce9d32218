"""Smoothing of Llama-shaped layers, as exporters write them: after RMSNorm, through a gate, through grouped heads."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from cuantiza.quantize.decide import smooth

WIDTH, HEADS, KEPT, HEAD, INNER = 8, 4, 2, 2, 12
RMS_NORM = {
    "decomposed": """
        square_NAME = Mul(INPUT, INPUT)
        mean_NAME = ReduceMean <keepdims=1> (square_NAME, last)
        safe_NAME = Add(mean_NAME, epsilon)
        root_NAME = Sqrt(safe_NAME)
        inverse_NAME = Reciprocal(root_NAME)
        unit_NAME = Mul(INPUT, inverse_NAME)
        NAME = Mul(scale_NAME, unit_NAME)
    """,
    "one_node": "NAME = RMSNormalization <axis=-1, epsilon=0.00001> (INPUT, scale_NAME)",
}
LAYER = """
    <ir_version: 10, opset_import: ["" : 23]>
    layer (float[1, t, 8] x, float[1, 2, p, 2] past) => (float[1, t, 8] y)
    {
        NORM_attention
        value = MatMul(attention, v)
        value_parts = Reshape(value, parted)
        value_heads = Transpose <perm=[0, 2, 1, 3]> (value_parts)
        cached = Concat <axis=2> (past, value_heads)
        apart = Unsqueeze(cached, two)
        copied = Expand(apart, repeated)
        repeated_heads = Reshape(copied, heads)
        weights = Slice(mix, zero, lengths, axes)
        mixed = MatMul(weights, repeated_heads)
        turned = Transpose <perm=[0, 2, 1, 3]> (mixed)
        context = Reshape(turned, whole)
        projected = MatMul(context, o)
        middle = Add(x, projected)
        NORM_mlp
        gated = MatMul(mlp, gate)
        shape_of_it = Shape(mlp)
        sigmoid = Sigmoid(gated)
        swish = Mul(gated, sigmoid)
        lifted = MatMul(mlp, up)
        product = Mul(swish, lifted)
        lowered = MatMul(product, down)
        y = Add(middle, lowered)
    }
"""
TOKENS = 5


def layer(norm: str, seed: int = 0) -> ir.Model:
    """One layer [1, T, 8] with random weights; its attention weights are constants, since smoothing leaves them alone."""
    random = np.random.default_rng(seed)
    text = LAYER
    for name, source in (("attention", "x"), ("mlp", "middle")):
        text = text.replace(f"NORM_{name}", RMS_NORM[norm].replace("NAME", name).replace("INPUT", source))
    model = onnx.parser.parse_model(text)
    floats = {
        "scale_attention": (WIDTH,),
        "scale_mlp": (WIDTH,),
        "v": (WIDTH, KEPT * HEAD),
        "o": (HEADS * HEAD, WIDTH),
        "gate": (WIDTH, INNER),
        "up": (WIDTH, INNER),
        "down": (INNER, WIDTH),
        "mix": (1, HEADS, TOKENS, TOKENS),
    }
    constants = {name: random.normal(size=shape).astype(np.float32) for name, shape in floats.items()}
    constants |= {"epsilon": np.float32([1e-5])}
    integers = {"last": [-1], "two": [2], "zero": [0], "lengths": [TOKENS], "axes": [2], "whole": [1, -1, HEADS * HEAD]}
    integers |= {"parted": [1, -1, KEPT, HEAD], "repeated": [1, KEPT, HEADS // KEPT, TOKENS, HEAD]}
    integers |= {"heads": [1, HEADS, TOKENS, HEAD]}
    constants |= {name: np.array(value, np.int64) for name, value in integers.items()}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    return ir.from_proto(model)


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x, "past": np.zeros((1, KEPT, 0, HEAD), np.float32)})[0]


@pytest.mark.parametrize("norm", RMS_NORM)
def test_all_inputs_of_linear_layers_are_found(norm: str) -> None:
    groups = smooth.find_groups(layer(norm).graph)
    taken = {name: [value.name for value, _ in group.scales] for name, group in groups.items()}
    assert taken == {"attention": ["scale_attention"], "context": ["v"], "mlp": ["scale_mlp"], "product": ["up"]}
    assert all(group.shift is None for group in groups.values())  # there is no bias that could take it


@pytest.mark.parametrize("norm", RMS_NORM)
def test_the_layer_computes_the_same(norm: str) -> None:
    model, random = layer(norm), np.random.default_rng(1)
    x = random.normal(size=(1, TOKENS, WIDTH)).astype(np.float32)
    before = run(model, x)
    for group in smooth.find_groups(model.graph).values():
        count = group.projections[0].matrix.shape[0]
        scale = group.shared(random.uniform(0.1, 10, count).astype(np.float32))
        smooth.apply(model.graph, group, smooth.Smoothing(scale, np.zeros(count, np.float32), 0.5))
    np.testing.assert_allclose(run(model, x), before, rtol=1e-4, atol=1e-4)


def test_heads_that_share_their_values_share_their_scales() -> None:
    group = smooth.find_groups(layer("decomposed").graph)["context"]
    # Heads 0 and 1 read the first head of the values, heads 2 and 3 the second.
    assert group.source.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert group.shared(np.arange(8.0)).tolist() == [2, 3, 2, 3, 6, 7, 6, 7]


@pytest.mark.parametrize("other", ["down", "up"])
def test_a_weight_that_another_node_reads_takes_no_scale(other: str) -> None:
    """A second reader of the up-projection would see other values; one of the down-projection would lose its scale."""
    model = layer("decomposed")
    weight = model.graph.initializers[other]
    copy = ir.node("Identity", [weight])
    model.graph.append(copy)
    model.graph.outputs.append(copy.outputs[0])
    assert "product" not in smooth.find_groups(model.graph)
