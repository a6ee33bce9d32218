"""The steps that all recipes for linear layers share: calibrate, decide for each layer, rewrite the graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as ir

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Split
from cuantiza.core.store import folders
from cuantiza.core.store.digests import digest
from cuantiza.quantize.decide.calibrate import calibrate, calibration_windows
from cuantiza.quantize.decide.decision import Decision, Plan, Rewrite
from cuantiza.quantize.rewrite.find import left_in_float
from cuantiza.quantize.settings import Calibration, Target
from cuantiza.quantize.steps import write_graph

# This function gets a model, the decisions on its linear layers and the calibration windows int64 [n, T]. It returns
# the decisions to apply, and `details` for the manifest about the layers that stay in floating point.
LeaveInFloat = Callable[[ir.Model, dict[str, Decision], np.ndarray], tuple[dict[str, Decision], dict]]


class QuantizesLayers(Protocol):
    """A recipe that quantizes linear layers: its settings, what to decide, and how the decisions become a graph."""

    @property
    def calibration(self) -> Calibration: ...

    @property
    def target(self) -> Target: ...

    def plan(self) -> Plan:
        """Return what calibration has to decide for each linear layer."""

    def rewrite(self) -> Rewrite:
        """Return the pass that writes the decisions into a graph."""


def write_quantized(
    recipe: QuantizesLayers, parent: Path, work: Path, split: Split, leave_in_float: LeaveInFloat | None = None
) -> dict:
    """Write work/model.onnx: the graph of the fp32 artifact `parent`, quantized by `recipe`, calibrated on `split`.

    Returns `details` for the manifest. Raises UserError if the graph has no linear layer, or if `split` is too short.
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

    return calibrated_on(windows, split) | write_graph(parent, work, recipe.target, rewrite)


def calibrated_on(windows: np.ndarray, split: Split) -> dict:
    """Return the entry of the manifest about calibration windows int64 [n, T] of `split`.

    Of text that the model wrote it has the seed, and the sha256 of its token ids.
    """
    written = {} if split.seed is None else {"seed": split.seed, "tokens_sha256": digest(windows.tolist())}
    return {"calibration": {"windows": len(windows), "tokens_per_window": windows.shape[1]} | written}


def decide(
    model: ir.Model, windows: np.ndarray, plan: Plan, work: Path, until: str | None = None
) -> dict[str, Decision]:
    """Decide how to quantize every linear layer of `model`; return the decisions by layer name.

    `model` is smoothed in place. `windows` are token ids int64 [n, T]; `work` is a folder for temporary files. If
    `until` names a linear layer, those after its block of the graph (quantize/decide/blocks.py) are left out.
    """
    with folders.staging(work / "calibration") as folder:
        return calibrate(model, windows, plan, folder, until)
