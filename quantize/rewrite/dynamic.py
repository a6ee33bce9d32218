"""Dynamic int8: the graph computes the scales of the activations at run time, one scale per token.

Each row of an activation is one token of one sequence. Because it has a scale of its own, its result depends neither on
the rest of the batch nor on whether the KV cache is used, and one massive activation makes only its own row coarser.

Scales are rounded to fp16, because the kernel for one token and the kernel for many differ in the last bit of a float.
A scale that kept this bit would move some values to the next integer, more of them in every layer. Measured on es-mini,
24 windows of 128 tokens, with the KV cache against without: the rounding lowers the mean |Δ logit| from 0.025 to 0.006,
13 windows instead of none agree to the last digits (tests/quantize/test_invariance.py), and quality is the same.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from cuantiza.quantize.decide.activation import LARGEST_MAX, LARGEST_MIN, PerRow
from cuantiza.quantize.decide.decision import Decision
from cuantiza.quantize.rewrite.edit import clean, constant, replace_matmuls
from cuantiza.quantize.rewrite.find import Embedding, Projection
from cuantiza.quantize.rewrite.fuse_attention import ORT
from cuantiza.quantize.rewrite.int8 import add_residual, group, prepare_int8, quantize_twice
from cuantiza.quantize.settings import BLOCKS_OPSET, Target


def quantize_dynamic(
    model: ir.Model, decisions: dict[str, Decision], target: Target = "portable"
) -> tuple[list[Projection], list[Embedding]]:
    """Quantize `model` in place; return the linear layers and embeddings that were quantized.

    `decisions` maps the names of linear layers to decisions with `PerRow` activations. A linear layer without a
    decision stays in floating point, and so does an embedding that shares its matrix. The target `portable` uses
    standard operators. The target `ort` computes the same integers in fewer passes, with MatMulIntegerToFloat (ONNX
    Runtime's docs/ContribOperators.md).
    """
    graph = model.graph
    weights, projections, embeddings = prepare_int8(graph, decisions)
    row_zero_points = _RowZeroPoints(graph)
    one = constant(graph, "scale_one", np.float32(1))
    for same in group(projections, decisions, target):
        projection, tape = same[0], ir.tape.Tape()
        x = projection.node.inputs[0]  # not projection.x, which an earlier rewrite may have replaced
        activation = decisions[projection.name].activation
        assert isinstance(activation, PerRow), f"{projection.name} has no scale per token"
        zero = activation.zero_point
        zero_point = constant(graph, f"zero_point_{zero}", np.uint8(zero))
        row_scale = _row_scale(graph, tape, x, activation)
        weight, weight_scale = weights.get_columns(tape, same)
        # Both targets compute (u8(x / s) − zero) · s8(W) · scale(W) and multiply by s last. The order of the float
        # multiplications has to be the same for their results to be equal.
        multiply = _multiply_portable if target == "portable" else _multiply_ort
        if activation.bits == 16:
            quantized = quantize_twice(graph, tape, tape.op("Div", [x, row_scale]), np.float32(1), np.uint8(zero))
            matmul = add_residual(graph, tape, multiply(tape, quantized, zero_point, weight, weight_scale, one))
        else:
            if target == "portable" or graph.opset_imports[""] < BLOCKS_OPSET:
                quantized = tape.op("QuantizeLinear", [tape.op("Div", [x, row_scale]), one, zero_point])
            else:
                # Blocked quantization (opset 21), with each row as one block, makes one pass over x where Div and
                # QuantizeLinear make two. It needs a zero point for each block.
                block = {"axis": -1, "block_size": projection.matrix.shape[0]}
                quantized = tape.op("QuantizeLinear", [x, row_scale, row_zero_points.get(x, zero_point)], block)
            matmul = multiply(tape, quantized, zero_point, weight, weight_scale, one)
        result = tape.op("Mul", [matmul, row_scale])  # [.., N]
        if projection.bias is not None:
            result = tape.op("Add", [result, projection.bias])
        replace_matmuls(graph, [each.node for each in same], [each.channels for each in same], tape, result)
    if target == "ort":
        graph.opset_imports[ORT] = 1
    clean(model)
    return projections, embeddings


def _multiply_portable(
    tape: ir.tape.Tape, quantized: ir.Value, zero: ir.Value, weight: ir.Value, scale: ir.Value, one: ir.Value
) -> ir.Value:
    """Add (quantized − zero) · weight · scale [.., N] in standard operators."""
    matmul = tape.op("MatMulInteger", [quantized, weight, zero])
    return tape.op("Mul", [tape.op("Cast", [matmul], {"to": ir.DataType.FLOAT}), scale])


def _multiply_ort(
    tape: ir.tape.Tape, quantized: ir.Value, zero: ir.Value, weight: ir.Value, scale: ir.Value, one: ir.Value
) -> ir.Value:
    """Add the same as `_multiply_portable` in one operator of ONNX Runtime; `one` is the scale of `quantized`."""
    return tape.op("MatMulIntegerToFloat", [quantized, weight, one, scale, zero], domain=ORT)


def _row_scale(graph: ir.Graph, tape: ir.tape.Tape, x: ir.Value, activation: PerRow) -> ir.Value:
    """Add the nodes that compute a scale s [.., 1] for each row of x [.., K], such that x / s + zero fits uint8.

    The scale follows from the largest magnitude of the row, which is rounded to fp16.
    """
    zero, exponent = activation.zero_point, activation.exponent
    last = constant(graph, "axis_last", np.array([-1], np.int64))
    levels = 127 if zero == 128 else 255 - zero
    if zero == 128:
        largest = tape.op("ReduceMax", [tape.op("Abs", [x]), last])
    else:
        # Negative values have only `zero` levels where positive ones have `levels`, so they need a scale that is
        # larger by the ratio of the two.
        weight = constant(graph, f"levels_{levels}_over_{zero}", np.float32(-levels / zero))
        below = tape.op("Mul", [tape.op("ReduceMin", [x, last]), weight])
        largest = tape.op("Max", [tape.op("ReduceMax", [x, last]), below])
    if exponent:
        small = constant(graph, f"two_to_{-exponent}", np.float32(2.0**-exponent))
        largest = tape.op("Mul", [largest, small])
    # The lower limit also gives a row of zeros a positive scale, with which it stays zero.
    largest = tape.op(
        "Clip", [largest, constant(graph, "largest_min", LARGEST_MIN), constant(graph, "largest_max", LARGEST_MAX)]
    )
    largest = tape.op("Cast", [tape.op("Cast", [largest], {"to": ir.DataType.FLOAT16})], {"to": ir.DataType.FLOAT})
    name = f"one_over_{levels}" + (f"_times_two_to_{exponent}" if exponent else "")
    return tape.op("Mul", [largest, constant(graph, name, np.float32(2.0**exponent / levels))])


class _RowZeroPoints:
    """Zero points repeated for each row, made once for all values that have the same number of rows."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[ir.Value, ir.Value], ir.Value] = {}

    def get(self, x: ir.Value, zero_point: ir.Value) -> ir.Value:
        """Return `zero_point` as uint8 [B, T, 1], one for each row of x [B, T, K]."""
        source = self._source_of_rows(x)
        if (source, zero_point) not in self._made:
            tape, one = ir.tape.Tape(), constant(self._graph, "one", np.array([1], np.int64))
            shape = tape.op("Concat", [tape.op("Shape", [source], {"end": 2}), one], {"axis": 0})
            self._made[source, zero_point] = tape.op("Expand", [zero_point, shape])
            if source.producer() is None:
                self._graph.insert_before(self._graph[0], tape.nodes)
            else:
                self._graph.insert_after(source.producer(), tape.nodes)
        return self._made[source, zero_point]

    def _source_of_rows(self, x: ir.Value) -> ir.Value:
        """Return a value with as many rows as x: input_ids, or the output of the Slice that keeps the last tokens.

        In a part of a graph that does not read input_ids, it is the part's own input.
        """
        node = x.producer()
        while node is not None and node.op_type not in ("Slice", "Gather"):
            x, node = node.inputs[0], node.inputs[0].producer()
        if node is not None and node.op_type == "Slice":
            return x
        return next((value for value in self._graph.inputs if value.name == "input_ids"), x)
