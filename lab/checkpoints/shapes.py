"""The dimensions of the models that the lab measures: es-mini, GPT-2's sizes, and small Llama-shaped models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from cuantiza.core.inputs.model_config import read_config
from lab import ES_MINI

TABLES = (".wte.weight", ".wpe.weight", ".embed_tokens.weight")


@dataclass(frozen=True)
class Shape:
    """The dimensions of a GPT-2. `folder` is its checkpoint; None means random weights."""

    name: str
    layers: int
    width: int
    heads: int
    vocabulary: int = 50257
    positions: int = 1024
    folder: Path | None = None

    @property
    def body_parameters(self) -> int:
        """The parameters without the token embedding (which is also the tied head) and the position embedding."""
        return sum(prod(dims) for name, dims in self.tensors() if not name.endswith(TABLES))

    @property
    def parameters(self) -> int:
        return sum(prod(dims) for _, dims in self.tensors())

    @property
    def query_width(self) -> int:
        """The number of elements of a token's queries in one layer."""
        return self.width

    @property
    def key_width(self) -> int:
        """The number of elements of a token's keys in one layer; its values have as many."""
        return self.width

    def config(self) -> dict[str, Any]:
        """The fields of config.json. The tokens of start and end are those of es-mini's tokenizer."""
        dimensions = {
            "n_layer": self.layers,
            "n_embd": self.width,
            "n_head": self.heads,
            "n_positions": self.positions,
            "vocab_size": self.vocabulary,
        }
        return read_config(ES_MINI) | dimensions | {"dtype": "float32"}

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield (name, dimensions) of every tensor in a checkpoint that transformers' GPT2LMHeadModel saves."""
        width, hidden = self.width, 4 * self.width
        yield "transformer.wte.weight", (self.vocabulary, width)
        yield "transformer.wpe.weight", (self.positions, width)
        linear_layers = {
            "attn.c_attn": (width, 3 * width),
            "attn.c_proj": (width, width),
            "mlp.c_fc": (width, hidden),
            "mlp.c_proj": (hidden, width),
        }
        for layer in range(self.layers):
            for norm in ("ln_1", "ln_2"):
                yield f"transformer.h.{layer}.{norm}.weight", (width,)
                yield f"transformer.h.{layer}.{norm}.bias", (width,)
            for name, (inputs, outputs) in linear_layers.items():
                yield f"transformer.h.{layer}.{name}.weight", (inputs, outputs)
                yield f"transformer.h.{layer}.{name}.bias", (outputs,)
        yield "transformer.ln_f.weight", (width,)
        yield "transformer.ln_f.bias", (width,)


@dataclass(frozen=True, kw_only=True)
class LlamaShape(Shape):
    """The dimensions of a model of `model_type` "llama", or "qwen3", which has norms of queries and keys as well.

    Its head and its token embedding are tied.
    """

    model_type: str
    key_heads: int
    head_width: int
    hidden: int
    rope_theta: float

    @property
    def query_width(self) -> int:
        return self.heads * self.head_width

    @property
    def key_width(self) -> int:
        return self.key_heads * self.head_width

    def config(self) -> dict[str, Any]:
        return {
            "architectures": [f"{self.model_type.capitalize()}ForCausalLM"],
            "model_type": self.model_type,
            "num_hidden_layers": self.layers,
            "hidden_size": self.width,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "head_dim": self.head_width,
            "intermediate_size": self.hidden,
            "max_position_embeddings": self.positions,
            "vocab_size": self.vocabulary,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "dtype": "float32",
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield (name, dimensions) of every tensor in a checkpoint that transformers' own class saves."""
        width, queries, keys = self.width, self.query_width, self.key_width
        linear_layers = {
            "self_attn.q_proj": (queries, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, queries),
            "mlp.gate_proj": (self.hidden, width),
            "mlp.up_proj": (self.hidden, width),
            "mlp.down_proj": (width, self.hidden),
        }
        norms = {"input_layernorm": width, "post_attention_layernorm": width}
        if self.model_type == "qwen3":
            norms |= {"self_attn.q_norm": self.head_width, "self_attn.k_norm": self.head_width}
        yield "model.embed_tokens.weight", (self.vocabulary, width)
        for layer in range(self.layers):
            for name, size in norms.items():
                yield f"model.layers.{layer}.{name}.weight", (size,)
            for name, dims in linear_layers.items():
                yield f"model.layers.{layer}.{name}.weight", dims
        yield "model.norm.weight", (width,)


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("es-mini", layers=6, width=256, heads=4, vocabulary=8192, folder=ES_MINI),
        Shape("gpt2", layers=12, width=768, heads=12),
        Shape("gpt2-medium", layers=24, width=1024, heads=16),
        Shape("gpt2-large", layers=36, width=1280, heads=20),
        Shape("gpt2-xl", layers=48, width=1600, heads=25),
        LlamaShape(
            "smollm2-135m",
            layers=30,
            width=576,
            heads=9,
            vocabulary=49152,
            positions=8192,
            model_type="llama",
            key_heads=3,
            head_width=64,
            hidden=1536,
            rope_theta=100_000.0,
        ),
        LlamaShape(
            "qwen3-0.6b",
            layers=28,
            width=1024,
            heads=16,
            vocabulary=151_936,
            positions=40_960,
            model_type="qwen3",
            key_heads=8,
            head_width=128,
            hidden=3072,
            rope_theta=1_000_000.0,
        ),
    )
}
