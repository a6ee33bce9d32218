"""Write a GPT-2, Llama or Qwen 3 checkpoint as a GGUF file in f32; the tensors' names come from the gguf package."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from safetensors.torch import load_file

# transformers' Conv1D holds [in, out]; GGUF wants [out, in].
CONV1D = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
# Buffers that old checkpoints store with their weights, and the head where it is tied to the embedding.
SKIPPED, HEAD = (".attn.bias", ".attn.masked_bias"), "lm_head.weight"


@dataclass(frozen=True)
class Tensors:
    """How the tensors of a checkpoint become those of GGUF: the architecture, and the map of names.

    `changed` returns the array that GGUF has for a checkpoint's tensor of that name.
    """

    architecture: int
    names: gguf.TensorNameMap
    changed: Callable[[str, np.ndarray], np.ndarray]

    def name(self, name: str) -> str | None:
        """GGUF's name of a checkpoint's tensor; None if the architecture has none."""
        return self.names.get_name(name.removeprefix("transformer."), try_suffixes=(".weight", ".bias"))


def tensors(config: dict) -> Tensors:
    """How GGUF holds the model of a config.json. Raises ValueError for one of another kind than these."""
    kind = config["model_type"]
    if kind == "gpt2":
        architecture, layers, changed = gguf.MODEL_ARCH.GPT2, config["n_layer"], _gpt2_array
    elif kind == "llama":
        architecture, layers, changed = gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"], _llama_array(config)
    elif kind == "qwen3":
        # It rotates the two halves, as transformers does, so its rows stay.
        architecture, layers, changed = gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"], _same_array
    else:
        raise ValueError(f"a checkpoint of {kind} cannot be written as GGUF here; only gpt2, llama and qwen3 can")
    return Tensors(architecture, gguf.get_tensor_name_map(architecture, layers), changed)


def write(checkpoint: Path, tokenizer: Path, target: Path) -> None:
    """Write `checkpoint`, with the tokenizer.json `tokenizer`, to `target`.

    A vocabulary with fewer entries than the model is padded. Raises ValueError for another architecture, and for a
    weight that the architecture lacks.
    """
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    known = tensors(config)
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[known.architecture])
    (_add_gpt2 if config["model_type"] == "gpt2" else _add_llama)(writer, config)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_tokenizer(writer, json.loads(tokenizer.read_text(encoding="utf-8")), config)
    for name, array in _weights(checkpoint, config):
        if (found := known.name(name)) is None:
            raise ValueError(f"{checkpoint}: GGUF's {config['model_type']} has no tensor for {name}")
        writer.add_tensor(found, np.ascontiguousarray(known.changed(name, array)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _weights(checkpoint: Path, config: dict) -> Iterator[tuple[str, np.ndarray]]:
    """The name and the float32 array of every tensor that GGUF has as well."""
    tied = config["model_type"] == "gpt2" or config.get("tie_word_embeddings", False)
    for file in sorted(checkpoint.glob("model*.safetensors")):
        for name, tensor in load_file(file).items():
            if not name.endswith(SKIPPED) and not (tied and name == HEAD):
                yield name, tensor.float().numpy()


def _same_array(name: str, array: np.ndarray) -> np.ndarray:
    return array


def _gpt2_array(name: str, array: np.ndarray) -> np.ndarray:
    return array.T if name.endswith(CONV1D) else array


def _llama_array(config: dict) -> Callable[[str, np.ndarray], np.ndarray]:
    """Reorder the rows of queries and keys: llama.cpp rotates neighbouring pairs, transformers the two halves."""
    queries = config["num_attention_heads"]
    heads = {".q_proj.weight": queries, ".k_proj.weight": config.get("num_key_value_heads") or queries}

    def changed(name: str, array: np.ndarray) -> np.ndarray:
        count = next((number for end, number in heads.items() if name.endswith(end)), None)
        if count is None:
            return array
        rows, width = array.shape
        return array.reshape(count, 2, rows // count // 2, width).swapaxes(1, 2).reshape(rows, width)

    return changed


def _add_gpt2(writer: gguf.GGUFWriter, config: dict) -> None:
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])


def _add_llama(writer: gguf.GGUFWriter, config: dict) -> None:
    heads = config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    width = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_rope_dimension_count(width)
    writer.add_key_length(width)
    writer.add_value_length(width)
    # transformers 5 writes rope_parameters, earlier versions rope_theta.
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])


def _add_tokenizer(writer: gguf.GGUFWriter, fields: dict, config: dict) -> None:
    """Add the byte-level BPE: tokens, their types and merges. The benchmark only uses token ids, so this suffices."""
    tokens = {index: token for token, index in fields["model"]["vocab"].items()}
    special = {entry["id"]: entry["content"] for entry in fields.get("added_tokens", [])}
    tokens |= special
    types = gguf.TokenType
    ids = range(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens.get(index, f"[PAD{index}]") for index in ids])
    writer.add_token_types(
        [types.CONTROL if i in special else types.NORMAL if i in tokens else types.UNUSED for i in ids]
    )
    merges = fields["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
