"""onnxruntime-genai's own model builder, run by onnxruntime-genai: the files that its users make themselves.

`python -m onnxruntime_genai.models.builder -e cpu` rounds to nearest in blocks of 32 and has 4 or 8 bits in all linear
layers, the head included; keys and values are updated in place. It knows Llama-shaped families and not GPT-2.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from lab.bench.peers import ort_cache, ort_genai

version = ort_genai.version


def prepare(kind: str, checkpoint: Path, ours: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as cache:
        options = ["-i", str(checkpoint), "-o", str(folder), "-p", kind, "-e", "cpu", "-c", cache]
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"the builder ended with {done.returncode}"])[-1])
    file = folder / ort_genai.GENAI_CONFIG
    file.write_text(json.dumps(ort_genai.endless(json.loads(file.read_text(encoding="utf-8")))), encoding="utf-8")


def files(kind: str, folder: Path) -> list[Path]:
    return ort_genai.files(kind, folder)


class Engine(ort_genai.Engine):
    def __init__(self, kind: str, folder: Path, threads: int) -> None:
        super().__init__(kind, folder, threads)
        self._folder, self._threads = folder, threads

    def all_logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits float32 [T, V] of ids [T], by ONNX Runtime itself: onnxruntime-genai gives those of the last alone."""
        fields = json.loads((self._folder / ort_genai.GENAI_CONFIG).read_text(encoding="utf-8"))
        width = fields["model"]["decoder"]["head_size"]
        return ort_cache.CachedSession(self._folder / "model.onnx", self._threads, True, width).all_logits(ids)
