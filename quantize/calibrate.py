"""Activation statistics over the calibration split, streamed: memory does not grow with the number of tokens."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from core import onnx_file
from core.corpus import Split, full_windows, stream
from core.errors import UserError
from core.model_config import max_positions, read_config, start_token
from core.progress import track
from core.runtime import Runtime
from core.tokenizer import encode, load_tokenizer
from quantize.recipes import Calibration
from quantize.sites import find_projections


@dataclass(frozen=True)
class Range:
    """Smallest and largest value that an activation took."""

    low: float
    high: float

    def merge(self, other: Range) -> Range:
        return Range(min(self.low, other.low), max(self.high, other.high))


def calibration_windows(folder: Path, split: Split, calibration: Calibration) -> np.ndarray:
    """Token windows int64 [n, T] of `split`: full ones of real text, without padding, a start token per document.

    T is at most the model's number of positions. Raises UserError where there are fewer windows than the
    calibration asks for.
    """
    length = min(calibration.tokens, max_positions(read_config(folder)))
    documents = encode(load_tokenizer(folder), split.documents, enough=length * calibration.windows)
    tokens = stream(documents, start_token(folder))
    windows = full_windows(tokens, length)[: calibration.windows]
    if len(windows) < calibration.minimum:
        raise UserError(
            f"CORPUS=: its calibration split has {len(tokens)} tokens, {len(windows)} windows of {length}; "
            f"static ranges need at least {calibration.minimum}: give more text"
        )
    return windows


def input_ranges(model: Path, windows: np.ndarray, work: Path) -> dict[str, Range]:
    """Range of the input of every projection of `model`, by the name of the value, over windows [n, T].

    The reductions run inside the graph, so that two numbers per tensor leave it. `work` is a folder for a
    temporary graph.
    """
    names = _write_observer(model, work)
    gc.collect()  # a graph is full of cycles, and holds the weights that the session now loads again
    session = Runtime(work / "model.onnx", outputs=[f"{name}:{end}" for name in names for end in ("low", "high")])
    ranges: dict[str, Range] = {}
    for window in track(windows, "calibrate", len(windows)):
        extremes = session.run(window[None])
        for name, low, high in zip(names, extremes[::2], extremes[1::2], strict=True):
            seen = Range(float(low.numpy()), float(high.numpy()))
            ranges[name] = ranges[name].merge(seen) if name in ranges else seen
    return ranges


def _write_observer(path: Path, work: Path) -> list[str]:
    """Write a copy of the graph whose outputs are the extremes of the projections' inputs; returns their names."""
    model = onnx_file.load(path)
    graph = model.graph
    observed = list(dict.fromkeys(projection.x for projection in find_projections(graph)))
    graph.outputs.clear()
    for value in observed:
        for operator, end in (("ReduceMin", "low"), ("ReduceMax", "high")):
            node = ir.node(operator, [value], {"keepdims": 0})
            graph.append(node)
            node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = (
                f"{value.name}:{end}",
                ir.TensorType(ir.DataType.FLOAT),
                ir.Shape([]),
            )
            graph.outputs.append(node.outputs[0])
    RemoveUnusedNodesPass()(model)
    onnx_file.save(model, work)
    return [value.name for value in observed]
