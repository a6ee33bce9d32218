"""Replace attention by one operator that updates the KV cache in place, for the `ort` target of a graph of gpt2.py.

GroupQueryAttention (ONNX Runtime's docs/ContribOperators.md) reads the keys and values of P past tokens and returns
those of P+T, as the portable graph does. If past and present are bound to the same buffer [B, H, capacity, d], it
writes only the keys and values of the T new tokens and copies nothing. It applies the causal mask itself; padding is
passed to it as an attention bias. It takes only heads whose width is a multiple of 8 (ONNX Runtime 1.32); a model with
other heads keeps the attention of the portable graph.

LayerNormalization, Gelu and the residual additions stay as they are. SkipLayerNormalization takes five times as long
as the two operators that it replaces (docs/performance.md), and ONNX Runtime fuses Gelu with its bias at load anyway.
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
# GroupQueryAttention refuses, at every run, heads whose width is not a multiple of this.
_WIDTHS = 8


@dataclass(frozen=True)
class _Attention:
    """The attention of one layer, which maps `qkv` [B, T, 3D] to `context` [B, T, D].

    `past` and `present` are the layer's (key, value) in the KV cache, without and with the new tokens.
    """

    qkv: ir.Value
    context: ir.Value
    past: tuple[ir.Value, ir.Value]
    present: tuple[ir.Value, ir.Value]
    scale: float


def check_attention(model: ir.Model, path: Path) -> None:
    """Check that `model` has the attention that export/graphs/gpt2.py writes; raise a UserError that names `path` if not."""
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


def fuse_attention(model: ir.Model) -> int:
    """Replace the attention of every layer of `model` by GroupQueryAttention; return the number of layers.

    `check_attention` has to accept `model` first, and `not_fusable` must give None.
    """
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    layers = _find_all(graph)
    lengths = _lengths(graph, inputs["input_ids"], inputs["attention_mask"])
    for number, layer in enumerate(layers):
        _replace(graph, layer, lengths, f"h.{number}.attn")
    graph.opset_imports[ORT] = 1
    model.metadata_props[contract.IN_PLACE] = "1"
    clean(model)
    return len(layers)


def _find_all(graph: ir.Graph) -> list[_Attention | None]:
    return [_find(graph, layer) for layer in range(contract.count_layers(value.name for value in graph.inputs))]


def _find(graph: ir.Graph, layer: int) -> _Attention | None:
    """Find the attention that computes present.{layer}; None if its nodes are not those that export/graphs/gpt2.py writes."""
    outputs = {value.name: value for value in graph.outputs}
    key, value = (outputs.get(contract.present_name(layer, kv)) for kv in ("key", "value"))
    scores = _single(_single(key, "Transpose"), "MatMul")
    scaled = _single(scores, "Mul")
    scale = scaled.producer().inputs[1].const_value if scaled is not None else ir.tensor(np.float32(1))
    softmax = _single(_single(scaled if scaled is not None else scores, "Add"), "Softmax")
    context = _single(_single(_single(softmax, "MatMul"), "Transpose"), "Reshape")
    if context is None or scale is None:
        return None
    heads = [scores.producer().inputs[0], key.producer().inputs[1], value.producer().inputs[1]]
    split = _origin(heads[0])
    if split is None or split.op_type != "Split" or [_origin(head) for head in heads] != [split] * 3:
        return None
    past = (key.producer().inputs[0], value.producer().inputs[0])
    return _Attention(split.inputs[0], context, past, (key, value), scale.numpy().item())


def _single(value: ir.Value | None, op_type: str) -> ir.Value | None:
    """Return the output of the only `op_type` node that reads `value`; None if there is not exactly one."""
    if value is None:
        return None
    readers = [use.node for use in value.uses() if use.node.op_type == op_type]
    return readers[0].outputs[0] if len(readers) == 1 else None


def _origin(head: ir.Value) -> ir.Node | None:
    """Return the node that produced a part of qkv, before the Reshape and the Transpose that split it into heads."""
    for op_type in ("Transpose", "Reshape"):
        node = head.producer()
        if node is None or node.op_type != op_type:
            return None
        head = node.inputs[0]
    return head.producer()


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


def _replace(graph: ir.Graph, attention: _Attention, lengths: tuple[ir.Value, ir.Value, ir.Value], name: str) -> None:
    last, total, bias = lengths
    heads = cast("int", attention.past[0].shape[1])
    node = ir.node(
        "GroupQueryAttention",
        [attention.qkv, None, None, *attention.past, last, total, None, None, None, bias],
        {"num_heads": heads, "kv_num_heads": heads, "scale": attention.scale},
        domain=ORT,
        num_outputs=3,
        name=name,
    )
    graph.insert_before(attention.context.producer(), node)
    ir.convenience.replace_all_uses_with(attention.context, node.outputs[0])
    for old, new in zip(attention.present, node.outputs[1:], strict=True):
        label, new.shape, new.type = old.name, old.shape, old.type
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        old.name, new.name = None, label
