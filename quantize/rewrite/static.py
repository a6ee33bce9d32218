"""Static int8 as QDQ: the range of every activation is fixed in advance, from the calibration split.

If a range had to cover massive activations, all other values would share a handful of steps. So the few outlier
channels that carry massive activations are left out of the int8 matmul and are multiplied in floating point instead.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from cuantiza.quantize.decide.activation import PerTensor
from cuantiza.quantize.decide.decision import Decision
from cuantiza.quantize.rewrite.edit import clean, constant, replace_matmuls
from cuantiza.quantize.rewrite.find import Embedding, Projection
from cuantiza.quantize.rewrite.fuse_attention import ORT
from cuantiza.quantize.rewrite.int8 import add_residual, group, prepare_int8, quantize_twice
from cuantiza.quantize.settings import Target


def quantize_static(
    model: ir.Model, decisions: dict[str, Decision], target: Target = "portable"
) -> tuple[list[Projection], list[Embedding]]:
    """Quantize `model` in place; return the linear layers and embeddings that were quantized.

    `decisions` maps the names of linear layers to decisions with `PerTensor` activations. A linear layer without a
    decision stays in floating point, and so does an embedding that shares its matrix. The target `portable` uses
    standard operators, which ONNX Runtime fuses at load except for the bias. The target `ort` uses
    MatMulIntegerToFloat, which adds the bias as well.
    """
    graph = model.graph
    weights, projections, embeddings = prepare_int8(graph, decisions)
    for same in group(projections, decisions, target):
        projection = same[0]
        decision, tape = decisions[projection.name], ir.tape.Tape()
        x = projection.node.inputs[0]  # not projection.x, which an earlier rewrite may have replaced
        activation = decision.activation
        assert isinstance(activation, PerTensor), f"{projection.name} has no fixed range"
        scale, zero_point = activation.parameters
        suffix = "" if activation.bits == 8 else "_16"
        parameters = [
            constant(graph, f"{x.name}_scale{suffix}", scale),
            constant(graph, f"{x.name}_zero_point{suffix}", zero_point),
        ]
        weight, weight_scale = weights.get_columns(tape, same)
        multiply = _multiply_portable if target == "portable" else _multiply_ort
        if activation.bits == 16:
            quantized = quantize_twice(graph, tape, x, *activation.parameters)
            result = add_residual(graph, tape, multiply(tape, quantized, parameters, weight, weight_scale, None))
            result = result if projection.bias is None else tape.op("Add", [result, projection.bias])
        else:
            quantized = tape.op("QuantizeLinear", [x, *parameters])
            result = multiply(tape, quantized, parameters, weight, weight_scale, projection.bias)  # [.., N]
        if len(decision.float_channels):
            rows = np.concatenate([decisions[each.name].float_rows for each in same], axis=1)
            result = _add_float_channels(graph, tape, result, x, projection.weight.name, decision.float_channels, rows)
        replace_matmuls(graph, [each.node for each in same], [each.channels for each in same], tape, result)
    if target == "ort":
        graph.opset_imports[ORT] = 1
    clean(model)
    return projections, embeddings


def _multiply_portable(
    tape: ir.tape.Tape,
    quantized: ir.Value,
    parameters: list[ir.Value],
    weight: ir.Value,
    weight_scale: ir.Value,
    bias: ir.Value | None,
) -> ir.Value:
    """Add DQ(Q(x)) · DQ(s8(W)) + bias [.., N], which runtimes fuse into one integer matmul."""
    restored = tape.op("DequantizeLinear", [quantized, *parameters])
    # The zero point of W is 0 and is left out, because several matmuls would share it: with
    # session.x64quantprecision, ONNX Runtime cannot load such a model.
    result = tape.op("MatMul", [restored, tape.op("DequantizeLinear", [weight, weight_scale], {"axis": 1})])
    return result if bias is None else tape.op("Add", [result, bias])


def _multiply_ort(
    tape: ir.tape.Tape,
    quantized: ir.Value,
    parameters: list[ir.Value],
    weight: ir.Value,
    weight_scale: ir.Value,
    bias: ir.Value | None,
) -> ir.Value:
    scale, zero_point = parameters
    inputs = [quantized, weight, scale, weight_scale, zero_point, None, bias]
    return tape.op("MatMulIntegerToFloat", inputs, domain=ORT)


def _add_float_channels(
    graph: ir.Graph,
    tape: ir.tape.Tape,
    result: ir.Value,
    x: ir.Value,
    name: str,
    channels: np.ndarray,
    rows: np.ndarray,
) -> ir.Value:
    """Add the matmul of the float `channels` [k] with their `rows` [k, N] of the weight to `result` [.., N].

    The rows of s8(W) for these channels are zero, so it does not matter how Q clips them.
    """
    which = constant(graph, f"{name}_float_channels", channels.astype(np.int64))
    picked = tape.op("Gather", [x, which], {"axis": -1})  # [.., k]
    return tape.op("Add", [result, tape.op("MatMul", [picked, constant(graph, f"{name}_float_rows", rows)])])
