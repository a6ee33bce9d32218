"""Intel Neural Compressor on PyTorch: GPTQ and AWQ for 4-bit weights, and static int8 of weights and activations.

As its guides do it: `prepare`, the calibration windows, `convert`, `save`. GPTQ and AWQ quantize asymmetrically, as its
examples for language models; the head stays in float32, its default. Its SmoothQuant needs the retired Intel Extension
for PyTorch, so int8 is its static quantization of an exported graph (PT2E); the file of that holds the weights in
float32, with the scales beside them, and is as large as fp32's. GPT-2's Conv1D become Linear first, as AWQ and the
exported graph know no others.
"""

from __future__ import annotations

from importlib.metadata import version as version_of
from pathlib import Path

import numpy as np
import torch
from neural_compressor.common import set_workspace
from neural_compressor.torch import quantization as tool
from neural_compressor.torch.export import export
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights
from transformers.utils import logging

from lab.bench.peers.pytorch import conv1d_to_linear

GROUP = 32
CONFIGS = {"gptq": tool.GPTQConfig, "awq": tool.AWQConfig}
WEIGHTS = "quantized_weight.pt"


class Logits(torch.nn.Module):
    """A transformers model as a function of the ids alone, which is what can be exported."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def version() -> str:
    return f"neural-compressor-pt {version_of('neural-compressor-pt')}, torch {torch.__version__}"


def prepare(kind: str, checkpoint: Path, ours: Path, folder: Path, calibration: Path) -> None:
    logging.disable_progress_bar()
    set_workspace(str(folder / "workspace"))  # it would make one in the current folder
    windows = [torch.from_numpy(window[None]) for window in np.load(calibration)]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True).eval()
    conv1d_to_linear(model)
    model.config.save_pretrained(folder)
    if kind == "int8":
        length = torch.export.Dim("length", min=2, max=model.config.max_position_embeddings)
        model = export(Logits(model), example_inputs=(windows[0],), dynamic_shapes={"input_ids": {1: length}})
        model = tool.prepare(model, tool.get_default_static_config())
    else:
        example = {"example_inputs": windows[0]} if kind == "awq" else {}
        model = tool.prepare(model, CONFIGS[kind](bits=4, group_size=GROUP, use_sym=False), **example)
    with torch.no_grad():
        for window in windows:
            model(window)
    model = tool.convert(model)
    if kind == "int8":
        model.save(example_inputs=(windows[0],), output_dir=str(folder))
    else:
        model.save(str(folder))


def files(kind: str, folder: Path) -> list[Path]:
    return [folder / WEIGHTS]


class Engine:
    def __init__(self, kind: str, folder: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        if kind == "int8":
            self._logits = tool.load(str(folder))
            return
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        conv1d_to_linear(model)
        # For GPTQ, `load` takes what is not quantized from the given model, and not from the file.
        model.load_state_dict(torch.load(folder / WEIGHTS, weights_only=True), strict=False)
        self._logits = Logits(tool.load(str(folder), original_model=model).eval())

    def all_logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits float32 [T, V] of ids [T]."""
        with torch.inference_mode():
            return self._logits(torch.from_numpy(ids)[None])[0].numpy()
