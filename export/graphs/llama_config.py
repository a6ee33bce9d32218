"""Parse the config.json of a model that is built like Llama: a table of the families, and what one of them is.

transformers' own configuration class of the model type reads the file, so that every spelling that it knows is read,
and what a file leaves out is what transformers takes for it. What no field says, because transformers has it in code,
is in the table.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.gpt2_config import ACTIVATIONS
from cuantiza.core.inputs.model_types import OPTIMUM_TYPES
from cuantiza.export.graphs.rope import NotExported, Rope, rope

T = TypeVar("T")

MOST_LAYERS = 10_000  # transformers makes lists as long as a file says
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer")
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
# Where a layer has its norms: of the input of attention, of its output, of the input of the MLP, of its output.
_BEFORE = ("input_layernorm", None, "post_attention_layernorm", None)
_AFTER = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
_AROUND = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


# Matrices that some families store as one: those of queries, keys and values, and those of an MLP with a gate.
_QKV, _GATE_UP = "self_attn.qkv_proj", "mlp.gate_up_proj"
TOGETHER = {_QKV: ("q_proj", "k_proj", "v_proj"), _GATE_UP: ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class Family:
    """What transformers' code says of a model type.

    A bias is there always, never, or as the named field says. `norms` are the names of a layer's norms (see above).
    `head_norm` says of what queries and keys are normed: each "head", the "whole" of them, or None. With
    `unit_offset`, norms multiply by 1 + weight. The rotary embedding turns `partial`ly if only some channels of a head,
    and with `neighbours` it turns channels 2i and 2i + 1 instead of i and i + r/2. `windows` says which layers have a sliding window: "none", "all" where
    there is one, or as "layer_types" says. `together` names the matrices of a layer that are stored as one.
    """

    qkv_bias: bool | str = "attention_bias"
    output_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = "mlp_bias"
    gated: bool = True
    activation: str = "hidden_act"
    norms: tuple[str | None, ...] = _BEFORE
    head_norm: str | None = None
    unit_offset: bool = False
    partial: bool = False
    neighbours: bool = False
    windows: str = "none"
    together: tuple[str, ...] = ()
    scales: Callable[[Any], dict[str, Any]] = lambda config: {}


def _granite(config: Any) -> dict[str, Any]:
    return {
        "embedding_scale": config.embedding_multiplier,
        "attention_scale": config.attention_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": 1 / config.logits_scaling,
    }


def _gemma(config: Any) -> dict[str, Any]:
    return {"embedding_scale": config.hidden_size**0.5}


def _gemma2(config: Any) -> dict[str, Any]:
    scale = config.query_pre_attn_scalar**-0.5
    return _gemma(config) | {"attention_scale": scale, "logit_cap": config.final_logit_softcapping}


def _gemma2_capped(config: Any) -> dict[str, Any]:
    return _gemma2(config) | {"score_cap": config.attn_logit_softcapping}


FAMILIES = {
    "arcee": Family(gated=False),
    "ernie4_5": Family(qkv_bias="use_bias", output_bias="use_bias", mlp_bias="use_bias", neighbours=True),
    "gemma": Family(mlp_bias=False, unit_offset=True, scales=_gemma),
    "gemma2": Family(
        mlp_bias=False,
        activation="hidden_activation",
        norms=_AROUND,
        unit_offset=True,
        windows="layer_types",
        scales=_gemma2_capped,
    ),
    "gemma3_text": Family(
        mlp_bias=False,
        activation="hidden_activation",
        norms=_AROUND,
        head_norm="head",
        unit_offset=True,
        windows="layer_types",
        scales=_gemma2,
    ),
    "glm": Family(output_bias=False, mlp_bias=False, partial=True, neighbours=True, together=(_GATE_UP,)),
    "glm4": Family(
        output_bias=False,
        mlp_bias=False,
        norms=("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
        partial=True,
        neighbours=True,
        together=(_GATE_UP,),
    ),
    "granite": Family(scales=_granite),
    "helium": Family(output_bias=False, neighbours=True),
    "llama": Family(),
    "ministral": Family(qkv_bias=False, output_bias=False, mlp_bias=False, windows="layer_types"),
    "mistral": Family(qkv_bias=False, output_bias=False, mlp_bias=False, windows="all"),
    "olmo2": Family(mlp_bias=False, norms=_AFTER, head_norm="whole"),
    "olmo3": Family(mlp_bias=False, norms=_AFTER, head_norm="whole", windows="layer_types"),
    "phi3": Family(
        qkv_bias=False, output_bias=False, mlp_bias=False, partial=True, windows="all", together=(_QKV, _GATE_UP)
    ),
    "qwen2": Family(qkv_bias=True, output_bias=False, mlp_bias=False, windows="layer_types"),
    "qwen3": Family(mlp_bias=False, head_norm="head", windows="layer_types"),
    "seed_oss": Family(output_bias="attention_out_bias"),
    "smollm3": Family(windows="layer_types"),
}


@dataclass(frozen=True)
class Layer:
    """What may differ between layers: the rotary embedding, None for none, and the sliding window in tokens, None for none."""

    rope: Rope | None
    window: int | None


@dataclass(frozen=True)
class LlamaConfig:
    """What changes the logits of a model that is built like Llama.

    `inner` is the width of the MLP. The scales multiply the embedding, the attention scores, what each half of a layer adds, and the logits. A cap c bounds a value
    x by c · tanh(x / c).
    """

    model_type: str
    family: Family
    vocabulary: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: tuple[Layer, ...]
    activation: str
    epsilon: float
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    tied: bool
    attention_scale: float
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    score_cap: float | None = None
    logit_cap: float | None = None


def parse_llama(fields: Mapping[str, Any], path: Path) -> LlamaConfig:
    """The model that `fields` of a config.json describe, whose model_type is one of FAMILIES.

    Raises UserError where transformers does not read the fields, where they have a value that no such model has, or one
    that is not exported; `path` is named in it.
    """
    return explained(_parse, fields, path)


def _parse(fields: Mapping[str, Any]) -> LlamaConfig:
    # transformers takes a mistral file that says of each layer whether it slides for a ministral one.
    alternating = fields["model_type"] == "mistral" and "layer_types" in fields
    fields = {**fields, "model_type": "ministral"} if alternating else fields
    family, config = FAMILIES[fields["model_type"]], transformers_config(fields, SIZES)

    def flag(bias: bool | str) -> bool:
        return bias if isinstance(bias, bool) else bool(getattr(config, bias))

    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if getattr(config, "use_bidirectional_attention", False):
        raise NotExported(
            "use_bidirectional_attention is true; only models whose tokens see none after them are exported",
            optimum=False,
        )
    return LlamaConfig(
        model_type=fields["model_type"],
        family=family,
        vocabulary=config.vocab_size,
        width=config.hidden_size,
        inner=config.intermediate_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        layers=tuple(_layer(config, family, number, head_dim) for number in range(config.num_hidden_layers)),
        activation=activation_of(config, family.activation),
        epsilon=epsilon_of(config, "rms_norm_eps"),
        qkv_bias=flag(family.qkv_bias),
        output_bias=flag(family.output_bias),
        mlp_bias=flag(family.mlp_bias),
        tied=bool(config.tie_word_embeddings),
        **{"attention_scale": head_dim**-0.5} | family.scales(config),
    )


def _layer(config: Any, family: Family, number: int, head_dim: int) -> Layer:
    parameters = config.rope_parameters
    kind = config.layer_types[number] if family.windows == "layer_types" else "full_attention"
    if isinstance(parameters.get(kind), dict):
        parameters = parameters[kind]
    trained = parameters.get("original_max_position_embeddings")
    if parameters.get("rope_type") == "yarn" and parameters.get("factor") is None and trained:
        parameters = {**parameters, "factor": config.max_position_embeddings / trained}
    slides = family.windows == "all" or kind == "sliding_attention"
    window = config.sliding_window if slides else None
    if kind == "sliding_attention" and not window:
        raise ValueError(f"layer_types[{number}] is {kind}, and sliding_window is {window}")
    check_size("sliding_window", window)
    channels = int(head_dim * parameters.get("partial_rotary_factor", 1.0)) if family.partial else head_dim
    turned = getattr(config, "no_rope_layers", None) is None or config.no_rope_layers[number]
    return Layer(rope(parameters, channels) if turned else None, window)


def explained(parse: Callable[[Mapping[str, Any]], T], fields: Mapping[str, Any], path: Path) -> T:
    """What `parse` makes of `fields`. Raises UserError, which names `path`, where it raises anything."""
    try:
        return parse(fields)
    except NotExported as error:
        optimum = error.optimum and fields["model_type"] in OPTIMUM_TYPES
        mend = "EXPORTER=optimum may export it" if optimum else "choose another model"
        raise UserError(f"{path}: {error}; {mend}") from None
    except Exception as error:  # transformers raises many kinds of exception, and says what is wrong in the last line
        said = [type(error).__name__, *filter(None, map(str.strip, str(error).splitlines()))][-1]
        said = said.partition("Error: ")[2] or said
        if "NoneType" in said and (nulls := _nulls(fields)):
            said = f"transformers cannot read it ({said}), which may be due to null as {' and '.join(nulls)}"
        raise UserError(f"{path}: {said}; take the config.json of the original checkpoint") from None


def _nulls(fields: Mapping[str, Any]) -> list[str]:
    """The fields of the rotary embedding that are null, such as rope_scaling.factor."""
    objects = {key: fields.get(key) for key in ("rope_scaling", "rope_parameters")}
    return [
        f"{key}.{name}"
        for key, found in objects.items()
        if isinstance(found, dict)
        for name in found
        if found[name] is None
    ]


def transformers_config(fields: Mapping[str, Any], sizes: Iterable[str]) -> Any:
    """The configuration that transformers makes of `fields`.

    Raises ValueError where one of `sizes` is there and is no positive whole number, or the layers are too many.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for name in sizes:
        check_size(name, fields.get(name))
    for name in _LAYERS:
        if (layers := fields.get(name) or 0) > MOST_LAYERS:
            raise ValueError(f"{name} is {layers}, and no such model has more than {MOST_LAYERS}")
    transformers.logging.set_verbosity_error()
    return CONFIG_MAPPING[fields["model_type"]].from_dict(copy.deepcopy(dict(fields)))  # it changes what it gets


def check_size(name: str, value: Any) -> None:
    """Raise ValueError where the `value` of the field `name` is there and is no positive whole number."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31):
        raise ValueError(f"{name} is {value!r} where a positive whole number is needed")


def activation_of(config: Any, field: str) -> str:
    """The activation that `field` names. Raises NotExported where transformers alone has it, ValueError where none has."""
    from transformers.activations import ACT2FN

    name = getattr(config, field)
    if name not in (*ACTIVATIONS, "relu2"):
        kind = NotExported if name in [*ACT2FN] else ValueError
        raise kind(f"{field} {name!r} is not one of {', '.join(ACTIVATIONS)}, relu2")
    return str(name)


def epsilon_of(config: Any, field: str) -> float:
    """What a norm adds, in `field`, so that it never divides by 0. Raises ValueError where it is not positive."""
    epsilon = getattr(config, field)
    if not 0 < epsilon < math.inf:
        raise ValueError(f"{field} is {epsilon!r} where a small positive number is needed")
    return float(epsilon)
