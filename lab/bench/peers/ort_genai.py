"""onnxruntime-genai, Microsoft's own generation loop: on our `-ort` artifact, and on files of its own model builder.

The row of our artifact shows the cost of that loop. The builder knows Llama-shaped families and not GPT-2; it rounds to
nearest in blocks of 32, in all linear layers and the head. past_present_share_buffer keeps keys and values in one buffer
of max_length, which GroupQueryAttention updates in place.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version as version_of
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai

from cuantiza.core.onnx.genai_config import GENAI_CONFIG
from lab.bench.peers.ort_cache import CachedSession

# The precisions of the builder, by kind; other kinds are recipes of ours.
BUILDER = {"builder-int8": "int8", "builder-int4": "int4"}

genai.disable_telemetry_events()


def version() -> str:
    return f"onnxruntime-genai {version_of('onnxruntime-genai')}"


def prepare(kind: str, checkpoint: Path, ours: Path, folder: Path) -> None:
    source = folder if kind in BUILDER else ours / kind
    if kind in BUILDER:
        _build(BUILDER[kind], checkpoint, folder)
    else:
        for file in source.glob("model.onnx*"):
            _link(file, folder / file.name)
    fields = json.loads((source / GENAI_CONFIG).read_text(encoding="utf-8"))
    (folder / GENAI_CONFIG).write_text(json.dumps(_endless(fields), indent=2), encoding="utf-8")


def _build(precision: str, checkpoint: Path, folder: Path) -> None:
    """Make the builder's files in `folder`. Raises RuntimeError with its last line if it fails."""
    with tempfile.TemporaryDirectory() as cache:
        options = ["-i", str(checkpoint), "-o", str(folder), "-p", precision, "-e", "cpu", "-c", cache]
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"the builder ended with {done.returncode}"])[-1])


def _endless(config: dict) -> dict:
    """The fields of genai_config.json with another end token, one that hardly ever occurs.

    A sequence that holds its end token is not continued, and random models write any token.
    """
    never = config["model"]["vocab_size"] - 2
    return config | {"model": config["model"] | {"eos_token_id": never, "pad_token_id": never}}


def files(kind: str, folder: Path) -> list[Path]:
    return sorted(folder.glob("model.onnx*"))


class Engine:
    def __init__(self, kind: str, folder: Path, threads: int) -> None:
        config = genai.Config(str(folder))
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1, "session.force_spinning_stop": "1"}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = genai.Model(config)
        self._folder, self._threads = folder, threads
        fields = json.loads((folder / GENAI_CONFIG).read_text(encoding="utf-8"))["model"]
        self._vocabulary, self._head_width = fields["vocab_size"], fields["decoder"]["head_size"]

    def start(self, batch: int, capacity: int) -> None:
        parameters = genai.GeneratorParams(self._model)
        # The length is one more than the tokens fed, because a full generator gives no logits.
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

    def all_logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits float32 [T, V] of ids [T], by ONNX Runtime itself: onnxruntime-genai gives those of the last alone."""
        return CachedSession(self._folder / "model.onnx", self._threads, True, self._head_width).all_logits(ids)

    def _choose(self, tokens: np.ndarray) -> None:
        """Add tokens [B] to a batch. It only accepts tokens that it chose itself, so the logits allow no other."""
        rows = np.arange(len(tokens))
        self._next[rows, 0, tokens] = 0
        self._generator.set_logits(self._next)
        self._generator.generate_next_token()
        self._next[rows, 0, tokens] = np.finfo(np.float32).min


def _link(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy if the two are on different disks."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)
