"""Replace attention by one operator that updates the KV cache in place, for the `ort` target of a graph of export/graphs.

GroupQueryAttention (ONNX Runtime's docs/ContribOperators.md) reads the keys and values of P past tokens and returns
those of P+T, as the portable graph does. If past and present are bound to the same buffer [B, K, capacity, d], it
writes only the keys and values of the T new tokens and copies nothing. It applies the causal mask itself, and a sliding
window or a cap of the scores where a model has them; padding is passed to it as an attention bias. It takes only heads
whose width is a multiple of 8 (ONNX Runtime 1.32); a model with other heads keeps the attention of the portable graph.

It also turns queries and keys by a rotary embedding, at positions that are shifted so that a batch may be padded on the
left (`_positions`). For that it wants the cosines and sines of all positions. The graph computes them from the frequencies, and
ONNX Runtime folds that at load: the file stays as small as the portable one, and the bits are the same. Where it cannot
(other widths, very many positions), the rotary embedding stays outside in standard operators.

LayerNormalization, Gelu and the residual additions stay as they are. SkipLayerNormalization takes five times as long
as the two operators that it replaces (docs/performance.md), and ONNX Runtime fuses Gelu with its bias at load anyway,
as it does the nodes of an RMSNorm and of SiLU.

B batch, T new tokens, P tokens in the cache, D width of the model, H heads, K heads of keys and values, d width of a
head, r channels of a head that a rotary embedding turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import onnx_ir as ir

from cuantiza.core import contract
from cuantiza.core.errors import UserError
from cuantiza.quantize.rewrite.edit import clean, constant

ORT = "com.microsoft"
# GroupQueryAttention refuses, at every run, heads whose width is not a multiple of _WIDTHS; with a rotary embedding,
# widths that are not one of _ROTARY_WIDTHS, and r that are not one either.
_WIDTHS, _ROTARY_WIDTHS = 8, 16
# The most positions of which cosines and sines are made at load. At 131,072 and r = 128 they take 67 MB.
_MOST_POSITIONS = 131_072
_END = np.iinfo(np.int64).max


@dataclass(frozen=True)
class _Rotary:
    """A rotary embedding with the angles position · `frequencies` [r/2]; `scale` multiplies cosines and sines."""

    frequencies: ir.Value
    scale: ir.Value | None

    @property
    def channels(self) -> int:
        """r."""
        return 2 * int(np.prod(self.frequencies.shape.numpy()))


@dataclass(frozen=True)
class _Attention:
    """The attention of one layer, which maps queries, keys and values to `context` [B, T, H·d].

    `heads` are queries, keys and values of the new tokens as the portable graph attends to them, [B, H or K, T, d];
    `before` are the same before the `rotary` embedding. `past` and `present` are the layer's (key, value) in the KV
    cache, without and with the new tokens. `scale` multiplies the scores; `cap` bounds them, 0 for none; `window` is the
    width of a sliding window in tokens, -1 for none.
    """

    name: str
    heads: tuple[ir.Value, ir.Value, ir.Value]
    before: tuple[ir.Value, ir.Value, ir.Value]
    rotary: _Rotary | None
    context: ir.Value
    past: tuple[ir.Value, ir.Value]
    present: tuple[ir.Value, ir.Value]
    scale: float
    cap: float
    window: int


def check_attention(model: ir.Model, path: Path) -> None:
    """Check that `model` has the attention that export/graphs writes; raise a UserError that names `path` if not."""
    if None in (found := _find_all(model.graph)) or not found:
        raise UserError(
            f"{path}: target ort needs the attention that `export --exporter graph` writes, and this graph has another; "
            "use the recipe without -ort"
        )


def not_fusable(model: ir.Model) -> str | None:
    """Say in a sentence why GroupQueryAttention cannot compute the attention of `model`; None if it can."""
    width = next(value.shape[3] for value in model.graph.inputs if contract.is_past(value.name))
    if isinstance(width, int) and width % _WIDTHS == 0:
        return None
    return (
        f"the attention stays in standard operators, whose KV cache is copied at every token: GroupQueryAttention takes "
        f"heads of a multiple of {_WIDTHS} channels, and this model's have {width}"
    )


def fuse_attention(model: ir.Model, positions: int) -> int:
    """Replace the attention of every layer of `model` by GroupQueryAttention; return the number of layers.

    `positions` is the longest sequence in tokens. `check_attention` has to accept `model` first, and `not_fusable` must
    give None.
    """
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    layers = [layer for layer in _find_all(graph) if layer is not None]
    lengths = _lengths(graph, inputs["input_ids"], inputs["attention_mask"])
    tables = _tables(graph, layers, positions)
    turned_at = _positions(graph, inputs) if tables else None
    for layer in layers:
        _replace(graph, layer, lengths, tables, turned_at)
    graph.opset_imports[ORT] = 1
    model.metadata_props[contract.IN_PLACE] = "1"
    clean(model)
    return len(layers)


def _find_all(graph: ir.Graph) -> list[_Attention | None]:
    return [_find(graph, layer) for layer in range(contract.count_layers(value.name for value in graph.inputs))]


def _find(graph: ir.Graph, layer: int) -> _Attention | None:
    """Find the attention that computes present.{layer}; None if its nodes are not those that export/graphs writes."""
    outputs = {value.name: value for value in graph.outputs}
    present = key, value = outputs[contract.present_name(layer, "key")], outputs[contract.present_name(layer, "value")]
    grouped = _after(key, "Unsqueeze")  # where heads share keys
    scores = _after(grouped or key, "Transpose", "MatMul")
    scaled = _after(scores, "Mul")
    capped = _after(scaled or scores, "Div", "Tanh", "Mul")
    masked = _after(capped or scaled or scores, "Add")
    context = _after(masked, "Softmax", "MatMul", "Transpose", "Reshape")
    if scores is None or masked is None or context is None:
        return None
    window = _window(masked.producer().inputs[1])
    constants = [1.0 if result is None else _number(result.producer().inputs[1]) for result in (scaled, capped)]
    if window is None or None in constants or [item.producer().op_type for item in present] != ["Concat"] * 2:
        return None
    query = scores.producer().inputs[0]
    if grouped is not None:
        query = _before(query, "Reshape")
    if query is None:
        return None
    heads = (query, key.producer().inputs[1], value.producer().inputs[1])
    turned = [_unturned(head, graph) for head in heads[:2]]
    before = (turned[0][0], turned[1][0], heads[2])
    rotary = turned[0][1]
    if rotary != turned[1][1] or any(_before(head, "Transpose") is None for head in before):
        return None
    return _Attention(
        name=(scores.producer().name or f"layer.{layer}").removesuffix(".scores"),
        heads=heads,
        before=before,
        rotary=rotary,
        context=context,
        past=(key.producer().inputs[0], value.producer().inputs[0]),
        present=present,
        scale=constants[0],
        cap=0.0 if capped is None else constants[1],
        window=window,
    )


def _after(value: ir.Value | None, *op_types: str) -> ir.Value | None:
    """The output of a chain of nodes of `op_types` that begins at `value`.

    None if somewhere there is not exactly one such node among those that read the value before.
    """
    for op_type in op_types:
        readers = [use.node for use in value.uses() if use.node.op_type == op_type] if value is not None else []
        value = readers[0].outputs[0] if len(readers) == 1 else None
    return value


def _before(value: ir.Value | None, *op_types: str) -> ir.Value | None:
    """The first input of a chain of nodes of `op_types`, the last of them first, that ends at `value`; None if it is another."""
    for op_type in op_types:
        node = value.producer() if value is not None else None
        value = node.inputs[0] if node is not None and node.op_type == op_type else None
    return value


def _number(value: ir.Value | None) -> float | None:
    """The number that the constant `value` holds; None if it is no constant number."""
    tensor = value.const_value if value is not None else None
    return tensor.numpy().item() if tensor is not None and tensor.size == 1 else None


def _window(mask: ir.Value) -> int | None:
    """The sliding window of a mask of export/graphs/parts.py in tokens, -1 for none; None if it is another mask."""
    chosen = _before(_before(mask, "Unsqueeze") or mask, "Where")
    seen = _before(chosen, "And")
    if _before(seen, "LessOrEqual") is not None:
        return -1
    if _before(seen, "And", "LessOrEqual") is None:
        return None
    # And(causal, Greater(keys, Sub(queries, window)))
    nearer = seen.producer().inputs[1]
    oldest = nearer.producer().inputs[1] if _before(nearer, "Greater") is not None else None
    window = _number(oldest.producer().inputs[1]) if _before(oldest, "Sub") is not None else None
    return None if window is None else int(window)


def _unturned(head: ir.Value, graph: ir.Graph) -> tuple[ir.Value, _Rotary | None]:
    """`head` [B, H, T, d] before its rotary embedding, and this; `head` and None if it has none.

    The rotary embedding is Concat(a·cos − b·sin, b·cos + a·sin, rest) of a, b and the rest, into which `head` is split.
    """
    concat = head.producer()
    if concat is None or concat.op_type != "Concat" or len(concat.inputs) < 2:
        return head, None
    first, second, *rest = concat.inputs
    a_cos, b_cos = _before(first, "Sub"), _before(second, "Add")
    a, b = _before(a_cos, "Mul"), _before(b_cos, "Mul")
    split = a.producer() if a is not None else None
    if split is None or split.op_type != "Split" or [a, b, *rest] != [*split.outputs]:
        return head, None
    b_sin, a_sin = first.producer().inputs[1], second.producer().inputs[1]
    if (_before(b_sin, "Mul"), _before(a_sin, "Mul")) != (b, a):
        return head, None
    cosines, sines = ({product.producer().inputs[1] for product in pair} for pair in ((a_cos, b_cos), (a_sin, b_sin)))
    if len(cosines) > 1 or len(sines) > 1:
        return head, None
    found = [_angles(cosines.pop(), "Cos", graph), _angles(sines.pop(), "Sin", graph)]
    return (split.inputs[0], found[0]) if found[0] == found[1] and found[0] is not None else (head, None)


def _angles(value: ir.Value, function: str, graph: ir.Graph) -> _Rotary | None:
    """What `value` is, [Mul scale](function(position_ids · frequencies)) [B, 1, T, r/2]; None if it is something else."""
    unscaled = _before(value, "Mul")
    angles = _before(value if unscaled is None else unscaled, function)
    positions = _before(angles, "Mul", "Cast", "Unsqueeze")
    if positions is None or positions.name != contract.POSITION_IDS or positions not in graph.inputs:
        return None
    scale = value.producer().inputs[1] if unscaled is not None else None
    frequencies = angles.producer().inputs[1]
    if frequencies.const_value is None or (scale is not None and _number(scale) is None):
        return None
    return _Rotary(frequencies, scale)


def _lengths(graph: ir.Graph, input_ids: ir.Value, attention_mask: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Add the inputs of GroupQueryAttention that all layers share.

    They are the index of the last position int32 [B], the number of positions P+T int32 [], and the attention bias
    that masks padding float32 [B, 1, T, P+T].
    """
    tape = ir.tape.Tape()

    def vector(name: str, *values: int) -> ir.Value:
        return constant(graph, name, np.array(values, np.int64))

    total = tape.op("Squeeze", [tape.op("Shape", [attention_mask], {"start": 1, "end": 2})])
    total = tape.op("Cast", [total], {"to": ir.DataType.INT32})
    batch = tape.op("Shape", [attention_mask], {"start": 0, "end": 1})
    # The bias masks padding, so every sequence of the batch ends at the same position.
    last = tape.op("Expand", [tape.op("Sub", [total, constant(graph, "one_int32", np.int32(1))]), batch])
    padding = tape.op("Cast", [tape.op("Sub", [vector("one", 1), attention_mask])], {"to": ir.DataType.FLOAT})
    bias = tape.op(
        "Unsqueeze",
        [tape.op("Mul", [padding, constant(graph, "masked", np.float32(contract.MASKED))]), vector("axes_1_2", 1, 2)],
    )
    count = tape.op("Shape", [input_ids], {"start": 1, "end": 2})
    shape = tape.op("Concat", [vector("ones_2", 1, 1), count, vector("one", 1)], {"axis": 0})
    bias = tape.op("Expand", [bias, shape])
    graph.insert_before(graph[0], tape.nodes)
    return last, total, bias


def _positions(graph: ir.Graph, inputs: dict[str | None, ir.Value]) -> ir.Value:
    """Add the positions int64 [B, T] at which GroupQueryAttention turns queries and keys.

    In a first prompt, the operator reads the position of one token, the first of the batch, and counts up from it in all
    sequences, padding included (ONNX Runtime 1.32). So later tokens have to count the padding at the beginning of their
    sequence, too: it is added to `position_ids`. Scores do not change, as they depend only on how far apart two positions
    are. A padded token gets 0, which is where a prompt that begins with it has to begin.
    """
    tape, attention_mask = ir.tape.Tape(), inputs["attention_mask"]
    seen = tape.op("Cast", [attention_mask], {"to": ir.DataType.FLOAT})
    padded = tape.op("ArgMax", [seen], {"axis": 1, "keepdims": 1})  # the index of the first token that is none
    first = tape.op("Neg", [tape.op("Shape", [inputs["input_ids"]], {"start": 1, "end": 2})])
    end, axis = (constant(graph, name, np.array([at], np.int64)) for name, at in (("end", _END), ("axis_1", 1)))
    new = tape.op("Slice", [attention_mask, first, end, axis])
    shifted = tape.op("Mul", [tape.op("Add", [inputs[contract.POSITION_IDS], padded]), new])
    graph.insert_before(graph[0], tape.nodes)
    return shifted


def _tables(
    graph: ir.Graph, layers: list[_Attention], positions: int
) -> dict[_Rotary | None, tuple[ir.Value, ir.Value]]:
    """Add the cosines and sines [positions, r/2] of each rotary embedding that GroupQueryAttention can do itself."""
    tape, tables = ir.tape.Tape(), {}
    width = cast("int", layers[0].past[0].shape[3])
    for rotary in dict.fromkeys(layer.rotary for layer in layers):
        if rotary is None or width % _ROTARY_WIDTHS or rotary.channels % _ROTARY_WIDTHS or positions > _MOST_POSITIONS:
            continue
        limits = [constant(graph, f"positions_{number}", np.int64(number)) for number in (0, positions, 1)]
        rows = tape.op("Cast", [tape.op("Range", limits)], {"to": ir.DataType.FLOAT})
        axis = constant(graph, "axis_1", np.array([1], np.int64))
        angles = tape.op("Mul", [tape.op("Unsqueeze", [rows, axis]), rotary.frequencies])
        cosines, sines = tape.op("Cos", [angles]), tape.op("Sin", [angles])
        if rotary.scale is not None:
            cosines, sines = tape.op("Mul", [cosines, rotary.scale]), tape.op("Mul", [sines, rotary.scale])
        tables[rotary] = cosines, sines
    graph.insert_before(graph[0], tape.nodes)
    return tables


def _replace(
    graph: ir.Graph,
    attention: _Attention,
    lengths: tuple[ir.Value, ir.Value, ir.Value],
    tables: dict[_Rotary | None, tuple[ir.Value, ir.Value]],
    turned_at: ir.Value | None,
) -> None:
    last, total, bias = lengths
    tape = ir.tape.Tape()
    heads, kv_heads = _heads(attention)
    attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": attention.scale}
    if attention.cap:
        attributes["softcap"] = attention.cap
    if attention.window > 0:
        attributes["local_window_size"] = attention.window
    inside = attention.rotary in tables
    if inside:
        attributes["do_rotary"] = 1
    rotary = [*tables[attention.rotary], turned_at] if inside else [None, None, None]
    parts = [_joined(graph, tape, head) for head in (attention.before if inside else attention.heads)]
    split = parts[0].producer()
    if split is not None and split.op_type == "Split" and parts == [*split.outputs]:
        parts = [split.inputs[0], None, None]  # which the operator splits itself
    node = ir.node(
        "GroupQueryAttention",
        [*parts, *attention.past, last, total, *rotary, bias],
        attributes,
        domain=ORT,
        num_outputs=3,
        name=attention.name,
    )
    graph.insert_before(attention.context.producer(), [*tape.nodes, node])
    ir.convenience.replace_all_uses_with(attention.context, node.outputs[0])
    for old, new in zip(attention.present, node.outputs[1:], strict=True):
        label, new.shape, new.type = old.name, old.shape, old.type
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        old.name, new.name = None, label


def _heads(attention: _Attention) -> tuple[int, int]:
    """H and K."""
    _, kv_heads, _, width = (cast("int", size) for size in attention.past[0].shape)
    return int(attention.context.producer().inputs[1].const_value.numpy()[-1]) // width, kv_heads


def _joined(graph: ir.Graph, tape: ir.tape.Tape, head: ir.Value) -> ir.Value:
    """`head` [B, n, T, d] as [B, T, n·d]: what was split into heads, where there is nothing in between."""
    split = _before(head, "Transpose")  # [B, T, n, d]
    if split is None:  # a rotary embedding that stays outside
        split = tape.op("Transpose", [head], {"perm": [0, 2, 1, 3]})
    whole = _before(split, "Reshape")
    return (
        tape.op("Reshape", [split, constant(graph, "joined", np.array([0, 0, -1], np.int64))])
        if whole is None
        else whole
    )
