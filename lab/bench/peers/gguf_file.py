"""Write a GPT-2 checkpoint as a GGUF file in f32; the tensors' names come from the gguf package."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.torch import load_file

# transformers' Conv1D holds [in, out]; GGUF wants [out, in].
CONV1D = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
# Buffers that old checkpoints store with their weights, and the head, which is tied to the embedding.
SKIPPED = (".attn.bias", ".attn.masked_bias", "lm_head.weight")


def write(checkpoint: Path, tokenizer: Path, target: Path) -> None:
    """Write `checkpoint`, with the tokenizer.json `tokenizer`, to `target`.

    A vocabulary with fewer entries than the model is padded. Raises ValueError for a weight that GGUF's gpt2 lacks.
    """
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    architecture, layers = gguf.MODEL_ARCH.GPT2, config["n_layer"]
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_block_count(layers)
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_tokenizer(writer, json.loads(tokenizer.read_text(encoding="utf-8")), config)
    names = gguf.get_tensor_name_map(architecture, layers)
    for file in sorted(checkpoint.glob("model*.safetensors")):
        for name, tensor in load_file(file).items():
            if name.endswith(SKIPPED):
                continue
            array = tensor.float().numpy()
            array = np.ascontiguousarray(array.T if name.endswith(CONV1D) else array)
            known = names.get_name(name.removeprefix("transformer."), try_suffixes=(".weight", ".bias"))
            if known is None:
                raise ValueError(f"{file}: GGUF's gpt2 has no tensor for {name}")
            writer.add_tensor(known, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
