"""OpenVINO GenAI, OpenVINO's own generation loop with paged attention, on files with int8 weights.

GPT-2 runs from files that are made as those of the row "OpenVINO int8 weights". A Llama-shaped model runs from a GGUF file in Q8_0, which
GenAI reads itself: in our graph of such a model it does not find the attention that it wants to replace.
"""

from __future__ import annotations

import json
import time
from importlib.metadata import version as version_of
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai
from openvino import properties

from lab.bench.peers import llama_cpp_gguf, openvino_int8

_GGUF = "q8_0"
_MOST_TOKENS = 1 << 20  # more than any prompt has


def version() -> str:
    return f"openvino-genai {version_of('openvino-genai')}"


def prepare(kind: str, checkpoint: Path, ours: Path, folder: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] == "gpt2":
        openvino_int8.prepare(kind, checkpoint, ours, folder)
    else:
        llama_cpp_gguf.prepare(_GGUF, checkpoint, ours, folder)


def files(kind: str, folder: Path) -> list[Path]:
    return sorted(folder.glob("*.gguf")) or openvino_int8.files(kind, folder)


class Engine:
    """Gives no logits. The streamer, which notes when a token is there, takes one sequence."""

    steps, max_batch = False, 1

    def __init__(self, kind: str, folder: Path, threads: int) -> None:
        schedule = genai.SchedulerConfig()
        schedule.enable_prefix_caching = False  # a prompt that was read before is read again
        schedule.max_num_batched_tokens = _MOST_TOKENS  # and in one piece
        options = {properties.inference_num_threads(): threads, "scheduler_config": schedule}
        source = next(folder.glob("*.gguf"), folder)
        self._pipeline = genai.LLMPipeline(str(source), "CPU", **options)

    def generate(self, ids: np.ndarray, count: int) -> list[list[int]]:
        """`count` tokens after ids [1, T], greedy."""
        return self._generate(ids, count, _Clock())

    def times(self, ids: np.ndarray, count: int) -> list[int]:
        """When each of `count` tokens after ids [1, T] was there, in ns from the call."""
        clock = _Clock()
        self._generate(ids, count, clock)
        return clock.times

    def _generate(self, ids: np.ndarray, count: int, clock: _Clock) -> list[list[int]]:
        config = genai.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
        config.set_eos_token_id(0)  # it has to know one, which it then ignores
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        return self._pipeline.generate(inputs, config, clock).tokens


class _Clock(genai.StreamerBase):
    """Notes when each token arrives, in ns since it was made."""

    def __init__(self) -> None:
        super().__init__()
        self._start, self.times = time.perf_counter_ns(), []

    def write(self, token: int) -> genai.StreamingStatus:
        self.times.append(time.perf_counter_ns() - self._start)
        return genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass
