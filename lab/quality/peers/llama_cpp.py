"""llama.cpp with an importance matrix, as its quantization guide advises for 6 bits and less.

An importance matrix weighs the rounding error of each weight by the mean square of the input that it multiplies. Its
own program llama-imatrix is not in the Python package, so PyTorch measures the same means here, on the fp32 model. As
there, the embedding and the head have none.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lab.bench.peers.llama_cpp_gguf import Engine, files, quantize, version
from lab.checkpoints import gguf_file

__all__ = ["Engine", "files", "importance", "prepare", "version"]


def prepare(kind: str, checkpoint: Path, ours: Path, folder: Path, calibration: Path) -> None:
    plain = folder / "f32.gguf"
    gguf_file.write(checkpoint, ours / "fp32" / "tokenizer.json", plain)
    quantize(kind, plain, folder / f"{kind}.gguf", importance(checkpoint, np.load(calibration)))
    plain.unlink()


def importance(checkpoint: Path, windows: np.ndarray) -> dict[str, np.ndarray]:
    """The mean square of every input of each linear layer, float32 [in], by GGUF's name of its weights.

    The means are over all tokens of `windows` int64 [n, T].
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True).eval()
    known = gguf_file.tensors(json.loads((checkpoint / "config.json").read_text(encoding="utf-8")))
    sums: dict[str, torch.Tensor] = {}

    def adder(name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def add(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            # In float64, because a sum over all tokens loses digits in float32.
            squares = inputs[0].flatten(0, -2).double().square().sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

        return add

    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not model.get_output_embeddings():
            found = known.name(f"{name}.weight")
            if found is None:
                raise ValueError(f"{checkpoint}: GGUF has no tensor for {name}")
            module.register_forward_pre_hook(adder(found))
    with torch.inference_mode():
        for window in torch.from_numpy(windows):
            model(input_ids=window[None], use_cache=False)
    return {name: (total / windows.size).float().numpy() for name, total in sums.items()}
