"""The baseline of the course: the PyTorch model as it is, and after `quantize_dynamic` as the course calls it."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, cast

import numpy as np
import torch
from transformers import DynamicCache

from cuantiza.core.errors import UserError
from cuantiza.core.run.large_pages import use_large_pages
from cuantiza.eval.report.schema import NO_KERNELS


@dataclass
class TorchCache:
    """A KV cache of `length` tokens."""

    past: DynamicCache
    length: int = 0


class TorchRuntime:
    """A transformers model, fp32 or dynamically quantized, with the interface of cuantiza.core.run.runtime.Runtime.

    `load` returns the model (cuantiza/core/inputs/weights/pytorch.py).
    """

    def __init__(self, load: Callable[[], Any], threads: int, quantized: bool) -> None:
        torch.set_num_threads(threads)
        # transformers 5.24 and newer call the cache `cache`, and read `past_key_values` until 5.40.
        warnings.filterwarnings("ignore", message=".*past_key_values.*", category=FutureWarning)
        self._model, self._quantized = load(), quantized
        if quantized:
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=UserWarning)
            try:
                torch.quantization.quantize_dynamic(
                    self._model, {torch.nn.Linear, torch.nn.LayerNorm}, dtype=torch.qint8, inplace=True
                )
            except RuntimeError as error:
                raise UserError(f"torch {torch.__version__} {NO_KERNELS} ({str(error).splitlines()[0]})") from None
        use_large_pages()  # as cuantiza.core.run.runtime.Runtime does

    def forward(self, ids: np.ndarray, last: int = 0) -> np.ndarray:
        """Return the logits float32 [B, n, V] of the `last` n tokens (0: all T) of token ids [B, T].

        A quantized head takes one range from all tokens of a call, so its input must not be cut.
        """
        with torch.inference_mode():
            out = self._model(
                input_ids=torch.from_numpy(ids), use_cache=False, logits_to_keep=0 if self._quantized else last
            )
        return out.logits.numpy()[:, -last:]

    def cache(self, batch: int, capacity: int) -> TorchCache:
        """Return an empty KV cache. transformers' cache grows as it is filled, so batch and capacity are not used."""
        return TorchCache(DynamicCache())

    def step(self, cache: TorchCache, ids: np.ndarray) -> np.ndarray:
        """Add token ids [B, T] to `cache`; return the logits float32 [B, V] of the last of them.

        `copy.copy(cache)` branches: later steps on the copy do not change the original. transformers' layers replace
        their tensors when they grow, so a shallow copy of the layers is enough for that.
        """
        grown = DynamicCache()
        grown.layers = [copy.copy(layer) for layer in cache.past.layers]
        with torch.inference_mode():
            out = self._model(input_ids=torch.from_numpy(ids), past_key_values=grown, use_cache=True, logits_to_keep=1)
        cache.past, cache.length = grown, cache.length + ids.shape[1]
        return out.logits.numpy()[:, -1]

    def describe(self) -> dict:
        """Return the bytes of the saved state dict, the number of modules with weights, and how many are quantized."""
        modules = [module for module in self._model.modules() if getattr(module, "weight", None) is not None]
        quantized = [module for module in modules if type(module).__module__.startswith("torch.ao.nn.quantized")]
        with _Counter() as file:
            torch.save(self._model.state_dict(), cast("IO[bytes]", file))
            size = file.count
        return {"weight_bytes": size, "modules_with_weights": len(modules), "modules_quantized": len(quantized)}


class _Counter(io.RawIOBase):
    """A file that stores nothing and only counts the bytes written to it."""

    count = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self.count += len(memoryview(data).cast("B"))
        return len(memoryview(data).cast("B"))
