"""llama.cpp through llama-cpp-python's low-level interface, on GGUF files in f32 and quantized (lab/checkpoints/gguf_file.py).

The settings are llama-bench's defaults: 2048 tokens a batch, 512 a micro-batch, keys and values in f16, weights
repacked for the processor. Flash attention is on, as `auto` would choose: prefill is 1.2 × faster, decode not slower
(GPT-2 small).
"""

from __future__ import annotations

import ctypes
from importlib.metadata import version as version_of
from pathlib import Path

import llama_cpp as llama
import numpy as np

from lab.checkpoints import gguf_file

TYPES = {
    "q8_0": llama.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q6_k": llama.LLAMA_FTYPE_MOSTLY_Q6_K,
    "q5_k_m": llama.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "q4_k_m": llama.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "q4_0": llama.LLAMA_FTYPE_MOSTLY_Q4_0,
}
FLASH = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED


@llama.llama_log_callback
def _silent(level: int, text: bytes, data: object) -> None:
    """Discard the log, in which llama.cpp has a line for every tensor."""


llama.llama_log_set(_silent, ctypes.c_void_p(0))


def version() -> str:
    # It is compiled for this processor at installation, or for AVX2 (lab/avx2); the system info shows for which.
    found = [item.split(" = ")[0].strip() for item in llama.llama_print_system_info().decode().split("|")]
    widest = [name for name in ("AVX512_VNNI", "AVX512", "AVX2", "NEON") if name in found]
    return f"llama-cpp-python {version_of('llama-cpp-python')}" + (f", compiled for {widest[0]}" if widest else "")


def prepare(kind: str, checkpoint: Path, ours: Path, folder: Path) -> None:
    plain = folder / "f32.gguf"
    gguf_file.write(checkpoint, ours / "fp32" / "tokenizer.json", plain)
    if kind in TYPES:
        quantize(kind, plain, folder / f"{kind}.gguf")
        plain.unlink()


def quantize(kind: str, plain: Path, target: Path, importance: dict[str, np.ndarray] | None = None) -> None:
    """Quantize the f32 file `plain` to a kind of TYPES, as llama-quantize does it.

    The tied embedding is in Q8_0 for Q8_0 and in Q6_K for the others; norms, biases and the position embedding stay in
    f32. `importance` is an importance matrix: for tensors by name, the mean square of each input, float32 [in].
    """
    options = llama.llama_model_quantize_default_params()
    options.ftype = TYPES[kind]
    if importance:
        # An array of C structures, which ends with one that has no name.
        options.imatrix = entries = (llama.llama_model_imatrix_data * (len(importance) + 1))()
        for entry, (name, values) in zip(entries, importance.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if llama.llama_model_quantize(str(plain).encode(), str(target).encode(), ctypes.byref(options)):
        raise RuntimeError(f"llama.cpp could not quantize {plain} to {kind}")


def files(kind: str, folder: Path) -> list[Path]:
    return [folder / f"{kind}.gguf"]


class Engine:
    def __init__(self, kind: str, folder: Path, threads: int) -> None:
        llama.llama_backend_init()
        [file] = files(kind, folder)
        self._model = llama.llama_model_load_from_file(str(file).encode(), llama.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {file}")
        self._vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._threads = threads
        self._context, self._shape = None, (0, 0)

    def start(self, batch: int, capacity: int) -> None:
        self._length = 0
        if self._shape == (batch, capacity):
            llama.llama_memory_clear(llama.llama_get_memory(self._context), False)
            return
        if self._context:
            llama.llama_free(self._context)
            llama.llama_batch_free(self._batch)
        options = llama.llama_context_default_params()
        options.n_ctx, options.n_seq_max = batch * capacity, batch
        options.n_threads = options.n_threads_batch = self._threads
        options.flash_attn_type = FLASH
        self._context = llama.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {batch} × {capacity} tokens")
        self._room = llama.llama_n_batch(self._context)
        self._batch = llama.llama_batch_init(self._room, 0, 1)
        self._shape = (batch, capacity)

    def feed(self, ids: np.ndarray) -> np.ndarray:
        """Logits [B, V] of the last of ids [B, T]; no others are computed."""
        batch, count = ids.shape
        most = self._room // batch
        for start in range(0, count, most):
            self._decode(ids[:, start : start + most], start + most >= count)
        last = min(count, (count - 1) % most + 1)
        rows = (llama.llama_get_logits_ith(self._context, (row + 1) * last - 1) for row in range(batch))
        return np.stack([np.ctypeslib.as_array(row, (self._vocabulary,)) for row in rows])

    def all_logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits float32 [T, V] of ids [T], in batches as `feed` makes them; a copy."""
        self.start(1, len(ids))
        parts = []
        for start in range(0, len(ids), self._room):
            part = ids[start : start + self._room]
            self._decode(part[None], True, every=True)
            found = llama.llama_get_logits(self._context)
            parts.append(np.ctypeslib.as_array(found, (len(part), self._vocabulary)).copy())
        return np.concatenate(parts)

    def _decode(self, ids: np.ndarray, wanted: bool, every: bool = False) -> None:
        """Add ids [B, T], one sequence after the other; if `wanted`, compute the logits of each one's last token.

        With `every`, those of all tokens are computed.
        """
        batch, count = ids.shape
        size = self._batch.n_tokens = ids.size
        _view(self._batch.token, size)[:] = ids.reshape(-1)
        _view(self._batch.pos, size)[:] = np.tile(np.arange(self._length, self._length + count), batch)
        _view(self._batch.n_seq_id, size)[:] = 1
        for index in range(size):
            self._batch.seq_id[index][0] = index // count
        outputs = _view(self._batch.logits, size)
        outputs[:] = 0
        outputs[0 if every else count - 1 :: 1 if every else count] = wanted
        if status := llama.llama_decode(self._context, self._batch):
            raise RuntimeError(f"llama_decode gave {status} for {batch} × {count} tokens after {self._length}")
        self._length += count


def _view(pointer: ctypes._Pointer, size: int) -> np.ndarray:
    return np.ctypeslib.as_array(pointer, (size,))
