"""Make genai_config.json, with which onnxruntime-genai (ONNX Runtime's own generation loop) can load an artifact.

onnxruntime-genai reads the tokenizer from tokenizer.json and tokenizer_config.json, which every artifact has.
"""

from __future__ import annotations

from typing import Any

from cuantiza.core import contract

GENAI_CONFIG = "genai_config.json"
# The model types of config.json that onnxruntime-genai 0.18 knows by the same name (src/models/model_type.h there) and
# for which it expects two cache tensors, keys and values, per layer. "decoder" is any other such graph: GPT-2's too,
# since "gpt2" means one joint tensor per layer.
_TYPES = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "llama",
    "mistral",
    "olmo",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)
_OTHER_TYPE = "decoder"
# The longest text by default where past and present are one buffer, which onnxruntime-genai allocates for all of it: at
# 131,072 positions, Llama 3.2 1B would take 8.6 GB.
_LONGEST = 4096


def tokenizer_warning(tokenizer: dict[str, Any]) -> str | None:
    """Why onnxruntime-genai gives other token ids than `tokenizer`, the fields of tokenizer.json; None if it does not.

    Found by trying release 0.18: its reader knows byte-level BPE, with any regular expression before it, and overlooks
    normalizers and `add_prefix_space`. Other kinds get wrong ids or an error.
    """
    steps = [step for step in (tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")) if step]
    kinds = [str(step.get("type")) for step in steps]
    before = tokenizer.get("pre_tokenizer") or {}
    parts = before.get("pretokenizers") or [before]
    bytes_last = parts[-1].get("type") == "ByteLevel" and not parts[-1].get("add_prefix_space")
    splits = all(part.get("type") == "Split" for part in parts[:-1]) if parts[:-1] else before.get("use_regex", True)
    model = tokenizer["model"].get("type", "BPE")
    if model == "BPE" and bytes_last and splits and not tokenizer.get("normalizer"):
        return None
    return (
        f"onnxruntime-genai does not read this kind of tokenizer ({', '.join([*kinds, model])}) as tokenizer.json says; "
        "give it token ids that another tokenizer made"
    )


def genai_config(
    config: dict[str, Any],
    generation: dict[str, Any],
    *,
    layers: int,
    heads: int,
    head_dim: int,
    vocabulary: int,
    positions: int,
    in_place: bool,
) -> dict[str, Any]:
    """The fields of genai_config.json for a graph with the inputs and outputs of cuantiza/core/contract.py.

    The special tokens come from `generation` (generation_config.json), else from `config` (config.json), as do the
    model's type, its width and its number of query heads. `heads` is the number of key and value heads; `positions` is
    the longest sequence in tokens. `in_place`: past and present may be one buffer [B, heads, capacity, head_dim].
    """
    tokens = {key: value for key, value in (config | generation).items() if value is not None}
    end = tokens.get("eos_token_id", tokens.get("bos_token_id"))  # one token id, or a list of them
    first_end = end[0] if isinstance(end, list) else end
    kind = config.get("model_type")
    return {
        "model": {
            "type": kind if kind in _TYPES else _OTHER_TYPE,
            "vocab_size": vocabulary,
            "context_length": positions,
            "bos_token_id": tokens.get("bos_token_id", first_end),
            "eos_token_id": end,
            "pad_token_id": tokens.get("pad_token_id", first_end),
            "decoder": {
                "filename": "model.onnx",
                "head_size": head_dim,
                "hidden_size": config.get("hidden_size", heads * head_dim),
                "num_attention_heads": config.get("num_attention_heads", heads),
                "num_key_value_heads": heads,
                "num_hidden_layers": layers,
                "session_options": {"provider_options": []},
                "inputs": {
                    "input_ids": contract.INPUT_IDS,
                    "attention_mask": contract.ATTENTION_MASK,
                    "position_ids": contract.POSITION_IDS,
                    "past_key_names": contract.past_name("%d", "key"),
                    "past_value_names": contract.past_name("%d", "value"),
                },
                "outputs": {
                    "logits": contract.LOGITS,
                    "present_key_names": contract.present_name("%d", "key"),
                    "present_value_names": contract.present_name("%d", "value"),
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": min(positions, _LONGEST) if in_place else positions,
            "past_present_share_buffer": in_place,
        },
    }
