"""ONNX Runtime's own quantization tools, applied to the same fp32 artifact.

They give the results that our recipes have to beat, and serve users who want exactly these tools. Both recipes follow
ONNX Runtime's documentation for transformers: first the transformer optimizer (formerly the package onnxruntime-tools,
now onnxruntime.transformers), then quant_pre_process, then quantize_dynamic or quantize_static.

Between these steps, weights are kept in files of their own: a protobuf message, which is what the tools write otherwise,
ends at 2 GB.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.optimizer import optimize_model

from cuantiza.core import contract
from cuantiza.core.inputs.gpt2_config import is_gpt2
from cuantiza.core.inputs.model_config import read_config
from cuantiza.core.machine.progress import track
from cuantiza.core.onnx import file as onnx_file


def ort_dynamic(model: Path, work: Path) -> None:
    """Quantize the file `model` dynamically and write work/model.onnx.

    Weights become int8 with one scale per tensor. Activations become uint8 with one scale per tensor, computed at run
    time.
    """
    model, work = model.resolve(), work.resolve()
    with _temporary_files_in(work):
        prepared = _prepare(model, work)
        quantize_dynamic(prepared, work / "quantized.onnx", weight_type=QuantType.QInt8, use_external_data_format=True)
    _finish(work)


# The operators with weights, and the matmuls of attention. By default the tool quantizes every operator that it knows.
# One of them is the addition of the attention mask, whose range is so wide that the attention scores are lost:
# perplexity 300 instead of 65 on es-mini.
_STATIC_OPERATORS = ["MatMul", "Gemm", "Gather"]


def ort_static(model: Path, work: Path, windows: np.ndarray) -> None:
    """Quantize the file `model` statically, as QDQ, and write work/model.onnx.

    Activations become uint8, with the range from minimum to maximum over `windows` int64 [n, T]. Weights become int8.
    """
    model, work = model.resolve(), work.resolve()
    with _temporary_files_in(work):
        prepared = _prepare(model, work)
        quantize_static(
            prepared,
            work / "quantized.onnx",
            _Windows(prepared, windows),
            op_types_to_quantize=_STATIC_OPERATORS,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
        )
    _finish(work)


@contextmanager
def _temporary_files_in(work: Path) -> Iterator[None]:
    """Have the tools leave their temporary files, each as large as the model, in `work` and not in the system's place."""
    before = tempfile.tempdir
    tempfile.tempdir = str(work)
    try:
        with chdir(work):
            yield
    finally:
        tempfile.tempdir = before


def _prepare(model: Path, work: Path) -> Path:
    logging.getLogger().setLevel(logging.ERROR)  # the tools log a warning for every node that they skip
    onnxruntime.set_default_logger_severity(3)  # each session would warn that num_logits_to_keep is not a constant
    prepared = work / "prepared.onnx"
    # Only GPT-2 is optimized: the optimizer's other model types are not those that optimum's exporter writes.
    if is_gpt2(read_config(model.parent)):
        heads, width = _heads(model)
        optimized = optimize_model(str(model), "gpt2", num_heads=heads, hidden_size=heads * width, opt_level=0)
        model = work / "optimized.onnx"
        optimized.save_model_to_file(str(model), use_external_data_format=True)
    quant_pre_process(
        model,
        prepared,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        external_data_location=f"{prepared.name}.data",
    )
    return prepared


def _heads(model: Path) -> tuple[int, int]:
    """Return (number of heads, width of a head) of the ONNX file `model`, from the shape of its KV cache.

    They are not read from config.json, which may have them under several names.
    """
    past = next(value for value in onnx_file.load(model).graph.inputs if contract.is_past(value.name))
    return cast("int", past.shape[1]), cast("int", past.shape[3])


def _finish(work: Path) -> None:
    """Save the model that the tools wrote as our own models are saved, and remove the tools' intermediate files."""
    model = onnx_file.load(work / "quantized.onnx")
    onnx_file.save(model, work)
    for leftover in work.iterdir():
        if leftover.name not in ("model.onnx", onnx_file.DATA):
            leftover.unlink()


class _Windows(CalibrationDataReader):
    """Feeds full calibration windows to quantize_static, each with an empty KV cache."""

    def __init__(self, model: Path, windows: np.ndarray) -> None:
        self._inputs = onnx_file.load(model).graph.inputs
        self._windows: Iterator[np.ndarray] = track(windows, "calibrate", len(windows))

    def get_next(self) -> dict[str, np.ndarray] | None:
        window = next(self._windows, None)
        return None if window is None else contract.window_feeds(self._inputs, window)
