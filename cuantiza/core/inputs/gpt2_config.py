"""Parse the config.json of a GPT-2 checkpoint, of any age and under any of its names, into a frozen dataclass."""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cuantiza.core.errors import UserError

ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu", "relu", "silu", "swish", "tanh")
# What transformers' GPT2Config has for a size that config.json does not give.
_DEFAULTS = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
# Other names of a size: those of transformers' attribute_map, and that of 2019's files for the length of a text.
_ALIASES = {
    "n_embd": ("hidden_size",),
    "n_head": ("num_attention_heads",),
    "n_layer": ("num_hidden_layers",),
    "n_positions": ("max_position_embeddings",),
}
_OLD_LENGTH = "n_ctx"
_EXACT = 2**53  # below it, every whole number is a float
# GPT-SW3's model is GPT-2; only its tokenizer is another. transformers reads this type with GPT2Config.
_TYPES = ("gpt2", "gpt-sw3")
# A file without model_type is a GPT-2 if it has one of GPT-2's own names and none of its relatives'.
_OWN_NAMES = ("n_embd", "n_layer", "n_head")
_RELATIVES = ("rotary_dim", "afn", "d_model", "multi_query", "attention_layers")


@dataclass(frozen=True)
class GPT2Config:
    """The fields of transformers' GPT2Config that change the logits. Names and defaults are those of transformers."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    activation_function: str
    layer_norm_epsilon: float
    scale_attn_weights: bool
    scale_attn_by_inverse_layer_idx: bool
    tie_word_embeddings: bool

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


def is_gpt2(fields: dict[str, Any]) -> bool:
    """Say whether `fields` of a config.json are a GPT-2's: by model_type, else by architectures, else by GPT-2's names."""
    if fields.get("model_type") not in (None, ""):
        return fields["model_type"] in _TYPES
    if names := fields.get("architectures"):
        return isinstance(names, list) and any(str(name).startswith("GPT2") for name in names)
    return any(name in fields for name in _OWN_NAMES) and not any(name in fields for name in _RELATIVES)


def canonical_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Return `fields` of a config.json as every reader of a GPT-2 takes them; those of another model as they are.

    Sizes have GPT-2's own names (n_embd …) and are there even where the file left the default out; whole numbers
    written as 1024.0 are integers; model_type is "gpt2"; ids of special tokens that transformers would refuse are left
    out, of a list of start tokens all but the first. Values that are wrong stay: `parse_config` names them. The result
    differs from `fields` where transformers could not load the file, or would read it otherwise.
    """
    if not is_gpt2(fields):
        return fields
    aliases = {alias for names in _ALIASES.values() for alias in names}
    canonical = {key: value for key, value in fields.items() if key not in aliases} | {"model_type": "gpt2"}
    for key, default in _DEFAULTS.items():
        canonical[key] = _whole(_given(fields, key, default))
    if "n_inner" in fields:
        canonical["n_inner"] = _whole(fields["n_inner"])
    if type(epsilon := fields.get("layer_norm_epsilon")) is int and epsilon < _EXACT:
        canonical["layer_norm_epsilon"] = float(epsilon)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = _ids(fields.get(key))
        if key in fields and ids is None:
            del canonical[key]
        elif ids:
            canonical[key] = ids[0] if len(ids) == 1 or key != "eos_token_id" else ids
    return canonical


def parse_config(fields: dict[str, Any], path: Path) -> GPT2Config:
    """Return the GPT-2 that `fields` describe. Keys that a file of 2020 lacks take transformers' defaults.

    Raises UserError where fields have a wrong type, contradict each other, or have a value that no GPT2LMHeadModel has;
    `path` is named in it, and every such field.
    """
    canonical = canonical_fields(fields | {"model_type": "gpt2"})
    wrong: list[str] = []

    def number(key: str, default: int | None = None) -> int:
        value = canonical[key] if canonical.get(key) is not None else default
        name = next((name for name in (key, *_ALIASES.get(key, ()), _OLD_LENGTH) if name in fields), key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            wrong.append(f"{name} is {reprlib.repr(value)} where a positive whole number is needed")
            return 1
        return value

    def flag(key: str, default: bool) -> bool:
        value = fields.get(key, default)
        if not isinstance(value, bool):
            wrong.append(f"{key} is {value!r} where true or false is needed")
        return value is True

    for key, aliases in _ALIASES.items():
        for alias in aliases:
            both = [_whole(fields.get(name)) for name in (key, alias)]
            if None not in both and both[0] != both[1]:
                wrong.append(f"{key} is {both[0]!r} but {alias}, another name of it, is {both[1]!r}; keep one of them")
    width, heads = number("n_embd"), number("n_head")
    if width % heads and not wrong:
        wrong.append(f"n_embd {width} is not a multiple of n_head {heads}")
    activation = fields.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        wrong.append(f"activation_function {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if flag("add_cross_attention", False):
        wrong.append(
            "add_cross_attention is true: it is the decoder of an encoder-decoder; only GPT-2 without an encoder is exported"
        )
    epsilon = canonical.get("layer_norm_epsilon", 1e-5)
    if not isinstance(epsilon, float) or not math.isfinite(epsilon) or epsilon <= 0:
        wrong.append(f"layer_norm_epsilon is {epsilon!r} where a small positive number is needed")
    config = GPT2Config(
        vocab_size=number("vocab_size"),
        n_positions=number("n_positions"),
        n_embd=width,
        n_layer=number("n_layer"),
        n_head=heads,
        n_inner=number("n_inner", default=4 * width),
        activation_function=activation,
        layer_norm_epsilon=epsilon,
        scale_attn_weights=flag("scale_attn_weights", True),
        scale_attn_by_inverse_layer_idx=flag("scale_attn_by_inverse_layer_idx", False),
        tie_word_embeddings=flag("tie_word_embeddings", True),
    )
    if wrong:
        raise UserError(f"{path}: {'; '.join(wrong)}")
    return config


def odd_fields(fields: dict[str, Any]) -> tuple[str, ...]:
    """Return a sentence for each field of a GPT-2's config.json that was taken otherwise than it reads."""
    if not is_gpt2(fields):
        return ()
    sentences = []
    if fields.get("model_type") in (None, ""):
        sentences.append('config.json has no model_type; its fields are those of a GPT-2, so it was taken as "gpt2"')
    elif fields["model_type"] != "gpt2":
        sentences.append(
            f'config.json has model_type {fields["model_type"]!r}, whose model is GPT-2\'s; exported as "gpt2"'
        )
    length, old = _whole(_given(fields | {_OLD_LENGTH: None}, "n_positions", None)), _whole(fields.get(_OLD_LENGTH))
    if None not in (length, old) and length != old:
        sentences.append(
            f"config.json says n_positions {length} and {_OLD_LENGTH} {old}; n_positions was taken, as transformers does"
        )
    return tuple(sentences)


def _given(fields: dict[str, Any], key: str, default: int | None) -> Any:
    names = (key, *_ALIASES.get(key, ()), *((_OLD_LENGTH,) if key == "n_positions" else ()))
    return next((fields[name] for name in names if fields.get(name) is not None), default)


def _whole(value: Any) -> Any:
    """Return `value` as an int where it is a whole number written as 1024.0, else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT else value


def _ids(value: Any) -> list[int] | None:
    """Return the token ids of `value`, one or a list of them; None where it holds something else, or none."""
    found = [_whole(item) for item in (value if isinstance(value, list) else [value])]
    return found if found and all(type(item) is int and item >= 0 for item in found) else None
