"""The weights of a model that is built like Llama: their names and shapes, and what is done to them before the graph.

All that the model does to a weight in the same way for every text is done here, so that the graph has no node for it.
Weights stay lazy: each is read, and changed, when the model is saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from cuantiza.core.inputs.weights.files import Weight
from cuantiza.export.graphs.llama_config import TOGETHER, LlamaConfig
from cuantiza.export.graphs.parts import changed
from cuantiza.export.graphs.rope import paired

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


def shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of each weight, as transformers stores it, without the prefix "model."; a tied head is not there.

    Matrices that a family stores as one are named apart.
    """
    width, inner, family = config.width, config.inner, config.family
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    linear = {
        "self_attn.q_proj": (queries, width, config.qkv_bias),
        "self_attn.k_proj": (keys, width, config.qkv_bias),
        "self_attn.v_proj": (keys, width, config.qkv_bias),
        "self_attn.o_proj": (width, queries, config.output_bias),
        "mlp.up_proj": (inner, width, config.mlp_bias),
        "mlp.down_proj": (width, inner, config.mlp_bias),
    }
    if family.gated:
        linear["mlp.gate_proj"] = (inner, width, config.mlp_bias)
    norms = {name: width for name in family.norms if name}
    if family.head_norm == "whole":
        norms |= {"self_attn.q_norm": queries, "self_attn.k_norm": keys}
    elif family.head_norm == "head":
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    found: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocabulary, width), "norm.weight": (width,)}
    for layer in range(len(config.layers)):
        for name, (outputs, inputs, bias) in linear.items():
            found[f"layers.{layer}.{name}.weight"] = (outputs, inputs)
            if bias:
                found[f"layers.{layer}.{name}.bias"] = (outputs,)
        found |= {f"layers.{layer}.{name}.weight": (size,) for name, size in norms.items()}
    return found if config.tied else found | {HEAD: (config.vocabulary, width)}


def left_over(config: LlamaConfig, weights: Mapping[str, Weight]) -> list[str]:
    """The names in `weights` that the graph does not read."""
    known = {HEAD, *shapes(config)}
    return [name for name in _apart(config, weights) if name not in known]


def arranged(config: LlamaConfig, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """`weights` as the graph reads them: apart, paired as rotary embeddings are, with offsets and factors in them."""
    found = _apart(config, weights)
    turned = next((layer.rope.channels for layer in config.layers if layer.rope), 0)
    for name, weight in found.items():
        if config.family.neighbours and ("self_attn.q_proj." in name or "self_attn.k_proj." in name):
            found[name] = changed(weight, lambda array: paired(array, turned, config.head_dim))
        elif config.family.unit_offset and name.endswith("norm.weight"):
            found[name] = changed(weight, lambda array: array + np.float32(1))
        elif config.residual_scale != 1 and (".o_proj." in name or ".down_proj." in name):
            found[name] = changed(weight, lambda array: array * np.float32(config.residual_scale))
    if config.logit_scale != 1 and "norm.weight" in found:
        found["norm.weight"] = changed(found["norm.weight"], lambda array: array * np.float32(config.logit_scale))
    return found


def _apart(config: LlamaConfig, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """`weights` with those that the family stores as one, one below the other, under the names of their parts."""
    wanted = shapes(config)
    found: dict[str, Weight] = {}
    for name, weight in weights.items():
        layer, together = next(
            ((name.split(key)[0], key) for key in config.family.together if f".{key}." in name), ("", "")
        )
        if not together:
            found[name] = weight
            continue
        group, kind, start = together.split(".")[0], name.rpartition(".")[2], 0
        for part in TOGETHER[together]:
            own = f"{layer}{group}.{part}.{kind}"
            # What is left over goes to the last part, whose shape is then refused.
            rows = wanted.get(own, (0,))[0] if part != TOGETHER[together][-1] else weight.shape[0] - start
            found[own] = _rows(weight, start, start + rows)
            start += rows
    return found


def _rows(weight: Weight, start: int, end: int) -> Weight:
    return replace(weight, shape=(max(end - start, 0), *weight.shape[1:]), read=lambda: weight.read()[start:end])
