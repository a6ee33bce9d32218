"""The values of attention: what an error in them comes to once attention has averaged them.

Attention reads the value of one token far more often than that of another. Language models often keep their attention
on the first token where they have nothing to look for (an attention sink, arXiv 2309.17453), and the value of that token
is close to zero. An error in it is then the largest of all: it enters the output at every position. So the inputs of the
linear layer that computes values are weighed as attention weighs them: with the attention weights A [T, T], averaged
over heads, the error of the output is A·x·(Ŵ − W), and not x·(Ŵ − W).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cuantiza.quantize.decide.observations import Moments
from cuantiza.quantize.rewrite.find import Projection, bias_of, find_projections

# The values of this many tokens of a window, those that attention reads most, stand for all when an error is estimated.
_TOKENS = 32


@dataclass(frozen=True)
class Values:
    """The channels of a linear layer that are the values of attention: `width` of them, from `first` on.

    `weights` [B, .., T, P + T] is the softmax and `context` [B, .., T, head width] = weights · values, where .. are the
    heads, or the heads of values and those that share each; `past` is the cache [B, H, P, head width] of earlier values.
    `bias` is added to the linear layer's matmul, or None. `repeated` says that several heads share the values of one
    (grouped-query attention).
    """

    projection: Projection
    bias: ir.Value | None
    first: int
    width: int
    weights: ir.Value
    context: ir.Value
    past: ir.Value
    repeated: bool

    @property
    def channels(self) -> slice:
        return slice(self.first, self.first + self.width)


@dataclass(frozen=True)
class ValueMoments:
    """What calibration keeps of the input x [T, K] of a linear layer, the `channels` of which are values.

    `averaged` are the moments of A·x. `rows` [S, K] are the tokens that attention reads most, and `read` [S] says how
    much: the sum of A² over the positions that read the token, times the number of heads that share a value.
    `power` is Σ‖context‖² over all positions.
    """

    channels: slice
    averaged: Moments
    rows: np.ndarray
    read: np.ndarray
    power: float

    @classmethod
    def of(
        cls, channels: slice, x: np.ndarray, weights: np.ndarray, context: np.ndarray, with_gram: bool
    ) -> ValueMoments:
        """Compute them from one window: x [1, T, K], weights [1, .., T, T], context [1, .., T, head width]."""
        tokens, weights = x.reshape(-1, x.shape[-1]), weights.reshape(-1, *weights.shape[-2:])
        # How many heads share each head of values.
        copies = context.size // (len(tokens) * (channels.stop - channels.start))
        read = np.einsum("hqt,hqt->t", weights, weights) / len(weights) * copies
        most = np.sort(np.argsort(-read, kind="stable")[:_TOKENS])
        return cls(
            channels,
            Moments.of(averaged(x, weights), with_gram),
            tokens[most],
            read[most],
            float(np.sum(context.astype(np.float64) ** 2)),
        )

    def merge(self, other: ValueMoments) -> ValueMoments:
        return ValueMoments(
            self.channels,
            self.averaged.merge(other.averaged),
            np.concatenate([self.rows, other.rows]),
            np.concatenate([self.read, other.read]),
            self.power + other.power,
        )

    def transformed(self, scale: np.ndarray, shift: np.ndarray) -> ValueMoments:
        """Return those of (x − shift) / scale. The rows of A sum to 1, so A·x has the same shift."""
        rows = ((self.rows - shift) / scale).astype(np.float32)
        return ValueMoments(self.channels, self.averaged.transformed(scale, shift), rows, self.read, self.power)

    def error(self, difference: np.ndarray, energy: np.ndarray) -> float:
        """Expected squared error of attention's output, relative to its square, if `rows` change by `difference` [S, K].

        `energy` [K] = Σₙ W² is that of the value channels.
        """
        return float(self.read @ ((difference * difference) @ energy) / (self.power or 1.0))


def averaged(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return A·x [T, K] for x [.., T, K] and attention weights [1, .., T, T], where A is their mean over heads."""
    return weights.reshape(-1, *weights.shape[-2:]).mean(axis=0) @ x.reshape(-1, x.shape[-1])


def find_values(graph: ir.Graph) -> dict[str, Values]:
    """Find the linear layers that compute values, by name, for every attention of which the softmax is a node."""
    found = (values_of(node) for node in graph if node.op_type == "MatMul")
    return {values.projection.name: values for values in found if values is not None and sums_to_one(values.weights)}


def values_of(matmul: ir.Node) -> Values | None:
    """Find the linear layer that computes the values v of `matmul` = weights · v. None if `matmul` is something else.

    The nodes are v <- ((Reshape <- Expand <-) Unsqueeze <-) Concat(past) <- Transpose <- Reshape <- (Split <-)
    (Add(bias) <-) linear layer. The Unsqueeze, Expand and Reshape repeat each head of grouped-query attention; an
    Unsqueeze alone lets the matmul do it.
    """
    shared = matmul.inputs[1]
    repeated = input_of(shared, "Reshape", "Expand", "Unsqueeze") or input_of(shared, "Unsqueeze")
    cached = (matmul.inputs[1] if repeated is None else repeated).producer()
    if cached is None or cached.op_type != "Concat":
        return None
    values = input_of(cached.inputs[1], "Transpose", "Reshape")
    if values is None:
        return None
    source, part, parts = values.producer(), 0, 1
    if source is not None and source.op_type == "Split":
        part, parts = list(source.outputs).index(values), len(source.outputs)
        source = source.inputs[0].producer()
    if source is None or (repeated is not None and part):
        return None
    for feeding in find_projections(source.graph):
        bias = bias_of(feeding)
        added = bias is not None and bias in source.inputs
        adds = feeding.node is source or (added and feeding.node in [value.producer() for value in source.inputs])
        if adds and feeding.channel_axis == 1:
            width = feeding.matrix.shape[1] // parts
            bias = bias if feeding.bias is not None or added else None
            weights, context = matmul.inputs[0], matmul.outputs[0]
            past = cached.inputs[0]
            return Values(feeding, bias, part * width, width, weights, context, past, repeated is not None)
    return None


def input_of(value: ir.Value, *operators: str) -> ir.Value | None:
    """Return the input of the chain of `operators`, last one first, that computes `value`; None if another does."""
    for operator in operators:
        node = value.producer()
        if node is None or node.op_type != operator:
            return None
        value = node.inputs[0]
    return value


def sums_to_one(weights: ir.Value) -> bool:
    """Whether `weights` are the output of a Softmax."""
    node = weights.producer()
    return node is not None and node.op_type == "Softmax"
