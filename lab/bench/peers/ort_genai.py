"""onnxruntime-genai, Microsoft's own generation loop, driving our `-ort` artifact: what its loop costs beside ours.

past_present_share_buffer: keys and values in one buffer of max_length, which the artifact's GroupQueryAttention
updates in place.
"""

from __future__ import annotations

import json
import os
import shutil
from importlib.metadata import version as version_of
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai

genai.disable_telemetry_events()


def version() -> str:
    return f"onnxruntime-genai {version_of('onnxruntime-genai')}"


def prepare(kind: str, checkpoint: Path, ours: Path, folder: Path) -> None:
    artifact = ours / kind
    for file in artifact.glob("model.onnx*"):
        _link(file, folder / file.name)
    config = json.loads((artifact / "config.json").read_text(encoding="utf-8"))
    text = json.dumps(_genai_config(config), indent=2)
    (folder / "genai_config.json").write_text(text, encoding="utf-8")


def files(kind: str, folder: Path) -> list[Path]:
    return sorted(folder.glob("model.onnx*"))


class Engine:
    def __init__(self, kind: str, folder: Path, threads: int) -> None:
        config = genai.Config(str(folder))
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1, "session.force_spinning_stop": "1"}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = genai.Model(config)
        fields = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
        self._vocabulary = fields["model"]["vocab_size"]

    def start(self, batch: int, capacity: int) -> None:
        parameters = genai.GeneratorParams(self._model)
        # One more than the tokens fed: a generator that is full gives no logits.
        parameters.set_search_options(batch_size=batch, max_length=capacity + 1, do_sample=False)
        self._generator = genai.Generator(self._model, parameters)
        self._length = 0

    def feed(self, ids: np.ndarray) -> np.ndarray:
        """Logits [B, V] of the last of ids [B, T]; those of a prompt are computed for all its positions.

        (The artifact's optional num_logits_to_keep is no input that genai can give.)
        """
        batch, count = ids.shape
        if batch == 1 or self._length == 0:
            self._generator.append_tokens(np.ascontiguousarray(ids, np.int32))
            self._next = np.full((batch, 1, self._vocabulary), np.finfo(np.float32).min, np.float32)
        else:
            for step in range(count - 1):
                self._choose(ids[:, step])
                self._generator.get_logits()  # which computes them
            self._choose(ids[:, -1])
        self._length += count
        return self._generator.get_logits()[:, -1]

    def _choose(self, tokens: np.ndarray) -> None:
        """Add tokens [B] to a batch, which takes none but those it chooses: by logits that leave no other."""
        rows = np.arange(len(tokens))
        self._next[rows, 0, tokens] = 0
        self._generator.set_logits(self._next)
        self._generator.generate_next_token()
        self._next[rows, 0, tokens] = np.finfo(np.float32).min


def _genai_config(config: dict) -> dict:
    """genai_config.json of a GPT-2 with the inputs and outputs of the README's contract."""
    decoder = {
        "filename": "model.onnx",
        "head_size": config["n_embd"] // config["n_head"],
        "hidden_size": config["n_embd"],
        "num_attention_heads": config["n_head"],
        "num_key_value_heads": config["n_head"],
        "num_hidden_layers": config["n_layer"],
        "session_options": {"provider_options": []},
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    model = {
        # "gpt2" stands for graphs with one joint tensor of keys and values a layer; any decoder with a pair is a "llama".
        "type": "llama",
        "vocab_size": config["vocab_size"],
        "context_length": config["n_positions"],
        "bos_token_id": config["bos_token_id"],
        # No text ends here: a sequence that has its end is not continued, so a token that is hardly ever one stands for it.
        "eos_token_id": config["vocab_size"] - 2,
        "pad_token_id": config["vocab_size"] - 2,
        "decoder": decoder,
    }
    return {"model": model, "search": {"max_length": config["n_positions"], "past_present_share_buffer": True}}


def _link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the two are on different disks."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)
