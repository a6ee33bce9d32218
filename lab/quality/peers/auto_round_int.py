"""AutoRound: weights of few bits, of which signed gradient descent tunes the rounding and the ranges, block by block.

Its guide advises the scheme W4A16 with its default of 200 iterations, and groups of 32 for better results. 8-bit weights
are rounded to nearest (`iters=0`), as there is little to tune. The head stays in floating point, its default. It saves
its own format, which transformers loads with AutoRound's kernel in PyTorch. That kernel unpacks the weights and computes
in float16; here it computes in float32, so that only the weights' error is measured.
"""

from __future__ import annotations

from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import numpy as np
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from lab.bench.peers.pytorch import all_logits

GROUP = 32
SCHEMES: dict[str, dict[str, Any]] = {"int4": {"scheme": "W4A16"}, "int8": {"scheme": "W8A16", "iters": 0}}


def version() -> str:
    return f"auto-round {version_of('auto-round')}, torch {torch.__version__}"


def prepare(kind: str, checkpoint: Path, ours: Path, folder: Path, calibration: Path) -> None:
    logging.disable_progress_bar()
    windows = np.load(calibration)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True).eval()
    tuned = AutoRound(
        model,
        AutoTokenizer.from_pretrained(ours / "fp32", local_files_only=True),
        **SCHEMES[kind],
        group_size=GROUP,
        dataset=[torch.from_numpy(window[None]) for window in windows],
        nsamples=len(windows),
        seqlen=windows.shape[1],
        device_map="cpu",
        enable_torch_compile=False,  # compiling a small block takes longer than it saves
    )
    tuned.quantize_and_save(output_dir=str(folder), format="auto_round")


def files(kind: str, folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


class Engine:
    def __init__(self, kind: str, folder: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        logging.disable_progress_bar()
        saved = files(kind, folder)[0].parent  # AutoRound adds a folder of the scheme's name
        self._model = AutoModelForCausalLM.from_pretrained(saved, device_map="cpu", local_files_only=True).eval()
        torch.nn.Module.float(self._model)  # transformers' own `float` refuses quantized models

    def all_logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits float32 [T, V] of ids [T]."""
        return all_logits(self._model, ids)
