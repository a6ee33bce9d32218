"""Find what can be quantized in a graph: linear layers (matmuls with a constant weight) and embeddings.

A linear layer is a `MatMul` or a `Gemm`. Its weight is stored as [K, N], or as [N, K] with a `Transpose`, which is how
a head tied to the embedding is stored. Because all these forms are found, graphs of other exporters are quantized as
completely as ours.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

_REASONS = {
    "LayerNormalization": "normalizes in floating point; its cost and size are negligible",
    "Softmax": "exponentials span more orders of magnitude than 8 bits",
    "MatMul": "attention: both inputs of the matmul are activations",
    "Gemm": "has an alpha or beta other than 1, or no constant weight",
    "Gather": "picks from a tensor that is not an embedding matrix",
    "Add": "residual stream, biases and mask: int8 would round the sum again at every layer",
}
_DEFAULT_REASON = "elementwise or a reduction: it has no matmul to speed up and no weight to shrink"
# These operators move or reshape values and compute nothing, so they are not listed as left in floating point.
_MOVES = (
    "Cast",
    "Concat",
    "Constant",
    "Expand",
    "Identity",
    "Reshape",
    "Shape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
    "Where",
)


@dataclass(frozen=True)
class Projection:
    """A linear layer: `node` computes x · W (+ bias).

    `channel_axis` is the axis of the stored `weight` that holds the output channels: 1 for [K, N], 0 for [N, K].
    """

    node: ir.Node
    x: ir.Value
    weight: ir.Value
    channel_axis: int
    bias: ir.Value | None

    @property
    def matrix(self) -> np.ndarray:
        """The weight as float32 [K, N]; a transposed view, not a copy, where it is stored as [N, K]."""
        weight = self.weight.const_value.numpy()
        return weight if self.channel_axis == 1 else weight.T

    @property
    def channels(self) -> int:
        """The number N of output channels."""
        return int(self.weight.const_value.shape.numpy()[self.channel_axis])

    @property
    def name(self) -> str:
        return self.node.name or self.node.outputs[0].name


@dataclass(frozen=True)
class Embedding:
    """An embedding: `node` gathers rows of the embedding matrix `table` [V, D] by token or position."""

    node: ir.Node
    table: ir.Value

    @property
    def name(self) -> str:
        return self.node.name or self.node.outputs[0].name


def find_projections(graph: ir.Graph) -> list[Projection]:
    """List every MatMul and Gemm of an activation with a constant floating-point matrix, in graph order."""
    found = (_projection(node) for node in graph)
    return [projection for projection in found if projection is not None]


def find_embeddings(graph: ir.Graph) -> list[Embedding]:
    """List every Gather of rows of a constant floating-point matrix, in graph order."""
    return [
        Embedding(node, node.inputs[0])
        for node in graph
        if node.op_type == "Gather" and _axis(node) == 0 and _is_matrix(node.inputs[0])
    ]


def bias_of(projection: Projection) -> ir.Value | None:
    """Return the constant vector [N] that is added to the matmul of `projection` and to nothing else, or None."""
    bias = projection.bias
    if bias is None:
        uses = list(projection.node.outputs[0].uses())
        if len(uses) != 1 or uses[0].node.op_type != "Add":
            return None
        bias = next(value for value in uses[0].node.inputs if value is not projection.node.outputs[0])
    return bias if is_own_vector(bias) else None


def is_own_vector(value: ir.Value | None) -> bool:
    """Whether `value` is a constant vector of floats that one node reads."""
    return is_own(value) and value.dtype == ir.DataType.FLOAT and len(value.shape) == 1


def is_own(value: ir.Value | None) -> bool:
    """Whether `value` is a constant that one node reads."""
    return value is not None and value.is_initializer() and len(value.uses()) == 1


def is_head(projection: Projection) -> bool:
    """Whether `projection` computes the logits, which may be scaled or capped afterwards."""
    value = projection.node.outputs[0]
    while not value.is_graph_output():
        uses = list(value.uses())
        if len(uses) != 1 or uses[0].node.op_type not in ("Add", "Div", "Mul", "Tanh"):
            return False
        value = uses[0].node.outputs[0]
    return value.name == "logits"


def find_tables(graph: ir.Graph) -> set[ir.Value]:
    """Find the matrices with one row per token or position: embedding matrices, and the head's weight, tied or not."""
    heads = {projection.weight for projection in find_projections(graph) if is_head(projection)}
    return heads | {embedding.table for embedding in find_embeddings(graph)}


def left_in_float(graph: ir.Graph) -> list[dict]:
    """List what quantization leaves in floating point in `graph`, which is not rewritten yet, and the reasons.

    An item is an operator type that computes in floating point outside linear layers and embeddings, with its count,
    or a matrix that no linear layer or embedding reads, with its shape.
    """
    projections, embeddings = find_projections(graph), find_embeddings(graph)
    nodes = {projection.node for projection in projections} | {embedding.node for embedding in embeddings}
    counts = Counter(
        node.op_type for node in graph if node not in nodes and node.op_type not in _MOVES and _computes_in_float(node)
    )
    kept: list[dict] = [
        {"operator": name, "count": count, "reason": _REASONS.get(name, _DEFAULT_REASON)}
        for name, count in sorted(counts.items())
    ]
    covered = {projection.weight for projection in projections} | {embedding.table for embedding in embeddings}
    for name, value in graph.initializers.items():
        if _is_matrix(value) and value not in covered and value.uses():
            kept.append(
                {"weight": name, "shape": list(value.shape.numpy()), "reason": "no linear layer or embedding reads it"}
            )
    return kept


def _projection(node: ir.Node) -> Projection | None:
    if node.domain or node.op_type not in ("MatMul", "Gemm") or len(node.inputs) < 2:
        return None
    x, weight = node.inputs[0], node.inputs[1]
    channel_axis, bias = 1, None
    if node.op_type == "Gemm":
        if (
            node.attributes.get_float("alpha", 1.0) != 1.0
            or node.attributes.get_float("beta", 1.0) != 1.0
            or node.attributes.get_int("transA", 0) != 0
        ):
            return None
        channel_axis -= node.attributes.get_int("transB", 0)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
    producer = weight.producer()
    if (
        producer is not None
        and producer.op_type == "Transpose"
        and list(producer.attributes.get_ints("perm", [1, 0])) == [1, 0]
    ):
        weight, channel_axis = producer.inputs[0], 1 - channel_axis
    if not _is_matrix(weight) or _is_matrix(x):
        return None
    return Projection(node, x, weight, channel_axis, bias)


def _computes_in_float(node: ir.Node) -> bool:
    # A missing type counts as float. Exporters may leave types out, but the integer nodes of a graph compute shapes
    # and positions, and inference gives those their types.
    return any(output.dtype in (ir.DataType.FLOAT, None) for output in node.outputs)


def _axis(node: ir.Node) -> int:
    return node.attributes.get_int("axis", 0)


def _is_matrix(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.dtype == ir.DataType.FLOAT and len(value.shape) == 2
