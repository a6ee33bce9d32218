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

import onnx_ir as ir

from cuantiza.core.inputs.weights.files import Weight
from cuantiza.export.graphs import parts
from cuantiza.export.graphs.llama_config import LlamaConfig
from cuantiza.export.graphs.llama_weights import EMBEDDING, HEAD, arranged, shapes
from cuantiza.export.graphs.rope import turn, turning

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
    op, heads = builder.op, parts.Heads(config.heads, config.kv_heads, config.head_dim)
    modules = parts.Modules(builder, weights, stored, folder)
    weight, linear = modules.weight, modules.linear

    def norm(x: ir.Value, name: str) -> ir.Value:
        mean = op.ReduceMean(op.Pow(x, 2.0), [-1], keepdims=1)
        unit = op.Div(x, op.Sqrt(op.Add(mean, config.epsilon)))
        return op.Mul(unit, weight(f"{name}.weight"), _name=name)

    def split(x: ir.Value, name: str, number: int) -> ir.Value:
        """The linear layer `name` of x, as heads [B, number, T, d], normed where the family does that."""
        y, part = linear(x, f"{name}_proj"), f"{name}_norm"
        normed = family.head_norm if f"{part}.weight" in stored else None  # values are not
        if normed == "whole":
            y = norm(y, part)
        y = op.Reshape(y, [0, 0, number, heads.width])
        if normed == "head":
            y = norm(y, part)
        return op.Transpose(y, perm=[0, 2, 1, 3])

    inputs = parts.add_inputs(builder, len(config.layers), heads)
    present: list[ir.Value] = []
    embedding = weight(EMBEDDING)
    x = op.Gather(embedding, inputs.input_ids, _name="embed_tokens")  # [B, T, D]
    if config.embedding_scale != 1.0:
        x = op.Mul(x, config.embedding_scale)
    windows = list(dict.fromkeys(layer.window for layer in config.layers))
    visible = parts.visible(op, inputs, windows, heads)  # [B, 1, T, P+T] each
    turns = turning(builder, inputs.position_ids, [layer.rope for layer in config.layers if layer.rope])

    for number, layer in enumerate(config.layers):
        block = f"layers.{number}"
        before, after, before_mlp, after_mlp = (name and f"{block}.{name}" for name in family.norms)
        h = norm(x, before) if before else x
        q = split(h, f"{block}.self_attn.q", heads.number)  # [B, H, T, d]
        k = split(h, f"{block}.self_attn.k", heads.of_keys)  # [B, K, T, d]
        v = split(h, f"{block}.self_attn.v", heads.of_keys)
        if layer.rope:
            q, k = (turn(op, part, layer.rope, turns, heads.width) for part in (q, k))
        k = op.Concat(inputs.past[2 * number], k, axis=2)  # [B, K, P+T, d]
        v = op.Concat(inputs.past[2 * number + 1], v, axis=2)
        present += [k, v]
        mask, name = visible[layer.window], f"{block}.self_attn"
        context = parts.attention(op, q, k, v, mask, heads, config.attention_scale, name, config.score_cap)
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
    return parts.finish(builder, logits, present, heads, config.vocabulary)


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
