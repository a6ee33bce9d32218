"""Parse the config.json of a model whose layers are GPT-2's in kind: a table of the families, and what one of them is.

Such a layer has LayerNorms, attention, and an MLP of two linear layers without a gate. The table says what a family
calls its modules; functions read what differs from the configuration that transformers makes of the file.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cuantiza.export.graphs.llama_config import (
    MOST_LAYERS,
    SIZES,
    activation_of,
    epsilon_of,
    explained,
    transformers_config,
)
from cuantiza.export.graphs.rope import NotExported, Rope, rope

HEAD = "lm_head"
_SIZES = (
    *SIZES,
    "ffn_dim",
    "word_embed_proj_dim",
    "num_layers",
    "num_heads",
    "window_size",
    "n_embd",
    "n_layer",
    "n_head",
    "n_inner",
    "rotary_dim",
)
# What transformers has in code.
_OPT_EPSILON = 1e-5
_GPTJ_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}


@dataclass(frozen=True)
class Family:
    """What a checkpoint of a model type calls its modules, after `prefix`, and what transformers' code says of it.

    Those from `attention` to `norms` are of one layer, under `layers`.{number}; `count` is config.json's field with the
    number of layers. `attention` are queries, keys and values, which a checkpoint holds apart, or together as `fused`,
    head by head. `norms` stand before attention and before the MLP; the second is None where both read the first. With
    `neighbours`, a rotary embedding turns channels 2i and 2i + 1 and not i and i + r/2. The first `offset` rows of the
    position embeddings are no position's. `read` gives what ClassicConfig has beside what all families share.
    """

    read: Callable[[Any], dict[str, Any]]
    embedding: str
    attention: tuple[str, str, str]
    output: str
    up: str
    down: str
    norms: tuple[str, str | None]
    last_norm: str
    prefix: str = "model."
    layers: str = "layers"
    count: str = "num_hidden_layers"
    fused: str | None = None
    neighbours: bool = False
    positions: str | None = None
    offset: int = 0
    head_bias: bool = False


@dataclass(frozen=True)
class ClassicConfig:
    """What changes the logits of such a model.

    `inner` is the width of the MLP. `windows` are the sliding window of each layer in tokens, None for none. Where
    `positions` is not 0, so many positions have an embedding of their own; `rope` is the rotary embedding, None for
    none. `embedding_width` is that of a token's embedding, which a linear layer then brings to `width`. With
    `parallel`, the MLP reads the residual stream as attention does, without what attention adds. With `norm_after`,
    norms are of the sums. `last_norm` says whether there is one before the head, and `norm_weights` whether norms have
    scales and biases.
    """

    model_type: str
    family: Family
    vocabulary: int
    width: int
    heads: int
    head_dim: int
    tied: bool
    inner: int
    activation: str
    epsilon: float
    windows: tuple[int | None, ...]
    kv_heads: int
    attention_scale: float
    qkv_bias: bool
    output_bias: bool
    embedding_width: int
    mlp_bias: bool = True
    positions: int = 0
    rope: Rope | None = None
    parallel: bool = False
    norm_after: bool = False
    last_norm: bool = True
    norm_weights: bool = True


def _opt(config: Any) -> dict[str, Any]:
    return _named(config, "activation_function") | {
        "epsilon": _OPT_EPSILON,
        "inner": config.ffn_dim,
        "qkv_bias": config.enable_bias,
        "output_bias": config.enable_bias,
        "mlp_bias": config.enable_bias,
        "positions": config.max_position_embeddings,
        "embedding_width": config.word_embed_proj_dim,
        "norm_after": not config.do_layer_norm_before,
        "last_norm": config.do_layer_norm_before and not config._remove_final_layer_norm,
        "norm_weights": config.layer_norm_elementwise_affine,
    }


def _gpt_neo(config: Any) -> dict[str, Any]:
    windows = {"global": None, "local": config.window_size}
    if odd := [kind for kind in config.attention_layers if kind not in windows]:
        raise ValueError(f"attention_types has {odd[0]!r} where global or local is needed")
    return _named(config, "activation_function", "layer_norm_epsilon") | {
        "inner": config.intermediate_size or 4 * config.hidden_size,
        "qkv_bias": False,
        "output_bias": True,
        "positions": config.max_position_embeddings,
        "windows": tuple(windows[kind] for kind in config.attention_layers),
        "attention_scale": 1.0,
    }


def _gpt_neox(config: Any) -> dict[str, Any]:
    return _named(config, "hidden_act", "layer_norm_eps") | {
        "inner": config.intermediate_size,
        "qkv_bias": config.attention_bias,
        "output_bias": config.attention_bias,
        # An odd number is turned as if it were one more.
        "rope": rope(config.rope_parameters, _turned(config)),
        "parallel": config.use_parallel_residual,
    }


def _gptj(config: Any) -> dict[str, Any]:
    return _named(config, "activation_function", "layer_norm_epsilon") | {
        "inner": config.n_inner or 4 * config.n_embd,
        "qkv_bias": False,
        "output_bias": False,
        "rope": rope(_GPTJ_ROPE, _paired(config.rotary_dim, "rotary_dim")),
        "parallel": True,
    }


def _phi(config: Any) -> dict[str, Any]:
    if config.qk_layernorm:
        raise NotExported("qk_layernorm is true; Phi is exported only where queries and keys have no norm")
    return _named(config, "hidden_act", "layer_norm_eps") | {
        **_grouped(config),
        "inner": config.intermediate_size,
        "qkv_bias": True,
        "output_bias": True,
        "rope": rope(config.rope_parameters, _paired(_turned(config), "partial_rotary_factor")),
        "parallel": True,
    }


def _starcoder2(config: Any) -> dict[str, Any]:
    return _named(config, "hidden_act", "norm_epsilon") | {
        **_grouped(config),
        "inner": config.intermediate_size,
        "qkv_bias": config.use_bias,
        "output_bias": config.use_bias,
        "mlp_bias": config.use_bias,
        "rope": rope(config.rope_parameters, _paired(_head_dim(config), "head_dim")),
        "windows": (config.sliding_window,) * config.num_hidden_layers,
    }


def _named(config: Any, activation: str, epsilon: str | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"activation": activation_of(config, activation)}
    return found | ({"epsilon": epsilon_of(config, epsilon)} if epsilon else {})


def _grouped(config: Any) -> dict[str, Any]:
    width = _head_dim(config)
    return {"kv_heads": config.num_key_value_heads, "head_dim": width, "attention_scale": width**-0.5}


def _turned(config: Any) -> int:
    """How many channels of a head the rotary embedding turns."""
    return int(_head_dim(config) * config.rope_parameters.get("partial_rotary_factor", 1.0))


def _paired(channels: int, field: str) -> int:
    """`channels`, whose number `field` says. Raises ValueError where one of them would have no other to turn with."""
    if channels % 2:
        raise ValueError(f"{field} turns {channels} channels of a head, and they are turned in pairs")
    return channels


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _parts(prefix: str) -> tuple[str, str, str]:
    return f"{prefix}.q_proj", f"{prefix}.k_proj", f"{prefix}.v_proj"


FAMILIES = {
    "gpt_neo": Family(
        read=_gpt_neo,
        prefix="transformer.",
        embedding="wte",
        positions="wpe",
        layers="h",
        count="num_layers",
        attention=_parts("attn.attention"),
        output="attn.attention.out_proj",
        up="mlp.c_fc",
        down="mlp.c_proj",
        norms=("ln_1", "ln_2"),
        last_norm="ln_f",
    ),
    "gpt_neox": Family(
        read=_gpt_neox,
        prefix="gpt_neox.",
        embedding="embed_in",
        attention=("attention.query", "attention.key", "attention.value"),
        fused="attention.query_key_value",
        output="attention.dense",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        norms=("input_layernorm", "post_attention_layernorm"),
        last_norm="final_layer_norm",
    ),
    "gptj": Family(
        read=_gptj,
        prefix="transformer.",
        embedding="wte",
        layers="h",
        count="n_layer",
        attention=_parts("attn"),
        neighbours=True,
        output="attn.out_proj",
        up="mlp.fc_in",
        down="mlp.fc_out",
        norms=("ln_1", None),
        last_norm="ln_f",
        head_bias=True,
    ),
    "opt": Family(
        read=_opt,
        embedding="decoder.embed_tokens",
        positions="decoder.embed_positions",
        offset=2,
        layers="decoder.layers",
        attention=_parts("self_attn"),
        output="self_attn.out_proj",
        up="fc1",
        down="fc2",
        norms=("self_attn_layer_norm", "final_layer_norm"),
        last_norm="decoder.final_layer_norm",
    ),
    "phi": Family(
        read=_phi,
        embedding="embed_tokens",
        attention=_parts("self_attn"),
        output="self_attn.dense",
        up="mlp.fc1",
        down="mlp.fc2",
        norms=("input_layernorm", None),
        last_norm="final_layernorm",
        head_bias=True,
    ),
    "starcoder2": Family(
        read=_starcoder2,
        embedding="embed_tokens",
        attention=_parts("self_attn"),
        output="self_attn.o_proj",
        up="mlp.c_fc",
        down="mlp.c_proj",
        norms=("input_layernorm", "post_attention_layernorm"),
        last_norm="norm",
    ),
}
# OPT's linear layers between a token's embedding and the model's width.
PROJECT_IN, PROJECT_OUT = "decoder.project_in", "decoder.project_out"


def parse_classic(fields: Mapping[str, Any], path: Path) -> ClassicConfig:
    """The model that `fields` of a config.json describe, whose model_type is one of FAMILIES.

    Raises UserError where transformers does not read the fields, where they have a value that no such model has, or one
    that is not exported; `path` is named in it.
    """
    return explained(_parse, fields, path)


def _parse(fields: Mapping[str, Any]) -> ClassicConfig:
    _check_types(fields.get("attention_types") or [])
    family, config = FAMILIES[fields["model_type"]], transformers_config(fields, _SIZES)
    heads = config.num_attention_heads
    if config.hidden_size % heads:
        raise ValueError(f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads {heads}")
    shared: dict[str, Any] = {
        "model_type": fields["model_type"],
        "family": family,
        "vocabulary": config.vocab_size,
        "width": config.hidden_size,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": config.hidden_size // heads,
        "tied": bool(config.tie_word_embeddings),
        "windows": (None,) * config.num_hidden_layers,
        "attention_scale": (config.hidden_size // heads) ** -0.5,
        "embedding_width": config.hidden_size,
    }
    found = ClassicConfig(**shared | family.read(config))
    if heads % found.kv_heads:
        raise ValueError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {found.kv_heads}")
    if found.rope and not 0 < found.rope.channels <= found.head_dim:
        raise ValueError(
            f"rotary_dim, rotary_pct or partial_rotary_factor says that {found.rope.channels} of the {found.head_dim} "
            "channels of a head are turned"
        )
    return found


def _check_types(types: Any) -> None:
    """Raise ValueError unless `types` are GPT-Neo's attention_types, of which transformers makes a list of all layers."""
    for item in types if isinstance(types, list) else [types]:
        match item:
            case [list(kinds), int(times)] if len(kinds) * times <= MOST_LAYERS:
                continue
        raise ValueError(
            f"attention_types has {reprlib.repr(item)} where [[kind, ..], times] is needed, of {MOST_LAYERS} layers at most"
        )


def shapes(config: ClassicConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of each weight, as transformers stores it, without the prefix; a tied head is not there.

    Queries, keys and values that a family stores as one are named apart.
    """
    family, width, inner = config.family, config.width, config.inner
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    linear = {
        family.output: (width, queries, config.output_bias),
        family.up: (inner, width, config.mlp_bias),
        family.down: (width, inner, config.mlp_bias),
    }
    linear |= {
        name: (size, width, config.qkv_bias) for name, size in zip(family.attention, (queries, keys, keys), strict=True)
    }
    found: dict[str, tuple[int, ...]] = {f"{family.embedding}.weight": (config.vocabulary, config.embedding_width)}
    if family.positions:
        found[f"{family.positions}.weight"] = (family.offset + config.positions, width)
    if config.embedding_width != width:
        found[f"{PROJECT_IN}.weight"] = (width, config.embedding_width)
        found[f"{PROJECT_OUT}.weight"] = (config.embedding_width, width)
    for block in blocks(config):
        for name, (outputs, inputs, bias) in linear.items():
            found[f"{block}.{name}.weight"] = (outputs, inputs)
            if bias:
                found[f"{block}.{name}.bias"] = (outputs,)
    if config.norm_weights:
        norms = [f"{block}.{name}" for block in blocks(config) for name in family.norms if name]
        norms += [family.last_norm] if config.last_norm else []
        found |= {f"{norm}.{kind}": (width,) for norm in norms for kind in ("weight", "bias")}
    if not config.tied:
        found[f"{HEAD}.weight"] = (config.vocabulary, config.embedding_width)
    return found | ({f"{HEAD}.bias": (config.vocabulary,)} if family.head_bias else {})


def blocks(config: ClassicConfig) -> list[str]:
    """The names of the layers."""
    return [f"{config.family.layers}.{number}" for number in range(len(config.windows))]
