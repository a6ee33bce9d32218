"""Smoothing: rescale activations so that they are easier to quantize, and rescale the weights around them to match.

The model computes the same as before, because x·W = ((x − z) / s) · (s·W) + z·W. The layer before x takes the division
by s and the shift by z: the scale and bias of a LayerNorm, or the value columns of the linear layer that feeds
attention. The linear layer that reads x takes s into the rows of its weight and z·W into its bias.

Each channel has its own s = max|x|^α / max|W|^(1−α), as in SmoothQuant (arXiv 2211.10438); α is searched for each
tensor. The shift z by the mean of each channel is that of Outlier Suppression+ (arXiv 2304.09145).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from cuantiza.quantize.rewrite.edit import constant
from cuantiza.quantize.rewrite.find import Projection, find_embeddings, find_projections

_TINY = 1e-5


@dataclass(frozen=True)
class Group:
    """The linear layers that read one value x [.., K], and the initializers before x that can take its scale and shift.

    `scales` are pairs (initializer, first channel): from that channel on, its last axis is divided by s. `shift` is the
    vector among these from which z is subtracted before the division. It is None, and there is no shift, where one of
    the linear layers has no bias that could take z·W.
    """

    x: str
    projections: tuple[Projection, ...]
    scales: tuple[tuple[ir.Value, int], ...]
    shift: ir.Value | None


@dataclass(frozen=True)
class Smoothing:
    """The scale s > 0 and the shift z, float32 [K]. `alpha` is None where scaling did not pay."""

    scale: np.ndarray
    shift: np.ndarray
    alpha: float | None


def find_groups(graph: ir.Graph) -> dict[str, Group]:
    """Find every value that can be smoothed, by its name."""
    readers: dict[str, list[Projection]] = {}
    for projection in find_projections(graph):
        readers.setdefault(projection.x.name, []).append(projection)
    groups = {}
    for name, projections in readers.items():
        x = projections[0].x
        if not all(_may_scale(projection, graph) for projection in projections):
            continue
        found = _find_norm(x, projections) or _find_values(x, projections)
        if found is not None:
            scales, shift = found
            if not all(bias_of(projection) for projection in projections):
                shift = None
            groups[name] = Group(name, tuple(projections), scales, shift)
    return groups


def bias_of(projection: Projection) -> ir.Value | None:
    """Return the constant vector [N] that is added to the matmul of `projection` and to nothing else, or None."""
    bias = projection.bias
    if bias is None:
        uses = list(projection.node.outputs[0].uses())
        if len(uses) != 1 or uses[0].node.op_type != "Add":
            return None
        bias = next(value for value in uses[0].node.inputs if value is not projection.node.outputs[0])
    return bias if _is_own_vector(bias) else None


def candidate(low: np.ndarray, high: np.ndarray, weight_max: np.ndarray, alpha: float) -> np.ndarray:
    """SmoothQuant's scale s [K] for the exponent `alpha`, with geometric mean 1.

    `low` and `high` [K] are the smallest and largest value of each channel; `weight_max` [K] is max|W|.
    """
    x_max = np.maximum(np.maximum(high, -low), _TINY)
    scale = x_max**alpha / np.maximum(weight_max, _TINY) ** (1 - alpha)
    return (scale / np.exp(np.mean(np.log(scale)))).astype(np.float32)


def apply(graph: ir.Graph, group: Group, smoothing: Smoothing) -> None:
    """Rescale `graph` in place, without changing what it computes.

    The rescaled matrices are not stored: they are computed again each time they are read.
    """
    scale, shift = smoothing.scale.astype(np.float64), smoothing.shift.astype(np.float64)
    for value, first in group.scales:
        start = shift if value is group.shift else 0.0
        _set(value, partial(_divide, value.const_value, first, scale, start))
    for projection in group.projections:
        if group.shift is not None:
            bias = bias_of(projection)
            _set(bias, partial(_add, bias.const_value, shift @ projection.matrix.astype(np.float64)))
        axis = 1 - projection.channel_axis
        _set(projection.weight, partial(_multiply, projection.weight.const_value, np.expand_dims(scale, 1 - axis)))
    _unscale_embeddings(graph, group, (1 / scale).astype(np.float32))


def _divide(tensor: ir.TensorProtocol, first: int, scale: np.ndarray, shift: np.ndarray | float) -> np.ndarray:
    array = tensor.numpy().astype(np.float64)
    channels = slice(first, first + len(scale))
    array[..., channels] = (array[..., channels] - shift) / scale
    return array


def _multiply(tensor: ir.TensorProtocol, scale: np.ndarray) -> np.ndarray:
    return tensor.numpy() * scale


def _add(tensor: ir.TensorProtocol, term: np.ndarray) -> np.ndarray:
    return tensor.numpy() + term


def _unscale_embeddings(graph: ir.Graph, group: Group, factor: np.ndarray) -> None:
    """Multiply embeddings by `factor` [K] = 1 / s, where smoothing scaled the matrix that they share with the head."""
    tables = {projection.weight for projection in group.projections}
    for embedding in find_embeddings(graph):
        if embedding.table in tables:
            output = embedding.node.outputs[0]
            back = ir.node(
                "Mul",
                [output, constant(graph, f"{embedding.table.name}_unsmooth", factor)],
                name=f"{embedding.name}.unsmooth",
            )
            back.outputs[0].name = f"{output.name}_unsmoothed"
            back.outputs[0].type, back.outputs[0].shape = output.type, output.shape
            ir.convenience.replace_all_uses_with(output, back.outputs[0])
            back.replace_input_with(0, output)
            graph.insert_after(embedding.node, back)


def _find_norm(x: ir.Value, projections: list[Projection]) -> tuple | None:
    """Find a LayerNormalization that computes x, has a scale and bias of its own, and feeds only linear layers."""
    node = x.producer()
    if node is None or node.op_type != "LayerNormalization" or len(node.inputs) < 3:
        return None
    scale, bias = node.inputs[1:3]
    if len(x.uses()) != len(projections) or not (_is_own_vector(scale) and _is_own_vector(bias)):
        return None
    return ((scale, 0), (bias, 0)), bias


def _find_values(x: ir.Value, projections: list[Projection]) -> tuple | None:
    """Find the value columns of the linear layer that feeds attention, where x is the output of attention.

    The attention weights of a token sum to 1, so a shift of all values is the same shift of the output. The nodes are
    x <- (Slice <-) Reshape <- Transpose <- MatMul(softmax, v <- Concat(past) <- Transpose <- Reshape <- (Split <-)
    Add(bias)). The Slice keeps some of the tokens and does not change them.
    """
    if len(x.uses()) != len(projections):
        return None
    whole = _input_of(x, "Slice")
    if whole is not None and len(whole.uses()) != 1:
        return None
    context = _input_of(x if whole is None else whole, "Reshape", "Transpose")
    matmul = context.producer() if context is not None else None
    if matmul is None or matmul.op_type != "MatMul":
        return None
    softmax, cached = (value.producer() for value in matmul.inputs)
    if softmax is None or softmax.op_type != "Softmax" or cached is None or cached.op_type != "Concat":
        return None
    values = _input_of(cached.inputs[1], "Transpose", "Reshape")
    if values is None:
        return None
    source, first = values.producer(), 0
    if source is not None and source.op_type == "Split":
        first = (
            list(source.outputs).index(values) * projections[0].weight.shape.numpy()[1 - projections[0].channel_axis]
        )
        source = source.inputs[0].producer()
    if source is None:
        return None
    for feeding in find_projections(source.graph):
        bias = bias_of(feeding)
        adds = feeding.node is source or feeding.node in [value.producer() for value in source.inputs]
        if adds and bias is not None and bias in source.inputs and feeding.channel_axis == 1:
            return ((feeding.weight, first), (bias, first)), bias
    return None


def _input_of(value: ir.Value, *operators: str) -> ir.Value | None:
    """Return the input of the chain of `operators`, last one first, that computes `value`; None if another does."""
    for operator in operators:
        node = value.producer()
        if node is None or node.op_type != operator:
            return None
        value = node.inputs[0]
    return value


def _may_scale(projection: Projection, graph: ir.Graph) -> bool:
    """Whether only this linear layer reads its weight, and embeddings, whose outputs can be scaled back."""
    readers = {projection.node, *(embedding.node for embedding in find_embeddings(graph))}
    if projection.node.inputs[1] is not projection.weight:
        readers.add(projection.node.inputs[1].producer())
    return all(use.node in readers for use in projection.weight.uses())


def _is_own_vector(value: ir.Value | None) -> bool:
    return (
        value is not None
        and value.is_initializer()
        and value.dtype == ir.DataType.FLOAT
        and len(value.shape) == 1
        and len(value.uses()) == 1
    )


def _set(value: ir.Value, compute: Callable[[], np.ndarray]) -> None:
    def tensor() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(compute(), np.float32))

    # Matrices are computed lazily, because a second copy of all of them would be most of the memory that a run needs.
    value.const_value = (
        ir.LazyTensor(tensor, value.dtype, value.shape, name=value.name) if len(value.shape) > 1 else tensor()
    )
