"""Smoothing: rescale activations so that they are easier to quantize, and rescale the weights around them to match.

The model computes the same as before, because x·W = ((x − z) / s) · (s·W) + z·W. What computes x takes the division by
s and the shift by z: the scale and bias of a LayerNorm, the scale of an RMSNorm, the value columns of the linear layer
that feeds attention, or the linear layer that a ReLU follows or that is multiplied with a gate (SwiGLU). The linear
layer that reads x takes s into the rows of its weight and z·W into its bias.

Each channel has its own s = max|x|^α / max|W|^(1−α), as in SmoothQuant (arXiv 2211.10438); α is searched for each
tensor. The shift z by the mean of each channel is that of Outlier Suppression+ (arXiv 2304.09145).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from cuantiza.quantize.decide.values import input_of, sums_to_one, values_of
from cuantiza.quantize.rewrite.edit import constant
from cuantiza.quantize.rewrite.find import (
    Projection,
    bias_of,
    find_embeddings,
    find_projections,
    is_own,
    is_own_vector,
)

_TINY = 1e-5


@dataclass(frozen=True)
class Group:
    """The linear layers that read one value x [.., K], and the initializers before x that can take its scale and shift.

    `scales` are pairs (initializer, first channel): from that channel on, its last axis is divided by s. `shift` is the
    vector among these from which z is subtracted before the division. It is None, and there is no shift, where one of
    the linear layers has no bias that could take z·W. Where several channels of x are copies of one channel before it
    (grouped-query attention), `source` int [K] says of which, and these channels must have the same s. `embedded` says that
    an embedding reads the matrix of one of the linear layers, too, and is scaled back.
    """

    x: str
    projections: tuple[Projection, ...]
    scales: tuple[tuple[ir.Value, int], ...]
    shift: ir.Value | None
    source: np.ndarray | None = None
    embedded: bool = False

    def shared(self, values: np.ndarray) -> np.ndarray:
        """Replace each of `values` [K] by the largest among the channels that must have the same s."""
        if self.source is None:
            return values
        largest = np.full(self.source.max() + 1, -np.inf, values.dtype)
        np.maximum.at(largest, self.source, values)
        return largest[self.source]


@dataclass(frozen=True)
class Smoothing:
    """The scale s > 0 and the shift z, float32 [K]. `alpha` is None where scaling did not pay."""

    scale: np.ndarray
    shift: np.ndarray
    alpha: float | None


def find_groups(graph: ir.Graph) -> dict[str, Group]:
    """Find every value that can be smoothed, by its name."""
    readers: dict[str, list[Projection]] = {}
    embedded = {embedding.table for embedding in find_embeddings(graph)}
    for projection in find_projections(graph):
        readers.setdefault(projection.x.name, []).append(projection)
    groups = {}
    for name, projections in readers.items():
        x = projections[0].x
        if not all(_may_scale(projection, graph) for projection in projections):
            continue
        if not _feeds_only(x, len(projections)):
            continue
        width = projections[0].weight.shape.numpy()[1 - projections[0].channel_axis]
        found = _find_norm(x, width) or _find_linear(x) or _find_values(x, projections)
        if found is not None:
            scales, shift, source = found
            if source is not None or not all(bias_of(projection) for projection in projections):
                shift = None
            of_embedding = any(projection.weight in embedded for projection in projections)
            groups[name] = Group(name, tuple(projections), scales, shift, source, of_embedding)
    return groups


def candidate(low: np.ndarray, high: np.ndarray, weight_max: np.ndarray, alpha: float) -> np.ndarray:
    """SmoothQuant's scale s [K] for the exponent `alpha`, with geometric mean 1.

    `low` and `high` [K] are the smallest and largest value of each channel; `weight_max` [K] is max|W|.
    """
    scale = _above_zero(np.maximum(high, -low)) ** alpha / _above_zero(weight_max) ** (1 - alpha)
    return (scale / np.exp(np.mean(np.log(scale)))).astype(np.float32)


def _above_zero(largest: np.ndarray) -> np.ndarray:
    """Raise the magnitudes `largest` [K] of dead channels to a tiny share of the largest one."""
    return np.maximum(largest, _TINY * largest.max() or 1.0)


def apply(graph: ir.Graph, group: Group, smoothing: Smoothing) -> None:
    """Rescale `graph` in place, without changing what it computes.

    The rescaled matrices are not stored: they are computed again each time they are read.
    """
    scale, shift = smoothing.scale.astype(np.float64), smoothing.shift.astype(np.float64)
    # Before x, a channel that several channels of x copy occurs once.
    once = slice(None) if group.source is None else np.unique(group.source, return_index=True)[1]
    for value, first in group.scales:
        start = shift if value is group.shift else 0.0
        _set(value, partial(_divide, value.const_value, first, scale[once], start))
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


# What `_find_norm`, `_find_linear` and `_find_values` return: the fields scales, shift and source of a Group.
_Found = tuple[tuple[tuple[ir.Value, int], ...], ir.Value | None, np.ndarray | None]
_RMS_NORMS = ("RMSNormalization", "SimplifiedLayerNormalization")


def _find_norm(x: ir.Value, width: int) -> _Found | None:
    """Find the scale of its own with which a norm ends that computes x, and the bias of a LayerNormalization.

    An RMSNorm is one node, or ends with a Mul by its scale. Such a Mul takes any s, whatever it multiplies; a Mul by a
    single number, and not by one for each of the `width` channels of x, takes none.
    """
    node = x.producer()
    if node is None:
        return None
    if node.op_type == "LayerNormalization" and len(node.inputs) == 3:
        scale, bias = node.inputs[1:3]
        return (((scale, 0), (bias, 0)), bias, None) if is_own_vector(scale) and is_own_vector(bias) else None
    if node.op_type in _RMS_NORMS:
        return (((node.inputs[1], 0),), None, None) if is_own_vector(node.inputs[1]) else None
    if node.op_type == "Mul":
        return next(
            ((((value, 0),), None, None) for value in node.inputs if is_own_vector(value) and value.shape[0] == width),
            None,
        )
    return None


def _find_linear(x: ir.Value) -> _Found | None:
    """Find the linear layer that can take the division by s, where x is a gated activation (SwiGLU) or a ReLU's.

    In x = act(g) · u it is the one that computes u; in x = max(u, 0) too, because max(u / s, 0) = max(u, 0) / s. It
    cannot take a shift, which the gate would multiply and the ReLU would cut.
    """
    node = x.producer()
    if node is None or node.op_type not in ("Mul", "Relu"):
        return None
    for factor in node.inputs:
        source = factor.producer()
        if source is None or len(factor.uses()) != 1:
            continue
        for feeding in find_projections(source.graph):
            bias = bias_of(feeding)
            ends = feeding.node if bias is None or feeding.bias is not None else _only_reader(feeding.node.outputs[0])
            if ends is source and feeding.channel_axis == 1 and is_own(feeding.weight):
                scales = ((feeding.weight, 0),) if bias is None else ((feeding.weight, 0), (bias, 0))
                return scales, None, None
    return None


def _find_values(x: ir.Value, projections: list[Projection]) -> _Found | None:
    """Find the value columns of the linear layer that feeds attention, where x is the output of attention.

    The attention weights of a token sum to 1, so a shift of all values is the same shift of the output. The nodes are
    x <- (Slice <-) Reshape <- Transpose <- the matmul of `values_of`. The Slice keeps some of the tokens and does not
    change them.
    """
    whole = input_of(x, "Slice")
    if whole is not None and len(whole.uses()) != 1:
        return None
    context = input_of(x if whole is None else whole, "Reshape", "Transpose")
    matmul = context.producer() if context is not None else None
    values = values_of(matmul) if matmul is not None and matmul.op_type == "MatMul" else None
    if values is None or not is_own(values.projection.weight):
        return None
    weight, bias, first = values.projection.weight, values.bias, values.first
    width = projections[0].matrix.shape[0]
    copies = _copies(values.past, width, values.width) if values.repeated else None
    if copies is None and (values.repeated or values.width != width):
        return None
    if bias is None:
        return ((weight, first),), None, copies
    return ((weight, first), (bias, first)), bias if sums_to_one(values.weights) else None, copies


def _copies(past: ir.Value, width: int, kept: int) -> np.ndarray | None:
    """Return of which of the `kept` value channels each of the `width` channels of attention's output is made.

    Each head of the values is repeated for the heads that share it, one after the other. Its width is the last axis of
    `past` [B, H, P, head width]. None if that is unknown.
    """
    head = past.shape[-1] if past.shape is not None and len(past.shape) == 4 else None
    if not isinstance(head, int) or kept % head or width % kept:
        return None
    return np.arange(kept).reshape(-1, 1, head).repeat(width // kept, axis=1).ravel()


def _may_scale(projection: Projection, graph: ir.Graph) -> bool:
    """Whether only this linear layer reads its weight, and embeddings, whose outputs can be scaled back."""
    readers = {projection.node, *(embedding.node for embedding in find_embeddings(graph))}
    if projection.node.inputs[1] is not projection.weight:
        readers.add(projection.node.inputs[1].producer())
    return all(use.node in readers for use in projection.weight.uses())


def _feeds_only(x: ir.Value, projections: int) -> bool:
    """Whether only so many linear layers read the values of x. A Shape does not read them."""
    return sum(use.node.op_type != "Shape" for use in x.uses()) == projections


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 else None


def _set(value: ir.Value, compute: Callable[[], np.ndarray]) -> None:
    def tensor() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(compute(), np.float32))

    # Matrices are computed lazily, because a second copy of all of them would be most of the memory that a run needs.
    value.const_value = (
        ir.LazyTensor(tensor, value.dtype, value.shape, name=value.name) if len(value.shape) > 1 else tensor()
    )
