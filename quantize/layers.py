"""The steps that recipes share which quantize linear layers: calibrate, decide on each layer, rewrite the graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as ir

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Split
from cuantiza.core.store import folders
from cuantiza.quantize.decide.calibrate import calibrate, calibration_windows
from cuantiza.quantize.decide.decision import Decision, Plan, Rewrite
from cuantiza.quantize.rewrite.find import left_in_float
from cuantiza.quantize.settings import Calibration, Target
from cuantiza.quantize.steps import write_graph

# A model, the decisions on its layers and the calibration windows int64 [n, T] -> the decisions that stay, and what the
# manifest says of the layers that are left in floating point.
LeaveInFloat = Callable[[ir.Model, dict[str, Decision], np.ndarray], tuple[dict[str, Decision], dict]]


class QuantizesLayers(Protocol):
    """A recipe that quantizes linear layers: its settings, what it has decided, and how the decisions become a graph."""

    @property
    def calibration(self) -> Calibration: ...

    @property
    def target(self) -> Target: ...

    def plan(self) -> Plan:
        """What calibration decides on each linear layer."""

    def rewrite(self) -> Rewrite:
        """The pass that writes the decisions into a graph."""


def write_quantized(
    recipe: QuantizesLayers, parent: Path, work: Path, split: Split, leave_in_float: LeaveInFloat | None = None
) -> dict:
    """Write work/model.onnx: the fp32 artifact `parent`, quantized by `recipe`, which is calibrated on `split`.

    Returns what the manifest says of it. Raises UserError where the graph has no linear layer, or `split` is too short.
    """
    windows = calibration_windows(parent, split, recipe.calibration)

    def rewrite(model: ir.Model) -> dict:
        kept = left_in_float(model.graph)
        decisions = decide(model, windows, recipe.plan(), work)
        if not decisions:
            raise UserError(f"{parent}: has no linear layer (a matmul with a constant weight); nothing was quantized")
        details: dict = {}
        if leave_in_float is not None:
            decisions, details = leave_in_float(model, decisions, windows)
        _, embeddings = recipe.rewrite()(model, decisions)
        return details | {
            "projections": {name: decision.details for name, decision in decisions.items()},
            "embeddings": [embedding.name for embedding in embeddings],
            "left_in_float": kept,
        }

    return calibrated_on(windows) | write_graph(parent, work, recipe.target, rewrite)


def calibrated_on(windows: np.ndarray) -> dict:
    """What the manifest says of calibration windows int64 [n, T]."""
    return {"calibration": {"windows": len(windows), "tokens_per_window": windows.shape[1]}}


def decide(
    model: ir.Model, windows: np.ndarray, plan: Plan, work: Path, until: str | None = None
) -> dict[str, Decision]:
    """The decision on every linear layer of `model` by its name, or up to the layer `until`; smooths `model` in place.

    `windows` are token ids int64 [n, T]; `work` is a folder for temporary files.
    """
    with folders.staging(work / "calibration") as folder:
        return calibrate(model, windows, plan, folder, until)
