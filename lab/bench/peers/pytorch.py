"""transformers on PyTorch: fp32, and int8 by `quantize_dynamic`, as in a course or with Conv1D replaced by Linear.

It runs in inference mode with sdpa attention, transformers' default on CPU, and StaticCache. At position 128 this cache
is as fast as DynamicCache, and at 900 it saves 3 ms a token (GPT-2 small, 2 threads), because DynamicCache copies all
keys and values at every step.
"""

from __future__ import annotations

import warnings
from importlib.metadata import version as version_of
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

STATE = "state.pt"


def version() -> str:
    return f"torch {torch.__version__}, transformers {version_of('transformers')}"


def prepare(kind: str, checkpoint: Path, ours: Path, folder: Path) -> None:
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True).eval()
    if kind == "fp32":
        model.save_pretrained(folder)
    else:
        model.config.save_pretrained(folder)
        torch.save(_quantize(kind, model).state_dict(), folder / STATE)


def files(kind: str, folder: Path) -> list[Path]:
    return [folder / ("model.safetensors" if kind == "fp32" else STATE)]


class Engine:
    def __init__(self, kind: str, folder: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.set_num_interop_threads(1)
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        if kind == "fp32":
            self._model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
        else:
            # To load a quantized model, make one with arbitrary weights and give it the saved state.
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            with no_init_weights():
                self._model = _quantize(kind, AutoModelForCausalLM.from_config(config).eval())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a warning about how torch itself stores quantized tensors
                self._model.load_state_dict(torch.load(folder / STATE, weights_only=True))

    def start(self, batch: int, capacity: int) -> None:
        self._past = StaticCache(config=self._model.config, max_cache_len=capacity)

    def feed(self, ids: np.ndarray) -> np.ndarray:
        """Logits [B, V] of the last of ids [B, T]; no others are computed."""
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.from_numpy(np.ascontiguousarray(ids)),
                past_key_values=self._past,
                use_cache=True,
                logits_to_keep=1,
            )
        return output.logits[:, -1].numpy()

    def all_logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits float32 [T, V] of ids [T]."""
        return all_logits(self._model, ids)


def all_logits(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    """Logits float32 [T, V] of a transformers model for ids [T]."""
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].float().numpy()


def _quantize(kind: str, model: torch.nn.Module) -> torch.nn.Module:
    """Quantize the Linear modules of `model` to int8. For "linear", GPT-2's Conv1D layers become Linear first."""
    if kind == "linear":
        conv1d_to_linear(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings that it is deprecated, and that LayerNorm has no dynamic form
        return torch.quantization.quantize_dynamic(
            model, {torch.nn.Linear, torch.nn.LayerNorm}, dtype=torch.qint8, inplace=True
        )


def conv1d_to_linear(module: torch.nn.Module) -> None:
    """Replace every Conv1D in `module` by the Linear that computes the same."""
    for name, child in module.named_children():
        if isinstance(child, Conv1D):
            # Conv1D holds its weight as [in, out], Linear as [out, in].
            linear = torch.nn.utils.skip_init(torch.nn.Linear, *child.weight.shape)
            linear.weight.data = child.weight.data.t().contiguous()
            linear.bias.data = child.bias.data
            setattr(module, name, linear)
        else:
            conv1d_to_linear(child)
