"""What the `ort` target changes about a graph of export/gpt2.py: attention as one operator with its cache in place.

GroupQueryAttention (ONNX Runtime's docs/ContribOperators.md) takes a past of P tokens and gives a present of P+T, as
the portable graph does. Bound to one buffer [B, H, capacity, d] as past and present, it writes the T new rows where
they belong and copies nothing. It masks what comes later by itself; padding reaches it as a bias.

LayerNormalization, Gelu and the additions stay as they are: SkipLayerNormalization takes five times as long as the
two operators that it replaces (docs/performance.md), and ONNX Runtime fuses Gelu and its bias at load.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from cuantiza.core import contract
from cuantiza.core.errors import UserError
from cuantiza.quantize.rewrite.edit import clean, constant

ORT = "com.microsoft"


@dataclass(frozen=True)
class _Attention:
    """One layer's attention: from `qkv` [B, T, 3D] to `context` [B, T, D], through present keys and values."""

    qkv: ir.Value
    context: ir.Value
    past: tuple[ir.Value, ir.Value]
    present: tuple[ir.Value, ir.Value]
    scale: float


def check_attention(model: ir.Model, path: Path) -> None:
    """Raises UserError, which names `path`, where `model` has not the attention that export/gpt2.py writes."""
    if None in (found := _find_all(model.graph)) or not found:
        raise UserError(
            f"{path}: target ort is for graphs that are authored here, and this one has another attention; "
            "take the recipe without -ort"
        )


def fuse_attention(model: ir.Model) -> int:
    """Rewrite the attention of every layer of `model`, which `check_attention` passed; returns how many there were."""
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
    """The attention that gives present.{layer}, where it has the shape that export/gpt2.py gives it."""
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
    """The output of the one `op_type` that reads `value`."""
    if value is None:
        return None
    readers = [use.node for use in value.uses() if use.node.op_type == op_type]
    return readers[0].outputs[0] if len(readers) == 1 else None


def _origin(head: ir.Value) -> ir.Node | None:
    """What made a part of qkv, behind the Reshape and the Transpose that split the heads."""
    for op_type in ("Transpose", "Reshape"):
        node = head.producer()
        if node is None or node.op_type != op_type:
            return None
        head = node.inputs[0]
    return head.producer()


def _lengths(graph: ir.Graph, input_ids: ir.Value, attention_mask: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """(last position int32 [B], its count int32 [], bias of padding float32 [B, 1, T, P+T]), for all layers."""
    tape = ir.tape.Tape()

    def vector(name: str, *values: int) -> ir.Value:
        return constant(graph, name, np.array(values, np.int64))

    total = tape.op("Squeeze", [tape.op("Shape", [attention_mask], {"start": 1, "end": 2})])
    total = tape.op("Cast", [total], {"to": ir.DataType.INT32})
    batch = tape.op("Shape", [attention_mask], {"start": 0, "end": 1})
    # Padding is told by the bias, so that every row of the batch ends at the same position.
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
    heads = int(attention.past[0].shape[1])
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
