"""Static int8 as QDQ: the range of every activation is fixed from the calibration split.

A range over a massive activation would leave the others a handful of steps. The few input channels that carry
such ones are taken out of the integer product, and their share is added in floating point.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from quantize.graph import clean, constant, replace_node
from quantize.plan import Site
from quantize.rewrite import Weights, begin
from quantize.sites import Embedding, Projection


def quantize_static(model: ir.Model, sites: dict[str, Site]) -> tuple[list[Projection], list[Embedding]]:
    """Rewrite `model` in place, in standard operators; returns what was quantized.

    `sites` holds the decision on projections by their name, with `PerTensor` activations; a projection without
    one stays in floating point, and so does a look-up that shares its table.
    """
    graph = model.graph
    weights, projections, embeddings = begin(graph, sites)
    for projection in projections:
        _rewrite(graph, weights, projection, sites[projection.name])
    clean(model)
    return projections, embeddings


def _rewrite(graph: ir.Graph, weights: Weights, projection: Projection, site: Site) -> None:
    """x [.., K] · W [K, N]  ->  DQ(Q(x)) · DQ(s8(W)), which runtimes turn into one integer product.

    Channels that are taken out are rows of zeros in s8(W), so that it does not matter how Q clips them.
    """
    tape = ir.tape.Tape()
    x = projection.node.inputs[0]  # which an earlier rewrite may have replaced
    scale, zero_point = site.activation.parameters
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
    if len(site.float_channels):
        name = projection.weight.name
        channels = constant(graph, f"{name}_float_channels", site.float_channels.astype(np.int64))
        picked = tape.op("Gather", [x, channels], {"axis": -1})  # [.., k]
        result = tape.op(
            "Add", [result, tape.op("MatMul", [picked, constant(graph, f"{name}_float_rows", site.float_rows)])]
        )
    replace_node(graph, projection.node, tape, result)
