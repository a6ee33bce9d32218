"""A recipe, carried out: fp32 artifact -> quantized ONNX file, and what the manifest says of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from core import artifact, onnx_file
from core.corpus import Split
from core.errors import UserError
from quantize.calibrate import Plan, Site, calibrate, calibration_windows
from quantize.dynamic import quantize_dynamic
from quantize.ort import ort_dynamic, ort_static
from quantize.recipes import DynamicInt8, OrtDynamic, OrtStatic, Recipe, StaticInt8, calibration_of
from quantize.rounding import Grid
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
    model = onnx_file.load(path)
    kept = left_in_float(model.graph)
    sites = decide(model, windows, recipe, work)
    rewrite = quantize_static if isinstance(recipe, StaticInt8) else quantize_dynamic
    projections, embeddings = rewrite(model, sites)
    if not projections:
        raise UserError(f"{path}: has no product with a constant weight; nothing was quantized")
    onnx_file.save(model, work)
    return details | {
        "projections": {name: site.account for name, site in sites.items()},
        "embeddings": [embedding.name for embedding in embeddings],
        "left_in_float": kept,
    }


def decide(model: ir.Model, windows: np.ndarray, recipe: DynamicInt8 | StaticInt8, work: Path) -> dict[str, Site]:
    """The decision on every projection of `model` by its name; smooths the model in place."""
    static = isinstance(recipe, StaticInt8)
    plan = Plan(
        Grid(8),
        recipe.rounding,
        recipe.smoothing,
        recipe.ranges if static else "row",
        recipe.float_channels if static else 0,
    )
    with artifact.staging(work / "calibration") as folder:
        return calibrate(model, windows, plan, folder)
