"""Static int8 as QDQ: the range of every activation is fixed from the calibration split.

A range over a massive activation would leave the others a handful of steps. The few input channels that carry
such ones are taken out of the integer product, and their share is added in floating point.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from cuantiza.quantize.decide.decision import Site
from cuantiza.quantize.rewrite.edit import clean, constant, replace_node
from cuantiza.quantize.rewrite.find import Embedding, Projection
from cuantiza.quantize.rewrite.fuse_attention import ORT
from cuantiza.quantize.rewrite.shared_weights import begin
from cuantiza.quantize.settings import Target


def quantize_static(
    model: ir.Model, sites: dict[str, Site], target: Target = "portable"
) -> tuple[list[Projection], list[Embedding]]:
    """Rewrite `model` in place; returns what was quantized.

    `sites` holds the decision on projections by their name, with `PerTensor` activations; a projection without
    one stays in floating point, and so does a look-up that shares its table. `portable` is standard operators,
    which ONNX Runtime fuses at load but for the biases; `ort` has those in the product.
    """
    graph = model.graph
    weights, projections, embeddings = begin(graph, sites)
    for projection in projections:
        site, tape = sites[projection.name], ir.tape.Tape()
        x = projection.node.inputs[0]  # which an earlier rewrite may have replaced
        scale, zero_point = site.activation.parameters
        parameters = [constant(graph, f"{x.name}_scale", scale), constant(graph, f"{x.name}_zero_point", zero_point)]
        quantized = tape.op("QuantizeLinear", [x, *parameters])
        weight, weight_scale = weights.get_columns(tape, projection)
        multiply = _multiply_portable if target == "portable" else _multiply_ort
        result = multiply(graph, tape, quantized, parameters, weight, weight_scale, projection.bias)  # [.., N]
        if len(site.float_channels):
            result = _add_float_channels(graph, tape, result, x, projection.weight.name, site)
        replace_node(graph, projection.node, tape, result)
    if target == "ort":
        graph.opset_imports[ORT] = 1
    clean(model)
    return projections, embeddings


def _multiply_portable(
    graph: ir.Graph,
    tape: ir.tape.Tape,
    quantized: ir.Value,
    parameters: list[ir.Value],
    weight: ir.Value,
    weight_scale: ir.Value,
    bias: ir.Value | None,
) -> ir.Value:
    """DQ(Q(x)) · DQ(s8(W)) + bias [.., N], which runtimes turn into one integer product."""
    restored = tape.op("DequantizeLinear", [quantized, *parameters])
    # Without a zero point, which is 0: ONNX Runtime's session.x64quantprecision does not load one that products share.
    result = tape.op("MatMul", [restored, tape.op("DequantizeLinear", [weight, weight_scale], {"axis": 1})])
    return result if bias is None else tape.op("Add", [result, bias])


def _multiply_ort(
    graph: ir.Graph,
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
    graph: ir.Graph, tape: ir.tape.Tape, result: ir.Value, x: ir.Value, name: str, site: Site
) -> ir.Value:
    """The channels that were taken out are rows of zeros in s8(W), so that it does not matter how Q clips them."""
    channels = constant(graph, f"{name}_float_channels", site.float_channels.astype(np.int64))
    rows = constant(graph, f"{name}_float_rows", site.float_rows)
    picked = tape.op("Gather", [x, channels], {"axis": -1})  # [.., k]
    return tape.op("Add", [result, tape.op("MatMul", [picked, rows])])
