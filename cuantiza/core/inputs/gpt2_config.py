"""Parse the config.json of a GPT-2 checkpoint, of any age, into a frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cuantiza.core.errors import UserError

ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu", "relu", "silu", "swish", "tanh")


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


def parse_config(fields: dict, path: Path) -> GPT2Config:
    """Return the GPT-2 that `fields` describe. Keys that a file of 2020 lacks take transformers' defaults.

    Raises UserError where a field has a wrong type, or a value that no GPT2LMHeadModel has; `path` is named in it.
    """

    def number(*keys: str, default: int | None = None) -> int:
        value = next((fields[key] for key in keys if fields.get(key) is not None), default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise UserError(f"{path}: {keys[0]} is {value!r} where a positive whole number is needed")
        return value

    def flag(key: str, default: bool) -> bool:
        value = fields.get(key, default)
        if not isinstance(value, bool):
            raise UserError(f"{path}: {key} is {value!r} where true or false is needed")
        return value

    width, heads = number("n_embd", "hidden_size", default=768), number("n_head", "num_attention_heads", default=12)
    if width % heads:
        raise UserError(f"{path}: n_embd {width} is not a multiple of n_head {heads}")
    activation = fields.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        raise UserError(f"{path}: activation_function {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if flag("add_cross_attention", False):
        raise UserError(f"{path}: add_cross_attention is true; only GPT-2 without an encoder is exported")
    vocabulary = number("vocab_size", default=50257)
    start = next((fields[key] for key in ("bos_token_id", "eos_token_id") if fields.get(key) is not None), None)
    if not isinstance(start, int) or not 0 <= start < vocabulary:
        raise UserError(
            f"{path}: bos_token_id (or eos_token_id in its place) is {start!r}; it has to be the token id that starts a text, from 0 to {vocabulary - 1}"
        )
    epsilon = fields.get("layer_norm_epsilon", 1e-5)
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise UserError(f"{path}: layer_norm_epsilon is {epsilon!r} where a small positive number is needed")
    return GPT2Config(
        vocab_size=vocabulary,
        n_positions=number("n_positions", "n_ctx", default=1024),
        n_embd=width,
        n_layer=number("n_layer", "num_hidden_layers", default=12),
        n_head=heads,
        n_inner=number("n_inner", default=4 * width),
        activation_function=activation,
        layer_norm_epsilon=epsilon,
        scale_attn_weights=flag("scale_attn_weights", True),
        scale_attn_by_inverse_layer_idx=flag("scale_attn_by_inverse_layer_idx", False),
        tie_word_embeddings=flag("tie_word_embeddings", True),
    )
