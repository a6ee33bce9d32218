"""A recipe, carried out: fp32 artifact -> quantized ONNX file, and what the manifest says of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx_ir as ir

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Split
from cuantiza.core.inputs.model_config import max_positions, read_config
from cuantiza.core.onnx import file as onnx_file
from cuantiza.core.onnx.genai_config import GENAI_CONFIG, genai_config
from cuantiza.core.run.exact_int8 import EXACT
from cuantiza.core.store import artifact, folders
from cuantiza.quantize.decide.calibrate import calibrate, calibration_windows
from cuantiza.quantize.decide.decision import Plan, Site
from cuantiza.quantize.decide.rounding import Grid
from cuantiza.quantize.inspect.sensitivity import EVERY, Gauge, Rewrite, within_budget
from cuantiza.quantize.recipes import (
    DynamicInt8,
    Half,
    MixedStaticInt8,
    OrtDynamic,
    OrtStatic,
    Recipe,
    StaticInt8,
    WeightOnly,
    calibration_of,
)
from cuantiza.quantize.rewrite.dynamic import quantize_dynamic
from cuantiza.quantize.rewrite.find import left_in_float
from cuantiza.quantize.rewrite.fuse_attention import check_attention, fuse_attention
from cuantiza.quantize.rewrite.half import store_half
from cuantiza.quantize.rewrite.onnxruntime_tools import ort_dynamic, ort_static
from cuantiza.quantize.rewrite.static import quantize_static
from cuantiza.quantize.rewrite.weight_only import choose_weights, quantize_weights


def apply(recipe: Recipe, parent: Path, work: Path, split: Split | None) -> dict:
    """Write work/model.onnx, and what its target needs beside it; returns what the manifest says of it.

    Runs in a process of its own.
    """
    details = _apply(recipe, parent, work, split)
    if isinstance(recipe, DynamicInt8 | StaticInt8 | MixedStaticInt8 | OrtDynamic | OrtStatic):
        # For whoever makes a session of it elsewhere; cuantiza/core/run/runtime.py does so by itself.
        details["session_options"] = {"x86-64 without VNNI": EXACT}
    return details


def _apply(recipe: Recipe, parent: Path, work: Path, split: Split | None) -> dict:
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
    if recipe.target == "ort":
        check_attention(model, path)
    kept = left_in_float(model.graph)
    match recipe:
        case Half():
            details["stored_in_16_bits"] = store_half(model, recipe.dtype)
        case DynamicInt8() | StaticInt8() | MixedStaticInt8() | WeightOnly():
            details |= _quantize(model, recipe, windows, parent, work) | {"left_in_float": kept}
    if recipe.target == "ort":
        details["fused_attention"] = fuse_attention(model)
        _write_genai_config(model.graph, parent, work)
    onnx_file.save(model, work)
    return details


def _write_genai_config(graph: ir.Graph, parent: Path, work: Path) -> None:
    """genai_config.json of a graph whose cache is updated in place."""
    keys = [value for value in graph.inputs if value.name.startswith("past_") and value.name.endswith(".key")]
    config = read_config(parent)
    fields = genai_config(
        config,
        json.loads((parent / "generation_config.json").read_text(encoding="utf-8")),
        layers=len(keys),
        heads=int(keys[0].shape[1]),
        head_dim=int(keys[0].shape[3]),
        vocabulary=int(graph.outputs[0].shape[-1]),
        positions=max_positions(config),
        in_place=True,
    )
    (work / GENAI_CONFIG).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")


def _quantize(model: ir.Model, recipe: Recipe, windows: np.ndarray, parent: Path, work: Path) -> dict:
    """Rewrite `model` in place; returns what the manifest says of its products and look-ups."""
    details: dict = {}
    sites = decide(model, windows, recipe, work)
    if not sites:
        raise UserError(f"{parent}: has no product with a constant weight; nothing was quantized")
    if isinstance(recipe, MixedStaticInt8):
        sites, details["mixed"] = _mix(model, sites, recipe, windows, parent, work)
    _, embeddings = rewrite_of(recipe)(model, sites)
    return details | {
        "projections": {name: site.account for name, site in sites.items()},
        "embeddings": [embedding.name for embedding in embeddings],
    }


def decide(
    model: ir.Model, windows: np.ndarray, recipe: Recipe, work: Path, until: str | None = None
) -> dict[str, Site]:
    """The decision on every projection of `model` by its name, or up to `until`; smooths the model in place."""
    match recipe:
        case DynamicInt8():
            plan = Plan(Grid(8), recipe.rounding, recipe.smoothing, "row")
        case StaticInt8() | MixedStaticInt8():
            static = recipe if isinstance(recipe, StaticInt8) else recipe.static
            plan = Plan(Grid(8), static.rounding, static.smoothing, static.ranges, static.float_channels)
        case WeightOnly():
            plan = Plan(Grid(recipe.bits, recipe.block, recipe.symmetric), recipe.rounding, recipe.smoothing)
    with folders.staging(work / "calibration") as folder:
        return calibrate(model, windows, plan, folder, until)


def rewrite_of(recipe: Recipe) -> Rewrite:
    """The pass that turns a model and the sites of `decide` into the recipe's graph."""
    match recipe:
        case DynamicInt8():
            return lambda model, sites: quantize_dynamic(model, sites, recipe.target)
        case WeightOnly():
            tables = Grid(recipe.table_bits, recipe.table_block, recipe.symmetric)
            return lambda model, sites: quantize_weights(model, choose_weights(model, sites, tables), recipe.target)
        case _:
            return lambda model, sites: quantize_static(model, sites, recipe.target)


def _mix(
    model: ir.Model, sites: dict[str, Site], recipe: MixedStaticInt8, windows: np.ndarray, parent: Path, work: Path
) -> tuple[dict[str, Site], dict]:
    """(the sites that stay quantized, what the manifest says of the others)."""
    with folders.staging(work / "gauge") as folder:
        gauge = Gauge(parent / artifact.MODEL, windows[::EVERY], folder)
        kept, effect = within_budget(model, sites, quantize_static, gauge, recipe.max_delta_ln_ppl)
    account = {
        "max_delta_ln_ppl": recipe.max_delta_ln_ppl,
        "measured_on_calibration": asdict(effect),
        "kept_in_float": {name: asdict(alone) for name, alone in kept.items()},
    }
    return {name: site for name, site in sites.items() if name not in kept}, account
