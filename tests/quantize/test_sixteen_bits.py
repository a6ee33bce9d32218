"""Activations of 16 bits: two uint8 tensors, of which the second holds what the first rounds away."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from cuantiza.core.inputs.corpus import Source, load_splits
from cuantiza.core.inputs.gpt2_config import parse_config
from cuantiza.core.inputs.model_config import read_config
from cuantiza.core.inputs.weights.checkpoint import read_checkpoint
from cuantiza.core.onnx import file as onnx_file
from cuantiza.core.run.runtime import Runtime, open_session
from cuantiza.export.graphs.gpt2 import build
from cuantiza.quantize.decide.activation import RESIDUAL_STEPS, PerRow, PerTensor
from cuantiza.quantize.decide.calibrate import calibration_windows
from cuantiza.quantize.decide.decision import Decision
from cuantiza.quantize.layers import decide
from cuantiza.quantize.recipes.int8_dynamic import DynamicInt8
from cuantiza.quantize.rewrite.dynamic import quantize_dynamic
from cuantiza.quantize.rewrite.fuse_attention import fuse_attention
from cuantiza.quantize.rewrite.int8 import Weights
from cuantiza.quantize.rewrite.static import quantize_static
from cuantiza.quantize.settings import Calibration
from cuantiza.quantize.weights.rounding import PAIR_LIMIT, Grid, round_to_nearest

from helpers import CORPUS, ES_MINI


@pytest.fixture
def x():
    """Tokens [2, 5, 32] with one massive value, which makes the steps of its token coarse."""
    values = np.random.default_rng(0).standard_normal((2, 5, 32)).astype(np.float32)
    values[1, 2, 7] = 300
    return values


def test_a_token_is_within_half_a_fine_step(x):
    rows = x.reshape(-1, 32)
    step = np.abs(rows).max(axis=1, keepdims=True) / 127
    coarse, fine = (np.abs(PerRow(bits=bits).restore(rows) - rows) for bits in (8, 16))
    assert (coarse <= step / 2 * 1.001).all() and (fine <= step / RESIDUAL_STEPS / 2 * 1.01).all()
    assert coarse.max() > 100 * fine.max()


def test_a_fixed_range_is_within_half_a_fine_step_up_to_twice_what_was_seen(x):
    largest = float(np.abs(x).max())
    activation = PerTensor.of_16_bits(largest)
    scale, zero = activation.parameters
    assert zero == 128
    for factor in (1.0, 2.0):
        error = np.abs(activation.restore(factor * x.reshape(-1, 32)) - factor * x.reshape(-1, 32))
        assert error.max() <= scale / RESIDUAL_STEPS / 2 * 1.01
    assert activation.restore(np.float32([[4 * largest]]))[0, 0] == pytest.approx(2 * largest, rel=0.02)


def quantized(x, activation, target, folder, bias):
    """The output of a linear layer whose activations have 16 bits, and what it should be."""
    generator = np.random.default_rng(1)
    weight, vector = (generator.standard_normal(shape).astype(np.float32) for shape in ((32, 16), (16,)))
    constants = [ir.val(name, const_value=ir.tensor(array)) for name, array in (("w", weight), ("b", vector))]
    source = ir.val("input_ids", ir.DataType.FLOAT, ["batch", "tokens", 32])  # a name that gives the number of rows
    output = ir.val("y", ir.DataType.FLOAT, ["batch", "tokens", 16])
    result = ir.val("product") if bias else output
    nodes = [ir.node("MatMul", [source, constants[0]], outputs=[result], name="linear")]
    if bias:
        nodes.append(ir.node("Add", [result, constants[1]], outputs=[output]))
    graph = ir.Graph([source], [output], nodes=nodes, initializers=constants, opset_imports={"": 21}, name="small")
    model = ir.Model(graph, ir_version=10)
    rounded = round_to_nearest(weight, Grid(8))
    decision = Decision(rounded, activation, np.zeros(0, int), np.zeros((0, 16), np.float32))
    rewrite = quantize_dynamic if isinstance(activation, PerRow) else quantize_static
    rewrite(model, {"linear": decision}, target)
    onnx_file.save(model, folder)
    found = open_session(folder / "model.onnx").run(["y"], {"input_ids": x})[0]
    restored = activation.restore(x.reshape(-1, 32)).reshape(x.shape)
    return found, restored @ rounded.dequantize() + (vector if bias else 0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("target", ["portable", "ort"])
@pytest.mark.parametrize(
    ("activation", "size"),
    [
        (PerRow(bits=16), 1),
        (PerTensor(-600, 600, 16), 1),
        (PerRow(bits=16), 2**13),
        (PerRow(bits=16, exponent=8), 2**13),
    ],
    ids=["row", "tensor", "row-clipped", "row-with-exponent"],
)
def test_the_graph_computes_what_restore_says(x, activation, size, target, bias, tmp_path):
    """Where `size` is 2^13, one value is 2,457,600, which is clipped to 65,504 unless an exponent makes room for it."""
    x = (x * size).astype(np.float32)
    found, wanted = quantized(x, activation, target, tmp_path, bias)
    # A token's scale is rounded to fp16 in the graph, which moves the fine integers by one at most.
    assert np.abs(found - wanted).max() < 2e-5 * np.abs(wanted).max()


def test_both_targets_compute_the_same_bits(x, tmp_path):
    portable, fused = (quantized(x, PerRow(bits=16), target, tmp_path, False)[0] for target in ("portable", "ort"))
    assert np.array_equal(portable, fused)


@pytest.mark.parametrize("fine", ["none", "h.5.mlp.c_fc", "h."])
def test_a_prompt_in_the_cache_gives_the_logits_of_its_last_token(fine, tmp_path):
    """In the `-ort` form, where the last layer computes one token only, and some or all of its layers have 16 bits."""
    model = build(parse_config(read_config(ES_MINI), ES_MINI), read_checkpoint(ES_MINI).weights, 21, ES_MINI)
    calibration = Calibration(1, 64, 1)
    windows = calibration_windows(ES_MINI, load_splits(Source(str(CORPUS)))[0], calibration)
    plan = DynamicInt8("nearest", (), calibration, max_error=None).plan()
    decisions = {
        name: replace(decision, activation=PerRow(bits=16 if name.startswith(fine) else 8))
        for name, decision in decide(model, windows, plan, tmp_path).items()
    }
    quantize_dynamic(model, decisions, "ort")
    fuse_attention(model, 1024)
    onnx_file.save(model, tmp_path)
    runtime = Runtime(tmp_path / "model.onnx")
    whole, cache = runtime.forward(windows)[:, -1], runtime.cache(1, 128)
    assert np.abs(runtime.step(cache, windows).reshape(whole.shape) - whole).max() < 1e-3


def test_a_matrix_that_is_multiplied_keeps_its_sums_within_16_bits_wherever_it_is_rounded():
    """A head that is not recognized as one is rounded with its embedding (a Cast after the logits of another exporter)."""
    table = np.random.default_rng(0).standard_normal((300, 64)).astype(np.float32)
    for multiplied, axis in ((True, 0), (True, 1), (False, 0)):
        matrix = ir.val("table", const_value=ir.tensor(table))
        graph = ir.Graph([], [], nodes=[], initializers=[matrix], opset_imports={"": 21})
        q, _ = Weights(graph, {matrix} if multiplied else set()).get(matrix, axis)
        integers = q.const_value.numpy().astype(int)
        pairs = (integers.T if axis == 0 else integers).reshape(-1, 2, len(table) if axis == 0 else 64).sum(axis=1)
        assert (np.abs(pairs).max() <= PAIR_LIMIT) == multiplied
