"""Store matrices in 16 bits (fp16 or bf16) and compute with them in fp32.

A matmul reads Cast(W), which ONNX Runtime folds at load: the file is half as large, speed and memory are those of fp32.
An embedding gathers 16-bit rows and casts only those. ONNX Runtime runs it that way, too, because it has Gather and
Cast for both types. All else stays fp32: vectors, because they are only a thousandth of GPT-2's bytes, and constants of another
use, such as frequencies of a rotary embedding and slopes, whose error would grow with the position.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import ml_dtypes
import onnx_ir as ir

from cuantiza.quantize.rewrite.edit import clean, replace_node
from cuantiza.quantize.rewrite.find import find_embeddings, find_projections

_TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def store_half(model: ir.Model, dtype: Literal["fp16", "bf16"]) -> list[str]:
    """Store the matrices of linear layers and embeddings of `model` in 16 bits, in place; return the names of those that now are.

    Values are rounded to nearest, ties to even, when the model is saved. A matrix with a value beyond the largest of
    `dtype` (65504 for fp16) stays fp32 and is not among the names.
    """
    graph = model.graph
    read = {one.weight for one in find_projections(graph)} | {one.table for one in find_embeddings(graph)}
    matrices = [
        value for value in graph.initializers.values() if value in read and _fits(value.const_value, _TYPES[dtype])
    ]
    halves = {matrix: _half(graph, matrix, dtype) for matrix in matrices}
    for embedding in find_embeddings(graph):
        if embedding.table in halves:
            tape, ids = ir.tape.Tape(), embedding.node.inputs[1]
            rows = tape.op("Gather", [halves[embedding.table], ids])
            replace_node(graph, embedding.node, tape, tape.op("Cast", [rows], {"to": ir.DataType.FLOAT}))
    for matrix, half in halves.items():
        if matrix.uses():
            cast = ir.node("Cast", [half], {"to": ir.DataType.FLOAT}, name=f"{half.name}.Cast")
            graph.insert_before(graph[0], cast)
            cast.outputs[0].shape, cast.outputs[0].type = matrix.shape, matrix.type
            ir.convenience.replace_all_uses_with(matrix, cast.outputs[0])
    clean(model)
    return [matrix.name for matrix in matrices]


def _fits(tensor: ir.TensorProtocol, to: ir.DataType) -> bool:
    array = tensor.numpy()
    return bool(max(array.max(initial=0), -array.min(initial=0)) <= float(ml_dtypes.finfo(to.numpy()).max))


def _half(graph: ir.Graph, matrix: ir.Value, dtype: str) -> ir.Value:
    """Add the 16-bit initializer that replaces `matrix`. Its values are converted when the model is saved."""
    to = _TYPES[dtype]
    name = f"{matrix.name}_{dtype}"
    tensor = ir.LazyTensor(partial(_convert, matrix.const_value, to), to, matrix.shape, name=name)
    half = ir.Value(name=name, shape=matrix.shape, type=ir.TensorType(to), const_value=tensor)
    graph.register_initializer(half)
    return half


def _convert(tensor: ir.TensorProtocol, to: ir.DataType) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().astype(to.numpy()))  # fp16 keeps its subnormals; smaller values become 0
