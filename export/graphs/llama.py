"""Llama and the models that are built like it, as an ONNX graph of standard operators.

The code reads from top to bottom like the model: RMSNorm, attention with a rotary embedding and grouped keys and
values, a gated MLP. The families of llama_config.py differ in where norms are, in biases, and in a few numbers. The
inputs and outputs are those of cuantiza/core/contract.py, parts.py has what GPT-2 shares, and rope.py the rotary
embeddings.

B batch, T new tokens, P tokens in the KV cache, D width of the model, H heads, K heads of keys and values, d width of a
head, V vocabulary.

What rewrites a graph (quantize/rewrite) finds attention by these nodes; those in brackets depend on the model:

    q   MatMul [Add bias] [norm] Reshape [norm] Transpose [rotary] [Reshape [0, K, H/K, -1, d], where K < H]
    k   MatMul [Add bias] [norm] Reshape [norm] Transpose [rotary] Concat(past, ·) = present [Unsqueeze, K < H]
    v   MatMul [Add bias] Reshape Transpose Concat(past, ·) = present [Unsqueeze, K < H]

    MatMul(q, Transpose(k)) [Mul scale] [Div, Tanh, Mul] Add(mask) Softmax MatMul(·, v) Transpose Reshape
    [Slice, in the last layer] MatMul [Add bias]

    rotary   Split into (a, b) or (a, b, rest), Concat(a·cos - b·sin, b·cos + a·sin, rest), where
             cos = Cos(Mul(Cast(Unsqueeze(position_ids)), frequencies)), once for all layers that share frequencies
    norm     Pow 2, ReduceMean, Add epsilon, Sqrt, Div, Mul scale, which ONNX Runtime fuses at load
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxscript
from onnx_ir import DataType

from cuantiza.core.inputs.weights.files import Weight
from cuantiza.export.graphs import parts
from cuantiza.export.graphs.llama_config import LlamaConfig
from cuantiza.export.graphs.llama_weights import EMBEDDING, HEAD, arranged, shapes
from cuantiza.export.graphs.rope import Rope

_LAYER = re.compile(r"layers\.(\d+)\.")


def build(config: LlamaConfig, weights: Mapping[str, Weight], opset: int, folder: Path) -> ir.Model:
    """Build the graph of `config` with `weights`, by transformers' names without "model.", read only when it is saved.

    Raises UserError where a weight is missing, has another shape, or (when it is read) is not finite. The message names
    `folder`.
    """
    layers = {int(found[1]): name for name in weights if (found := _LAYER.match(name))}
    parts.check_layers(layers, len(config.layers), "num_hidden_layers", "layers", folder)
    family, weights = config.family, arranged(config, weights)
    # Head and embedding may differ though config.json calls them tied; transformers then takes both.
    stored = shapes(config) | {HEAD: (config.vocabulary, config.width)}
    builder = parts.begin(config.model_type, opset)
    op = builder.op

    def weight(name: str, turned: bool = False) -> ir.Value:
        return parts.weight(builder, weights, folder, name, stored[name], turned)

    def linear(x: ir.Value, name: str) -> ir.Value:
        y = op.MatMul(x, weight(f"{name}.weight", turned=True), _name=name)
        return op.Add(y, weight(f"{name}.bias"), _name=f"{name}.bias") if f"{name}.bias" in stored else y

    def norm(x: ir.Value, name: str) -> ir.Value:
        mean = op.ReduceMean(op.Pow(x, 2.0), [-1], keepdims=1)
        unit = op.Div(x, op.Sqrt(op.Add(mean, config.epsilon)))
        return op.Mul(unit, weight(f"{name}.weight"), _name=name)

    def heads(x: ir.Value, name: str, number: int) -> ir.Value:
        """The linear layer `name` of x, split into heads [B, number, T, d], normed where the family does that."""
        y, part = linear(x, f"{name}_proj"), f"{name}_norm"
        if family.head_norm == "whole" and f"{part}.weight" in stored:
            y = norm(y, part)
        y = op.Reshape(y, [0, 0, number, config.head_dim])
        if family.head_norm == "head" and f"{part}.weight" in stored:
            y = norm(y, part)
        return op.Transpose(y, perm=[0, 2, 1, 3])

    inputs = parts.add_inputs(builder, len(config.layers), config.kv_heads, config.head_dim)
    present: list[ir.Value] = []
    embedding = weight(EMBEDDING)
    x = op.Gather(embedding, inputs.input_ids, _name="embed_tokens")  # [B, T, D]
    if config.embedding_scale != 1.0:
        x = op.Mul(x, config.embedding_scale)
    windows = list(dict.fromkeys(layer.window for layer in config.layers))
    visible = parts.visible(op, inputs, windows)  # [B, 1, T, P+T] each
    if config.kv_heads < config.heads:
        visible = {window: op.Unsqueeze(mask, [1]) for window, mask in visible.items()}
    turns = _turns(builder, inputs.position_ids, [layer.rope for layer in config.layers if layer.rope])

    for number, layer in enumerate(config.layers):
        block = f"layers.{number}"
        before, after, before_mlp, after_mlp = (name and f"{block}.{name}" for name in family.norms)
        h = norm(x, before) if before else x
        q = heads(h, f"{block}.self_attn.q", config.heads)  # [B, H, T, d]
        k = heads(h, f"{block}.self_attn.k", config.kv_heads)  # [B, K, T, d]
        v = heads(h, f"{block}.self_attn.v", config.kv_heads)
        if layer.rope:
            turned = layer.rope.channels
            q, k = (_rotate(op, part, turns[layer.rope], turned, config.head_dim - turned) for part in (q, k))
        k = op.Concat(inputs.past[2 * number], k, axis=2)  # [B, K, P+T, d]
        v = op.Concat(inputs.past[2 * number + 1], v, axis=2)
        present += [k, v]
        context = parts.attention(
            op,
            q,
            k,
            v,
            visible[layer.window],
            config.attention_scale,
            f"{block}.self_attn",
            config.heads,
            config.kv_heads,
            config.head_dim,
            config.score_cap,
        )
        if number == len(config.layers) - 1:
            context, x = parts.asked(op, inputs.keep, context, x)  # [B, n or T, ..]
        h = linear(context, f"{block}.self_attn.o_proj")
        x = op.Add(x, norm(h, after) if after else h)
        h = norm(x, before_mlp) if before_mlp else x
        up = linear(h, f"{block}.mlp.up_proj")
        if family.gated:
            gate = linear(h, f"{block}.mlp.gate_proj")
            up = op.Mul(parts.activation(op, gate, config.activation, opset), up)
        else:
            up = parts.activation(op, up, config.activation, opset)
        h = linear(up, f"{block}.mlp.down_proj")
        x = op.Add(x, norm(h, after_mlp) if after_mlp else h)

    x = norm(x, "norm")
    tied = parts.is_tied(weights, EMBEDDING, HEAD, config.tied)
    logits = parts.head(op, x, embedding if tied else weight(HEAD))
    if config.logit_cap is not None:
        logits = op.Mul(op.Tanh(op.Div(logits, config.logit_cap)), config.logit_cap)
    return parts.finish(builder, logits, present, config.vocabulary)


def describe(config: LlamaConfig) -> str:
    """The sizes of a model in a line for users."""
    shared = f", which share {config.kv_heads} keys and values" if config.kv_heads < config.heads else ""
    return (
        f"{config.model_type}: {len(config.layers)} layers of width {config.width}, {config.heads} heads of "
        f"{config.head_dim}{shared}, MLP of {config.inner} with {'gated ' if config.family.gated else ''}"
        f"{config.activation}, a vocabulary of {config.vocabulary}"
    )


def size(config: LlamaConfig) -> parts.Size:
    """The number of parameters of a model."""
    counts = {name: math.prod(shape) for name, shape in shapes(config).items()}
    return parts.Size(sum(counts.values()), counts[EMBEDDING], config.tied)


def _turns(
    builder: onnxscript.GraphBuilder, position_ids: ir.Value, ropes: list[Rope]
) -> dict[Rope, tuple[ir.Value, ir.Value]]:
    """Cosines and sines [B, 1, T, r/2] of the angles by which each of `ropes` turns the new tokens."""
    op, turns = builder.op, {}
    for number, rope in enumerate(dict.fromkeys(ropes)):
        name = f"rotary.{number}.frequencies"
        frequencies = builder.initializer(ir.tensor(np.array(rope.frequencies, np.float32), name=name), name)
        positions = op.Cast(op.Unsqueeze(position_ids, [1, 3]), to=DataType.FLOAT)  # [B, 1, T, 1]
        angles = op.Mul(positions, frequencies)
        cosines, sines = op.Cos(angles), op.Sin(angles)
        if rope.scale != 1.0:
            cosines, sines = op.Mul(cosines, rope.scale), op.Mul(sines, rope.scale)
        turns[rope] = cosines, sines
    return turns


def _rotate(
    op: onnxscript.OpBuilder, x: ir.Value, turns: tuple[ir.Value, ir.Value], turned: int, rest: int
) -> ir.Value:
    """Turn x [B, H, T, d] by `turns`: of its first `turned` channels, i and i + `turned`/2; the `rest` stays.

    `turns` are cosines and sines [B, 1, T, turned/2].
    """
    cosines, sines = turns
    if rest:
        a, b, *others = op.Split(x, [turned // 2, turned // 2, rest], axis=-1, _outputs=3)
    else:
        a, b, *others = op.Split(x, axis=-1, num_outputs=2, _outputs=2)
    first = op.Sub(op.Mul(a, cosines), op.Mul(b, sines))
    second = op.Add(op.Mul(b, cosines), op.Mul(a, sines))
    return op.Concat(first, second, *others, axis=-1)
