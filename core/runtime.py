"""One ONNX Runtime session of the artifact contract: full forward, cached decode, explicit threads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from core.errors import UserError
from core.threads import default_threads


class Runtime:
    """A session over `model` (an ONNX file of the contract in the README).

    The number of layers L, heads H and the head width d are read from the file's own inputs.
    Raises UserError where ONNX Runtime refuses the file or its inputs and outputs are not the contract's.
    """

    def __init__(self, model: Path, threads: int | None = None, outputs: Sequence[str] | None = None) -> None:
        """`outputs` replaces the contract's, for a graph that shows something else of the same model."""
        self.session = open_session(model, threads)
        inputs = {item.name: item.shape for item in self.session.get_inputs()}
        found = {*inputs, *(item.name for item in self.session.get_outputs())}
        self.layers = sum(name.startswith("past_key_values.") for name in inputs) // 2
        self._past = [
            f"past_key_values.{layer}.{kv}" for layer in range(max(self.layers, 1)) for kv in ("key", "value")
        ]
        self._outputs = outputs or ["logits", *(name.replace("past_key_values", "present") for name in self._past)]
        wanted = {"input_ids", "attention_mask", *self._past, *self._outputs}
        if missing := sorted(wanted - found):
            raise UserError(
                f"{model}: has no {', '.join(missing[:3])}; only graphs with the inputs and outputs of the README's contract are measured"
            )
        if unknown := sorted(inputs.keys() - wanted - {"position_ids"}):
            raise UserError(f"{model}: asks for {', '.join(unknown[:3])}, which the README's contract does not know")
        self._takes_positions = "position_ids" in inputs
        for item in self.session.get_inputs():
            if item.name in self._past and (
                item.type != "tensor(float)" or [*map(type, item.shape[1::2])] != [int, int]
            ):
                raise UserError(
                    f"{model}: {item.name} is {item.type} {item.shape} where the README's contract has float32 [B, heads, P, width]"
                )
        _, self.heads, _, self.head_dim = inputs[self._past[0]]

    def forward(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Logits float32 [B, T, V] of token ids [B, T] without a past; `mask` [B, T] is 0 on padding."""
        return self.run(ids, mask)[0].numpy()

    def extend(
        self, ids: np.ndarray, past: list[ort.OrtValue], mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, list[ort.OrtValue]]:
        """Logits [B, T, V] of token ids [B, T] behind `past`, and the past that includes them.

        `past` holds L × (key, value), each [B, H, P, d]; `mask` [B, P+T] is 0 on padding. Neither the
        past nor the new one passes through NumPy.
        """
        logits, *present = self.run(ids, mask, past)
        return logits.numpy(), present

    def run(
        self, ids: np.ndarray, mask: np.ndarray | None = None, past: list[ort.OrtValue] | None = None
    ) -> list[ort.OrtValue]:
        """All outputs for token ids [B, T] behind `past` (none where not given), in their order."""
        return self.session.run_with_ort_values(
            self._outputs, self._feeds(ids, mask, past or self.empty_past(len(ids)))
        )

    def empty_past(self, batch: int) -> list[ort.OrtValue]:
        """A past of no tokens: L × (key, value), each [B, H, 0, d]."""
        empty = np.zeros((batch, self.heads, 0, self.head_dim), np.float32)
        return [ort.OrtValue.ortvalue_from_numpy(empty) for _ in self._past]

    def _feeds(self, ids: np.ndarray, mask: np.ndarray | None, past: list[ort.OrtValue]) -> dict[str, ort.OrtValue]:
        batch, count = ids.shape
        before = past[0].shape()[2]
        if mask is None:
            mask = np.ones((batch, before + count), np.int64)
        feeds = {"input_ids": ids, "attention_mask": mask}
        if self._takes_positions:
            # Padding stands on the left or in the past: a token's position counts the real ones before it.
            feeds["position_ids"] = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, before:]
        values = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array, np.int64))
            for name, array in feeds.items()
        }
        return values | dict(zip(self._past, past, strict=True))


def window_feeds(inputs: Iterable, ids: np.ndarray) -> dict[str, np.ndarray]:
    """What a graph with contract `inputs` (each with a name and a shape) asks for: token ids int64 [T], no past."""
    feeds = {
        "input_ids": ids[None],
        "attention_mask": np.ones((1, len(ids)), np.int64),
        "position_ids": np.arange(len(ids))[None],
    }
    shapes = {item.name: item.shape for item in inputs}
    past = {
        name: np.zeros((1, shape[1], 0, shape[3]), np.float32)
        for name, shape in shapes.items()
        if name.startswith("past_")
    }
    return {name: array for name, array in feeds.items() if name in shapes} | past


def open_session(model: Path, threads: int | None = None) -> ort.InferenceSession:
    """A session over any ONNX file, on `threads` threads (all processors where not given).

    Raises UserError where ONNX Runtime refuses the file.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or default_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Worker threads that spin on after a run slow every other session down.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise UserError(
            f"{model}: ONNX Runtime {ort.__version__} cannot load it ({str(error).splitlines()[0]})"
        ) from None
