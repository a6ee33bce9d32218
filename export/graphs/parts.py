"""What the graphs of all families share: weights, inputs, the attention mask, attention, activations, the head, outputs.

B batch, T new tokens, P tokens in the KV cache, D width of the model, H heads, K heads of keys and values, d width of a
head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript
from onnx_ir import DataType

from cuantiza.core import contract
from cuantiza.core.errors import UserError
from cuantiza.core.inputs.weights.files import Weight, check_finite
from cuantiza.core.inputs.weights.layout import some

_END = 2**63 - 1  # as the end of a Slice: the end of the axis, however long it is


@dataclass(frozen=True)
class Size:
    """How many parameters a model has, where a head that is `tied` to the embedding counts once; `embedding` are its own."""

    parameters: int
    embedding: int
    tied: bool


@dataclass(frozen=True)
class Heads:
    """H heads of queries, K heads of keys and values, which H/K heads of queries share, and their width d."""

    number: int
    of_keys: int
    width: int


@dataclass(frozen=True)
class Inputs:
    """The inputs of cuantiza/core/contract.py. `past` holds key and value of each layer, in the contract's order."""

    input_ids: ir.Value
    attention_mask: ir.Value
    position_ids: ir.Value
    past: list[ir.Value]
    keep: ir.Value


def begin(name: str, opset: int) -> onnxscript.GraphBuilder:
    """The builder of an empty graph."""
    return onnxscript.GraphBuilder(ir.Graph([], [], nodes=[], opset_imports={"": opset}, name=name))


def weight(
    builder: onnxscript.GraphBuilder,
    weights: Mapping[str, Weight],
    folder: Path,
    name: str,
    shape: tuple[int, ...],
    turned: bool = False,
    unread: Collection[str] = (),
) -> ir.Value:
    """The initializer of `weights`[name], which config.json says has `shape`. It is read only when the model is saved.

    With `turned`, the initializer is the transpose. Raises UserError where the weight is missing, has another shape, or
    (when it is read) is not finite; the message names `folder`, and those `unread` weights that may be in its place.
    """
    if name not in weights:
        besides = f", but {some(unread)}" if unread else ""
        raise UserError(f"{folder}: has no weight {name}{besides}; take the files of the original checkpoint")
    source = weights[name]
    if source.shape != shape:
        transpose = ", which is its transpose" if source.shape == shape[::-1] != shape else ""
        raise UserError(
            f"{folder}: {name} is {list(source.shape)} where config.json says {list(shape)}{transpose}; take the config.json of the same checkpoint"
        )

    def read() -> ir.TensorProtocol:
        array = check_finite(name, source.read(), folder)
        return ir.tensor(np.ascontiguousarray(array.T if turned else array))

    tensor = ir.LazyTensor(read, DataType.FLOAT, ir.Shape(shape[::-1] if turned else shape), name=name)
    return builder.initializer(tensor, name)


@dataclass(frozen=True)
class Modules:
    """The modules of a checkpoint by their names, where linear layers are torch's: their weights are [outputs, inputs].

    `shapes` are those that config.json says of all `weights` that the graph reads. Errors name `folder`.
    """

    builder: onnxscript.GraphBuilder
    weights: Mapping[str, Weight]
    shapes: Mapping[str, tuple[int, ...]]
    folder: Path

    def weight(self, name: str, turned: bool = False) -> ir.Value:
        """The initializer of a weight, or of its transpose. Raises UserError as the function `weight` does."""
        module = name.rpartition(".")[0].rpartition(".")[0]
        unread = [other for other in self.weights if other.startswith(f"{module}.") and other not in self.shapes]
        return weight(self.builder, self.weights, self.folder, name, self.shapes[name], turned, unread)

    def linear(self, x: ir.Value, name: str) -> ir.Value:
        """The linear layer `name` of x [.., K]: [.., N]. It has a bias where `shapes` have one."""
        op, bias = self.builder.op, f"{name}.bias"
        y = op.MatMul(x, self.weight(f"{name}.weight", turned=True), _name=name)
        return op.Add(y, self.weight(bias), _name=bias) if bias in self.shapes else y

    def layer_norm(self, x: ir.Value, name: str, epsilon: float) -> ir.Value:
        """The LayerNorm `name` of x [.., D]."""
        scale, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.builder.op.LayerNormalization(x, scale, bias, axis=-1, epsilon=epsilon, _name=name)


def changed(source: Weight, change: Callable[[np.ndarray], np.ndarray]) -> Weight:
    """The weight `source` with `change` done to its array, of the same shape, when it is read."""
    return replace(source, read=lambda: change(source.read()))


def check_layers(layers: Mapping[int, str], number: int, field: str, prefix: str, folder: Path) -> None:
    """Raise UserError unless `layers`, the name of a weight of each layer, are the layers below `number`.

    `field` is what config.json calls `number`, and weights of layer 3 are named `prefix`.3.*. This is checked before
    anything is built: config.json may say two billion.
    """
    advice = f"where config.json says {field} {number}; take the config.json of the same checkpoint"
    if (missing := next(layer for layer in count() if layer not in layers)) < number:
        raise UserError(f"{folder}: has no weight {prefix}.{missing}.* {advice}")
    if beyond := next((name for layer, name in layers.items() if layer >= number), None):
        raise UserError(f"{folder}: has a weight {beyond} {advice}")


def is_tied(weights: Mapping[str, Weight], embedding: str, head: str, declared: bool) -> bool:
    """Whether head and embedding share a matrix: they are equal, or there is no head and config.json says so."""
    if head not in weights or embedding not in weights:
        return declared
    one, other = weights[head], weights[embedding]
    return one.shape == other.shape and np.array_equal(one.read(), other.read())


def add_inputs(builder: onnxscript.GraphBuilder, layers: int, heads: Heads) -> Inputs:
    """Add the contract's inputs to the graph of `builder`."""
    tokens = [contract.BATCH, contract.TOKENS]
    input_ids = builder.input(contract.INPUT_IDS, DataType.INT64, tokens)
    attention_mask = builder.input(contract.ATTENTION_MASK, DataType.INT64, [contract.BATCH, contract.TOTAL])
    position_ids = builder.input(contract.POSITION_IDS, DataType.INT64, tokens)
    cache: list[str | int] = [contract.BATCH, heads.of_keys, contract.PAST, heads.width]
    past = [builder.input(name, DataType.FLOAT, cache) for name in contract.past_names(layers)]
    # This input has a default, so that loaders that do not know it need not feed it.
    keep = ir.Value(
        name=contract.KEEP,
        shape=ir.Shape([]),
        type=ir.TensorType(DataType.INT64),
        const_value=ir.tensor(np.array(0, np.int64), name=contract.KEEP),
    )
    builder.graph.inputs.append(keep)
    builder.graph.register_initializer(keep)
    return Inputs(input_ids, attention_mask, position_ids, past, keep)


def visible(
    op: onnxscript.OpBuilder, inputs: Inputs, windows: Collection[int | None], heads: Heads
) -> dict[int | None, ir.Value]:
    """Make an attention mask [B, 1, T, P+T] for each of `windows`: 0 where the new token t may see position s.

    Where `heads` share keys, it is [B, 1, 1, T, P+T], as `attention` takes it.

    Elsewhere it is contract.MASKED. The token may see s if s ≤ P + t and s is not padding, and in a sliding window of
    w positions only if also s > P + t - w. The window None has no such limit.
    """
    total = op.Shape(inputs.attention_mask, start=1, end=2)
    count = op.Shape(inputs.input_ids, start=1, end=2)
    keys = op.Range(0, op.Squeeze(total, [0]), 1)  # [P+T]
    queries = op.Unsqueeze(op.Slice(keys, op.Sub(total, count), total), [1])  # [T, 1]: P .. P+T-1
    causal = op.LessOrEqual(keys, queries)  # [T, P+T]
    real = op.Cast(op.Unsqueeze(inputs.attention_mask, [1, 2]), to=DataType.BOOL)  # [B, 1, 1, P+T]
    masks: dict[int | None, ir.Value] = {}
    for window in windows:
        seen = causal if window is None else op.And(causal, op.Greater(keys, op.Sub(queries, window)))
        masks[window] = op.Where(op.And(seen, real), 0.0, contract.MASKED)
    return masks if heads.of_keys == heads.number else {key: op.Unsqueeze(mask, [1]) for key, mask in masks.items()}


def split_heads(op: onnxscript.OpBuilder, x: ir.Value, number: int, width: int) -> ir.Value:
    """Split x [B, T, number·width] into heads [B, number, T, width]."""
    return op.Transpose(op.Reshape(x, [0, 0, number, width]), perm=[0, 2, 1, 3])


def attention(
    op: onnxscript.OpBuilder,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    visible: ir.Value,
    heads: Heads,
    scale: float,
    name: str,
    cap: float | None = None,
) -> ir.Value:
    """The context [B, T, H·d] of queries [B, H, T, d] that attend to keys and values [B, K, P+T, d].

    `scale` multiplies the scores, and `cap` · tanh(score / `cap`) then bounds them. `visible` [B, 1, T, P+T] is the mask;
    where K < H it is [B, 1, 1, T, P+T]. There, H/K queries share a key: they get an axis of their own, over which the
    matmul broadcasts the keys. To repeat the keys instead (Expand) would copy the whole cache at each token.
    """
    before, tokens, width = [0, 1], 2, 3  # the axes of q
    if heads.of_keys < heads.number:
        q = op.Reshape(q, [0, heads.of_keys, heads.number // heads.of_keys, -1, heads.width])  # [B, K, H/K, T, d]
        k, v = op.Unsqueeze(k, [2]), op.Unsqueeze(v, [2])  # [B, K, 1, P+T, d]
        before, tokens, width = [0, 1, 2], 3, 4
    scores = op.MatMul(q, op.Transpose(k, perm=[*before, width, tokens]), _name=f"{name}.scores")  # [B, H, T, P+T]
    if scale != 1.0:
        scores = op.Mul(scores, scale)
    if cap is not None:
        scores = op.Mul(op.Tanh(op.Div(scores, cap)), cap)
    weights = op.Softmax(op.Add(scores, visible), axis=-1, _name=f"{name}.softmax")
    context = op.MatMul(weights, v, _name=f"{name}.context")  # [B, H, T, d]
    context = op.Transpose(context, perm=[0, tokens, *before[1:], width])
    return op.Reshape(context, [0, 0, heads.number * heads.width])


def asked(op: onnxscript.OpBuilder, keep: ir.Value, *values: ir.Value) -> tuple[ir.Value, ...]:
    """Those positions of `values` [B, T, D] whose logits were asked for: [B, n or T, D].

    It is done in the last layer, once keys and values are complete: what follows only feeds the logits.
    """
    start = op.Neg(op.Unsqueeze(keep, [0]))
    return tuple(op.Slice(value, start, [_END], [1]) for value in values)


def head(op: onnxscript.OpBuilder, x: ir.Value, matrix: ir.Value) -> ir.Value:
    """The logits [B, T, V] of x [B, T, D]. `matrix` [V, D] is the embedding matrix in a tied model.

    Runtimes fold the transpose of a constant at load.
    """
    return op.MatMul(x, op.Transpose(matrix, perm=[1, 0]), _name="lm_head")


def activation(op: onnxscript.OpBuilder, x: ir.Value, name: str, opset: int) -> ir.Value:
    """Apply transformers' activation `name`. ONNX has a Gelu operator from opset 20 on."""
    match name:
        case "relu":
            return op.Relu(x)
        case "relu2":
            positive = op.Relu(x)
            return op.Mul(positive, positive)
        case "tanh":
            return op.Tanh(x)
        case "silu" | "swish":
            return op.Mul(x, op.Sigmoid(x))
        case "gelu" if opset >= 20:
            return op.Gelu(x)
        case "gelu":
            return op.Mul(op.Mul(x, 0.5), op.Add(op.Erf(op.Mul(x, 0.5**0.5)), 1.0))
        case _ if opset >= 20:
            return op.Gelu(x, approximate="tanh")
        case _:
            # 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x³))), arXiv 1606.08415
            cubic = op.Add(x, op.Mul(op.Mul(op.Mul(x, x), x), 0.044715))
            return op.Mul(op.Mul(x, 0.5), op.Add(op.Tanh(op.Mul(cubic, (2 / np.pi) ** 0.5)), 1.0))


def finish(
    builder: onnxscript.GraphBuilder, logits: ir.Value, present: list[ir.Value], heads: Heads, vocabulary: int
) -> ir.Model:
    """The model of the graph of `builder`, whose outputs are `logits` [B, T, V] and `present`, in the contract's order."""
    graph = builder.graph
    logits.shape = ir.Shape([contract.BATCH, contract.TOKENS, vocabulary])
    builder.add_output(logits, contract.LOGITS)
    for value, name in zip(present, contract.present_names(len(present) // 2), strict=True):
        value.shape = ir.Shape([contract.BATCH, heads.of_keys, contract.TOTAL, heads.width])
        builder.add_output(value, name)
    for node in graph:
        node.metadata_props.clear()
    ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", graph.opset_imports[""])])
    return ir.Model(graph, ir_version=ir_version, producer_name="cuantiza")
