"""A recipe, carried out: fp32 artifact -> quantized ONNX file, and what the manifest says of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from core import artifact, onnx_file
from core.corpus import Split
from core.errors import UserError
from quantize.calibrate import calibration_windows, input_ranges
from quantize.dynamic import quantize_dynamic
from quantize.ort import ort_dynamic, ort_static
from quantize.recipes import DynamicInt8, OrtDynamic, OrtStatic, Recipe, StaticInt8, calibration_of
from quantize.sites import left_in_float
from quantize.static import quantize_static


def apply(recipe: Recipe, parent: Path, work: Path, split: Split | None) -> dict:
    """Write work/model.onnx; returns what the manifest says of it. Runs in a process of its own."""
    path = parent / artifact.MODEL
    settings = calibration_of(recipe)
    windows = calibration_windows(parent, split, settings) if settings else None
    details: dict = (
        {} if windows is None else {"calibration": {"windows": len(windows), "tokens_per_window": windows.shape[1]}}
    )
    match recipe:
        case OrtDynamic():
            ort_dynamic(path, work)
            return details
        case OrtStatic():
            ort_static(path, work, windows)
            return details
        case StaticInt8():
            with artifact.staging(work / "observer") as observer:
                ranges = input_ranges(path, windows, observer)
            model = onnx_file.load(path)
            kept = left_in_float(model.graph)
            projections, embeddings = quantize_static(model, ranges)
            details["ranges"] = {
                projection.name: dataclasses.asdict(ranges[projection.x.name]) for projection in projections
            }
        case DynamicInt8():
            model = onnx_file.load(path)
            kept = left_in_float(model.graph)
            projections, embeddings = quantize_dynamic(model)
    if not projections:
        raise UserError(f"{path}: has no product with a constant weight; nothing was quantized")
    onnx_file.save(model, work)
    return details | {
        "quantized": {"projections": [p.name for p in projections], "embeddings": [e.name for e in embeddings]},
        "left_in_float": kept,
    }
