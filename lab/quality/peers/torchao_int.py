"""torchao: `quantize_` with one of its configurations, on the transformers model, run without torch.compile.

Its quick start quantizes all Linear modules, the head among them. GPT-2's Conv1D become Linear first, as torchao does
not know them. A tied head is quantized for itself, so the embedding stays in the file as float32.
"""

from __future__ import annotations

from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights
from transformers.utils import logging

from lab.bench.peers.pytorch import all_logits, conv1d_to_linear

STATE = "state.pt"
GROUP = PerGroup(32)  # torchao's default for weights of few bits
CONFIGS: dict[str, Any] = {
    "int8-dynamic": Int8DynamicActivationInt8WeightConfig(),
    "int8-weight": Int8WeightOnlyConfig(),
    "8da4w": Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=GROUP),
    "int4-weight": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=GROUP),
}


def version() -> str:
    return f"torchao {version_of('torchao')}, torch {torch.__version__}"


def prepare(kind: str, checkpoint: Path, ours: Path, folder: Path) -> None:
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True).eval()
    conv1d_to_linear(model)
    quantize_(model, CONFIGS[kind])
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / STATE)


def files(kind: str, folder: Path) -> list[Path]:
    return [folder / STATE]


class Engine:
    def __init__(self, kind: str, folder: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with no_init_weights():
            self._model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        conv1d_to_linear(self._model)
        # Quantized weights are tensors of torchao's own classes, so they take the place of the model's.
        self._model.load_state_dict(torch.load(folder / STATE, weights_only=True), assign=True)

    def all_logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits float32 [T, V] of ids [T]."""
        return all_logits(self._model, ids)
