"""ONNX Runtime's own quantization tools on the same fp32 artifact: rows to beat, and for those who want exactly that.

Both follow its documentation for transformers: the transformer optimizer (once the package onnxruntime-tools,
now onnxruntime.transformers), then quant_pre_process, then quantize_dynamic or quantize_static.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.optimizer import optimize_model

from cuantiza.core.contract import window_feeds
from cuantiza.core.inputs.model_config import read_config
from cuantiza.core.machine.progress import track
from cuantiza.core.onnx import file as onnx_file


def ort_dynamic(model: Path, work: Path) -> None:
    """Write work/model.onnx: weights QInt8 per tensor, a dynamic u8 scale per tensor."""
    model, work = model.resolve(), work.resolve()
    quantize_dynamic(_prepare(model, work), work / "quantized.onnx", weight_type=QuantType.QInt8)
    _finish(work)


# What has weights, and the attention products. By default the tool quantizes every operator that it knows, the sum with
# the attention mask among them, whose range leaves nothing of the scores: perplexity 300 instead of 65 on es-mini.
_STATIC_OPERATORS = ["MatMul", "Gemm", "Gather"]


def ort_static(model: Path, work: Path, windows: np.ndarray) -> None:
    """Write work/model.onnx: QDQ with min-max ranges over windows int64 [n, T]; activations u8, weights s8."""
    model, work = model.resolve(), work.resolve()
    prepared = _prepare(model, work)
    reader = _Windows(prepared, windows)
    quantize_static(
        prepared,
        work / "quantized.onnx",
        reader,
        op_types_to_quantize=_STATIC_OPERATORS,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    _finish(work)


def _prepare(model: Path, work: Path) -> Path:
    os.chdir(work)  # the tools leave temporary files in the working directory; this process is the recipe's own
    logging.getLogger().setLevel(logging.ERROR)  # the tools log every node that they pass over, as a warning
    onnxruntime.set_default_logger_severity(3)  # and every session that num_logits_to_keep is no constant
    config = read_config(model.parent)
    # The optimizer's other model types are not those of optimum's exporter.
    if config.get("model_type", "gpt2") == "gpt2":
        optimized = optimize_model(
            str(model), "gpt2", num_heads=config["n_head"], hidden_size=config["n_embd"], opt_level=0
        )
        model = work / "optimized.onnx"
        optimized.save_model_to_file(str(model))
    quant_pre_process(model, work / "prepared.onnx")
    return work / "prepared.onnx"


def _finish(work: Path) -> None:
    """Save what the tools wrote as ours is saved, and remove their intermediate files."""
    model = onnx_file.load(work / "quantized.onnx")
    onnx_file.save(model, work)
    for leftover in work.iterdir():
        if leftover.name not in ("model.onnx", onnx_file.DATA):
            leftover.unlink()


class _Windows(CalibrationDataReader):
    """Feeds for quantize_static: full windows without a past."""

    def __init__(self, model: Path, windows: np.ndarray) -> None:
        self._inputs = onnx_file.load(model).graph.inputs
        self._windows: Iterator[np.ndarray] = track(windows, "calibrate", len(windows))

    def get_next(self) -> dict[str, np.ndarray] | None:
        window = next(self._windows, None)
        return None if window is None else window_feeds(self._inputs, window)
