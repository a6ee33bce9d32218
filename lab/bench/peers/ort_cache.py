"""ONNX Runtime on a graph of another exporter, with I/O binding, so that keys and values are never copied to NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from cuantiza.core import contract


class CachedSession:
    """A session with all graph optimizations, and the keys and values of the tokens fed to it.

    The graph has the inputs and outputs of cuantiza/core/contract.py. With `in_place`, its attention is com.microsoft's
    GroupQueryAttention, whose past and present may be one buffer [B, H, capacity, d]. `head_width` is d where the
    graph's inputs have a symbol for it.
    """

    def __init__(self, model: Path, threads: int, in_place: bool, head_width: int | None = None) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        # Threads spin during a run, as by default, and sleep after it.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        shapes = {item.name: item.shape for item in self._session.get_inputs()}
        self._past = [name for name in shapes if contract.is_past(name)]
        _, self._heads, _, declared = shapes[self._past[0]]
        self._width = head_width or declared
        self._takes_positions = contract.POSITION_IDS in shapes
        self._vocabulary = next(item.shape[-1] for item in self._session.get_outputs() if item.name == contract.LOGITS)
        self._in_place = in_place
        self._logits = np.empty(0, np.float32)

    def start(self, batch: int, capacity: int) -> None:
        """Begin with an empty cache for `batch` sequences of up to `capacity` tokens."""
        shape = (batch, self._heads, capacity if self._in_place else 0, self._width)
        self._values = [ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for _ in self._past]
        self._length = 0

    def feed(self, ids: np.ndarray) -> np.ndarray:
        """Logits [B, V] of the last of ids [B, T]; a view that the next call overwrites."""
        batch, count = ids.shape
        # GroupQueryAttention accepts several tokens after a past only for a batch of one.
        together = 1 if self._in_place and batch > 1 and self._length else count
        for start in range(0, count, together):
            self._step(ids[:, start : start + together])
        return self._logits[: batch * together * self._vocabulary].reshape(batch, together, -1)[:, -1]

    def all_logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits float32 [T, V] of ids [T]; a view that the next call overwrites."""
        self.start(1, len(ids))
        self._step(ids[None])
        return self._logits[: len(ids) * self._vocabulary].reshape(len(ids), -1)

    def _step(self, ids: np.ndarray) -> None:
        batch, count = ids.shape
        positions = np.arange(self._length, self._length + count)
        self._length += count
        feeds = {contract.INPUT_IDS: ids, contract.ATTENTION_MASK: np.ones((batch, self._length), np.int64)}
        if self._takes_positions:
            feeds[contract.POSITION_IDS] = np.broadcast_to(positions, ids.shape)
        feeds = {name: np.ascontiguousarray(array, np.int64) for name, array in feeds.items()}
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        # The graph computes every position's logits. The buffer is kept, as 100 MB of fresh memory pages cost 20 ms.
        shape = (batch, count, self._vocabulary)
        if self._logits.size < np.prod(shape):
            self._logits = np.zeros(int(np.prod(shape)), np.float32)
        binding.bind_output(contract.LOGITS, "cpu", 0, np.float32, shape, self._logits.ctypes.data)
        for name, value in zip(self._past, self._values, strict=True):
            binding.bind_ortvalue_input(name, value)
            present = contract.present_of(name)
            if self._in_place:
                binding.bind_ortvalue_output(present, value)
            else:
                binding.bind_output(present)
        self._session.run_with_iobinding(binding)
        if not self._in_place:
            _, *self._values = binding.get_outputs()
