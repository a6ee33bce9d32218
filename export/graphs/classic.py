"""OPT, GPT-Neo, GPT-NeoX and others whose layers are GPT-2's in kind, as an ONNX graph of standard operators.

The code reads from top to bottom like the model: LayerNorm, attention, LayerNorm, an MLP without a gate. The families
of classic_config.py differ in names, in where norms and biases are, in how positions enter (an embedding, or a rotary
one), and in whether attention and MLP stand one after the other or side by side. The inputs and outputs are those of
cuantiza/core/contract.py; parts.py and rope.py have what other graphs share. The nodes of attention are those that
llama.py describes.

B batch, T new tokens, P tokens in the KV cache, D width of the model, H heads, K heads of keys and values, d width of a
head, V vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from cuantiza.core.inputs.weights.checkpoint import Checkpoint, read_by_names
from cuantiza.core.inputs.weights.files import Weight
from cuantiza.export.graphs import parts
from cuantiza.export.graphs.classic_config import FAMILIES, HEAD, PROJECT_IN, PROJECT_OUT, ClassicConfig, blocks, shapes
from cuantiza.export.graphs.rope import paired, turn, turning


def read(folder: Path, fields: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint in `folder`, whose config.json has `fields`. Raises UserError as `read_by_names` does."""
    family = FAMILIES[fields["model_type"]]
    return read_by_names(folder, fields, f"{family.embedding}.weight", family.prefix)


def build(config: ClassicConfig, weights: Mapping[str, Weight], opset: int, folder: Path) -> ir.Model:
    """Build the graph of `config` with `weights`, by transformers' names without a prefix, read only when it is saved.

    Raises UserError where a weight is missing, has another shape, or (when it is read) is not finite. The message names
    `folder`.
    """
    family = config.family
    layer = re.compile(rf"{re.escape(family.layers)}\.(\d+)\.")
    layers = {int(found[1]): name for name in weights if (found := layer.match(name))}
    parts.check_layers(layers, len(config.windows), family.count, family.layers, folder)
    weights = arranged(config, weights)
    # Head and embedding may differ though config.json calls them tied; transformers then takes both.
    stored = shapes(config) | {f"{HEAD}.weight": (config.vocabulary, config.embedding_width)}
    if family.positions:
        stored[f"{family.positions}.weight"] = (config.positions, config.width)
    stored |= {f"{norm}.{kind}": (config.width,) for norm in _norms(config) for kind in ("weight", "bias")}
    builder = parts.begin(config.model_type, opset)
    op, heads = builder.op, parts.Heads(config.heads, config.kv_heads, config.head_dim)
    modules = parts.Modules(builder, weights, stored, folder)
    linear = modules.linear

    def norm(x: ir.Value, name: str) -> ir.Value:
        return modules.layer_norm(x, name, config.epsilon)

    def mlp(x: ir.Value, block: str) -> ir.Value:
        up = parts.activation(op, linear(x, f"{block}.{family.up}"), config.activation, opset)
        return linear(up, f"{block}.{family.down}")

    inputs = parts.add_inputs(builder, len(config.windows), heads)
    present: list[ir.Value] = []
    embedding = modules.weight(f"{family.embedding}.weight")
    x = op.Gather(embedding, inputs.input_ids, _name=family.embedding)  # [B, T, D]
    if config.embedding_width != config.width:
        x = linear(x, PROJECT_IN)
    if family.positions:
        table = modules.weight(f"{family.positions}.weight")
        x = op.Add(x, op.Gather(table, inputs.position_ids, _name=family.positions))
    visible = parts.visible(op, inputs, list(dict.fromkeys(config.windows)), heads)
    turns = turning(builder, inputs.position_ids, [config.rope] if config.rope else [])

    for number, (block, window) in enumerate(zip(blocks(config), config.windows, strict=True)):
        first, second = _layer_norms(config, block)
        h = x if config.norm_after else norm(x, first)
        q, k, v = (
            parts.split_heads(op, linear(h, f"{block}.{name}"), count, heads.width)  # [B, H or K, T, d]
            for name, count in zip(family.attention, (heads.number, heads.of_keys, heads.of_keys), strict=True)
        )
        if config.rope:
            q, k = (turn(op, part, config.rope, turns, heads.width) for part in (q, k))
        k = op.Concat(inputs.past[2 * number], k, axis=2)  # [B, K, P+T, d]
        v = op.Concat(inputs.past[2 * number + 1], v, axis=2)
        present += [k, v]
        name = f"{block}.{family.output.rpartition('.')[0]}"
        context = parts.attention(op, q, k, v, visible[window], heads, config.attention_scale, name)
        if number == len(config.windows) - 1:
            context, x = parts.asked(op, inputs.keep, context, x)  # [B, n or T, ..]
        attended = op.Add(x, linear(context, f"{block}.{family.output}"))
        if config.norm_after:
            x = norm(attended, first)
            x = norm(op.Add(x, mlp(x, block)), second)
        else:
            h = norm(x if config.parallel else attended, second)
            x = op.Add(attended, mlp(h, block))

    if config.last_norm:
        x = norm(x, family.last_norm)
    if config.embedding_width != config.width:
        x = linear(x, PROJECT_OUT)
    tied = parts.is_tied(weights, f"{family.embedding}.weight", f"{HEAD}.weight", config.tied)
    logits = parts.head(op, x, embedding if tied else modules.weight(f"{HEAD}.weight"))
    if family.head_bias:
        logits = op.Add(logits, modules.weight(f"{HEAD}.bias"), _name=f"{HEAD}.bias")
    return parts.finish(builder, logits, present, heads, config.vocabulary)


def describe(config: ClassicConfig) -> str:
    """The sizes of a model in a line for users."""
    shared = f", which share {config.kv_heads} keys and values" if config.kv_heads < config.heads else ""
    return (
        f"{config.model_type}: {len(config.windows)} layers of width {config.width}, {config.heads} heads of "
        f"{config.head_dim}{shared}, MLP of {config.inner} with {config.activation}, a vocabulary of {config.vocabulary}"
    )


def size(config: ClassicConfig) -> parts.Size:
    """The number of parameters of a model."""
    counts = {name: math.prod(shape) for name, shape in shapes(config).items()}
    return parts.Size(sum(counts.values()), counts[f"{config.family.embedding}.weight"], config.tied)


def left_over(config: ClassicConfig, weights: Mapping[str, Weight]) -> list[str]:
    """The names in `weights` that the graph does not read."""
    known = {f"{HEAD}.weight", *shapes(config)}
    return [name for name in _apart(config, weights) if name not in known]


def arranged(config: ClassicConfig, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """`weights` as the graph reads them: queries, keys and values apart, positions from 0, every norm with both weights."""
    family, found = config.family, _apart(config, weights)
    if family.neighbours and config.rope:
        order = partial(paired, channels=config.rope.channels, width=config.head_dim)
        turned = tuple(f".{name}." for name in family.attention[:2])
        found |= {
            name: parts.changed(weight, order) for name, weight in found.items() if any(t in name for t in turned)
        }
    if family.offset and (table := f"{family.positions}.weight") in found:
        found[table] = _from(found[table], family.offset)
    if not config.norm_weights:
        fill = {
            "weight": partial(np.ones, config.width, np.float32),
            "bias": partial(np.zeros, config.width, np.float32),
        }
        for norm in _norms(config):
            found |= {f"{norm}.{kind}": Weight((config.width,), "float32", read) for kind, read in fill.items()}
    for block in blocks(config) if family.norms[1] is None else []:
        first, second = _layer_norms(config, block)
        for kind in ("weight", "bias"):
            if f"{first}.{kind}" in found:
                found[f"{second}.{kind}"] = found[f"{first}.{kind}"]
    return found


def _layer_norms(config: ClassicConfig, block: str) -> tuple[str, str]:
    """The names of a layer's norms. Where attention and MLP share one, the MLP has a copy, which is smoothed apart."""
    first, second = config.family.norms
    return f"{block}.{first}", f"{block}.{second or f'{first}.mlp'}"


def _norms(config: ClassicConfig) -> list[str]:
    """The names of all norms of the graph."""
    names = [name for block in blocks(config) for name in _layer_norms(config, block)]
    return [*names, config.family.last_norm] if config.last_norm else names


def _apart(config: ClassicConfig, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """`weights` with queries, keys and values under names of their own."""
    family = config.family
    found: dict[str, Weight] = {}
    for name, weight in weights.items():
        if family.fused and f".{family.fused}." in name:
            for number, part in enumerate(family.attention):
                found[name.replace(family.fused, part)] = _part(weight, number, config.heads)
        else:
            found[name] = weight
    return found


def _part(weight: Weight, number: int, heads: int) -> Weight:
    """Queries (`number` 0), keys (1) or values (2) of a weight [H·3·d, ..] that holds the three head by head."""

    def read() -> np.ndarray:
        array = weight.read()
        return array.reshape(heads, 3, -1, *array.shape[1:])[:, number].reshape(-1, *array.shape[1:])

    return replace(weight, shape=(*(rows // 3 for rows in weight.shape[:1]), *weight.shape[1:]), read=read)


def _from(weight: Weight, first: int) -> Weight:
    """`weight` without the rows before `first`."""
    return replace(
        weight,
        shape=(*(rows - first for rows in weight.shape[:1]), *weight.shape[1:]),
        read=lambda: weight.read()[first:],
    )
