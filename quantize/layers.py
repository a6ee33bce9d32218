"""The steps that all recipes for linear layers share: calibrate, decide for each layer, rewrite the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as ir

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Split
from cuantiza.core.machine.progress import working
from cuantiza.core.store import artifact, folders
from cuantiza.core.store.digests import digest
from cuantiza.quantize.decide.calibrate import calibrate, calibration_windows
from cuantiza.quantize.decide.decision import Decision, Job, Plan, Rewrite
from cuantiza.quantize.rewrite.find import left_in_float
from cuantiza.quantize.rewrite.fuse_attention import check_attention
from cuantiza.quantize.settings import Calibration, Target
from cuantiza.quantize.steps import load_graph, save_graph

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

    def make(self, parent: Path, work: Path, split: Split, calibrated: Calibrated | None = None) -> dict:
        """Write the files of the artifact into the folder `work`, with `write_quantized`."""


@dataclass(frozen=True)
class Calibrated:
    """What calibration decided for a recipe.

    `model` is the fp32 graph after smoothing, which other recipes may share; `decisions` are those on its linear layers,
    by name; `windows` int64 [n, T] are the text; `left_in_float` lists what no recipe for linear layers quantizes.
    """

    model: ir.Model
    decisions: dict[str, Decision]
    windows: np.ndarray
    left_in_float: list[dict]


def write_quantized(
    recipe: QuantizesLayers,
    parent: Path,
    work: Path,
    split: Split,
    calibrated: Calibrated | None,
    leave_in_float: LeaveInFloat | None = None,
) -> dict:
    """Write work/model.onnx: the graph of the fp32 artifact `parent`, quantized by `recipe`, calibrated on `split`.

    `calibrated` is what calibration decided together with that of other recipes; None to calibrate here. Returns
    `details` for the manifest. Raises UserError as `calibrate_recipes` does.
    """
    if calibrated is None:
        (calibrated,) = calibrate_recipes([recipe], parent, work, split)
    model, decisions, windows = calibrated.model.clone(), calibrated.decisions, calibrated.windows
    if recipe.target == "ort":
        check_attention(model, parent / artifact.MODEL)
    details: dict = {}
    if leave_in_float is not None:
        decisions, details = leave_in_float(model, decisions, windows)
    _, embeddings = recipe.rewrite()(model, decisions)
    details |= {
        "projections": {name: decision.details for name, decision in decisions.items()},
        "embeddings": [embedding.name for embedding in embeddings],
        "left_in_float": calibrated.left_in_float,
    }
    return calibrated_on(windows, split) | details | save_graph(model, parent, work, recipe.target)


def calibrate_recipes(recipes: Sequence[QuantizesLayers], parent: Path, work: Path, split: Split) -> list[Calibrated]:
    """Calibrate `recipes` for the fp32 artifact `parent` on the text `split`: what they have in common is done once.

    Recipes with the same plan and windows, such as both forms of one, share their decisions. Others share the run of the
    fp32 model (quantize/decide/calibrate.py). Each has the decisions that it would have alone. `work` is a folder for
    temporary files. Raises UserError if the graph has no linear layer, or is not what any of the targets needs, or if
    `split` is too short.
    """
    windows = _windows_of([recipe.calibration for recipe in recipes], parent, split)
    graph = load_graph(parent, "ort" if all(recipe.target == "ort" for recipe in recipes) else "portable")
    found: dict[int, Calibrated] = {}
    for places in _with_common_text(windows):
        jobs: list[Job] = []
        job_of: dict[int, int] = {}
        for place in places:
            plan, count = recipes[place].plan(), len(windows[place])
            alike = (number for number, job in enumerate(jobs) if (job.plan, job.windows) == (plan, count))
            job_of[place] = next(alike, len(jobs))
            if job_of[place] == len(jobs):
                jobs.append(Job(graph.clone(), plan, count))
        with folders.staging(work / "calibration") as folder:
            decided = calibrate(graph, jobs, windows[places[0]], folder)
        if not decided[0]:
            raise UserError(f"{parent}: has no linear layer (a matmul with a constant weight); nothing was quantized")
        kept = left_in_float(graph.graph)
        found |= {
            place: Calibrated(jobs[number].model, decided[number], windows[place], kept)
            for place, number in job_of.items()
        }
    return [found[place] for place in range(len(recipes))]


def _windows_of(calibrations: Sequence[Calibration], parent: Path, split: Split) -> list[np.ndarray]:
    """Return the calibration windows int64 [n, T] for each of `calibrations`.

    The model writes text once for all that have windows of one length: fewer windows are the first of more.
    """
    longest: dict[object, Calibration] = {}
    keys = [one if split.seed is None else one.tokens for one in calibrations]
    for key, one in zip(keys, calibrations, strict=True):
        longest[key] = max(longest.get(key, one), one, key=lambda calibration: calibration.windows)
    found = {key: calibration_windows(parent, split, one) for key, one in longest.items()}
    return [found[key][: one.windows] for key, one in zip(keys, calibrations, strict=True)]


def _with_common_text(windows: Sequence[np.ndarray]) -> list[list[int]]:
    """Group the places of `windows`: each text is the beginning of the first, and longest, of its group."""
    groups: list[list[int]] = []
    for place in sorted(range(len(windows)), key=lambda place: -len(windows[place])):
        text = windows[place]
        begun = (group for group in groups if np.array_equal(windows[group[0]][: len(text)], text))
        group = next(begun, None)
        if group is None:
            groups.append([place])
        else:
            group.append(place)
    return groups


class Together:
    """Recipes by the names of their artifacts, which are made together in a process that the stage starts for them."""

    def __init__(self, recipes: dict[str, QuantizesLayers], parent: Path, split: Split) -> None:
        self._recipes, self._parent, self._split = recipes, parent, split
        self._calibrated: dict[str, Calibrated] = {}

    def calibrate(self, work: Path) -> None:
        """Calibrate all of them, with temporary files in `work`."""
        with working(", ".join(self._recipes)):
            found = calibrate_recipes(list(self._recipes.values()), self._parent, work, self._split)
        self._calibrated = dict(zip(self._recipes, found, strict=True))

    def make(self, name: str, work: Path) -> dict:
        """Write the files of the artifact `name` into `work`; return `details` for the manifest."""
        with working(name):
            return self._recipes[name].make(self._parent, work, self._split, self._calibrated.pop(name))


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
        return calibrate(model.clone(), [Job(model, plan, len(windows))], windows, folder, until)[0]
