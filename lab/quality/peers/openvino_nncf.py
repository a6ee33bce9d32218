"""OpenVINO on models that NNCF quantizes with calibration: int8 for weights and activations, and int4 for weights.

int8 is `nncf.quantize` with ModelType.TRANSFORMER, which smooths activations (SmoothQuant) and corrects biases; mixed
preset, so that activations have zero points. int4 is `nncf.compress_weights` in INT4_ASYM with AWQ and scale
estimation, as OpenVINO's page on 4-bit weights advises for accuracy; embedding and head stay in 8 bits, its default.
The int8 weights of lab/bench/peers/openvino_int8.py are here with all positions' logits. The plugin runs with its own
defaults: keys and values in u8.
"""

from __future__ import annotations

from pathlib import Path

import nncf
import numpy as np
import openvino as ov

from cuantiza.core import contract
from lab.bench.peers import openvino_int8
from lab.bench.peers.openvino_int8 import MODEL, Engine, files, hide_cache

__all__ = ["Engine", "files", "prepare", "version"]

BLOCK = 64  # inputs that share a scale; NNCF's default of 128 does not divide the width of SmolLM2, 576


def version() -> str:
    return f"{openvino_int8.version().split('-')[0]}, nncf {nncf.__version__}"


def prepare(kind: str, checkpoint: Path, ours: Path, folder: Path, calibration: Path | None = None) -> None:
    model = ov.convert_model(ours / "fp32" / "model.onnx")
    hide_cache(model)
    windows = np.empty((0, 1), np.int64) if calibration is None else np.load(calibration)
    dataset = nncf.Dataset(list(windows), _feeds)
    if kind == "int8-weights":
        model = nncf.compress_weights(model)
    elif kind == "int8":
        model = nncf.quantize(
            model,
            dataset,
            preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(windows),
            fast_bias_correction=True,
        )
    elif kind == "int4":
        model = nncf.compress_weights(
            model,
            mode=nncf.CompressWeightsMode.INT4_ASYM,
            group_size=BLOCK,
            ratio=1.0,
            dataset=dataset,
            awq=True,
            scale_estimation=True,
            subset_size=len(windows),
        )
    else:
        raise ValueError(f"no such kind: {kind}")
    ov.save_model(model, folder / MODEL, compress_to_fp16=False)


def _feeds(ids: np.ndarray) -> dict[str, np.ndarray]:
    """The inputs of a stateful model for one window, ids [T]."""
    return {
        contract.INPUT_IDS: ids[None],
        contract.ATTENTION_MASK: np.ones((1, len(ids)), np.int64),
        contract.POSITION_IDS: np.arange(len(ids))[None],
        "beam_idx": np.zeros(1, np.int32),
    }
