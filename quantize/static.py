"""Static int8 as QDQ: the range of every activation is fixed from the calibration split."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from quantize.calibrate import Range
from quantize.int8 import activation_parameters
from quantize.rewrite import Weights, clean, constant, quantize_embeddings, replace_node
from quantize.sites import Embedding, Projection, find_projections


def quantize_static(model: ir.Model, ranges: dict[str, Range]) -> tuple[list[Projection], list[Embedding]]:
    """Rewrite `model` in place, in standard operators; returns what was quantized.

    `ranges` holds the range of the input of every projection by the name of its value.
    """
    graph, weights = model.graph, Weights(model.graph)
    embeddings = quantize_embeddings(graph, weights)
    projections = find_projections(graph)
    for projection in projections:
        _rewrite(graph, weights, projection, ranges[projection.x.name])
    clean(model)
    return projections, embeddings


def _rewrite(graph: ir.Graph, weights: Weights, projection: Projection, measured: Range) -> None:
    """x [.., K] · W [K, N]  ->  DQ(Q(x)) · DQ(s8(W)), which runtimes turn into one integer product."""
    tape = ir.tape.Tape()
    x = projection.node.inputs[0]  # which an earlier rewrite may have replaced
    scale, zero_point = activation_parameters(measured.low, measured.high)
    parameters = [
        constant(graph, f"{x.name}_scale", scale),
        constant(graph, f"{x.name}_zero_point", zero_point),
    ]
    restored = tape.op("DequantizeLinear", [tape.op("QuantizeLinear", [x, *parameters]), *parameters])
    weight, weight_scale = weights.get_columns(tape, projection)
    zeros = constant(graph, f"zeros_{weight_scale.shape[0]}", np.zeros(weight_scale.shape[0], np.int8))
    result = tape.op(
        "MatMul", [restored, tape.op("DequantizeLinear", [weight, weight_scale, zeros], {"axis": 1})]
    )  # [.., N]
    if projection.bias is not None:
        result = tape.op("Add", [result, projection.bias])
    replace_node(graph, projection.node, tape, result)
