"""The recipe int-mixed: weights in 4 and 8 bits, as many as a budget in bytes allows, or as few as one in KL needs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cuantiza.quantize.settings import ALPHAS, BLOCKS_OPSET, Calibration, Target, for_target

if TYPE_CHECKING:
    import numpy as np

    from cuantiza.core.inputs.corpus import Split
    from cuantiza.quantize.decide.decision import Plan, Rewrite
    from cuantiza.quantize.mixed import Mixed

    # The calibration windows int64 [n, T], and the integers that were chosen on them.
    Spent = tuple[np.ndarray, Mixed]

# Of 40 windows, 10 measure and 30 calibrate, which is about as many as int4-weight has.
_CALIBRATION = Calibration(windows=40)
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}


@dataclass(frozen=True)
class MixedWeightOnly:
    """Quantizes only weights, as int4-weight does, each matrix to 4 or 8 bits so that a budget is kept.

    Either `max_bytes` is a budget in bytes of the ONNX file, such as "5MB", or "0.16x" for a share of fp32's; or `max_kl`
    is one in nats per token, the KL divergence from fp32 on windows of the calibration text that decide nothing.
    """

    max_bytes: str | None = None
    max_kl: float | None = None
    target: Target = "portable"
    calibration: Calibration = _CALIBRATION

    def __post_init__(self) -> None:
        if (self.max_bytes is None) == (self.max_kl is None):
            raise ValueError("max_bytes and max_kl: give one of the two")
        if self.max_bytes is not None:
            bytes_of(self.max_bytes, 1)
        if self.max_kl is not None and not 0 < self.max_kl < math.inf:
            raise ValueError(f"max_kl is {self.max_kl}; give a number of nats above 0, such as 0.01")

        for name in ("windows", "minimum"):
            if (count := getattr(self.calibration, name)) < 3:
                raise ValueError(
                    f"calibration has {name} {count}; give 3 or more: some windows calibrate, others measure"
                )

    @property
    def least_opset(self) -> int:
        """The opset of standard operators, with which both targets are measured."""
        return BLOCKS_OPSET

    def describe(self) -> str:
        """Describe the recipe in one line, for `cuantiza recipes`."""
        budget = (
            f"in a file of at most {self.max_bytes}"
            if self.max_kl is None
            else f"for a KL of at most {self.max_kl} nats"
        )
        return for_target(f"weights in 4 or 8 bits, matrix by matrix, {budget}", self.target)

    def plan(self) -> Plan:
        """Return what calibration has to decide for each linear layer, before each matrix has a grid of its own."""
        from cuantiza.quantize.decide.decision import Plan
        from cuantiza.quantize.mixed import BASE

        return Plan(BASE, "follow", ALPHAS, table=BASE)

    def rewrite(self) -> Rewrite:
        """Return the pass that writes decisions of that plan into a graph."""
        from cuantiza.quantize.mixed import BASE
        from cuantiza.quantize.rewrite.weight_only import choose_weights, quantize_weights

        return lambda model, decisions: quantize_weights(model, choose_weights(model, decisions, BASE), self.target)

    def spend(self, parent: Path, work: Path, split: Split, known: dict | None = None) -> Spent:
        """Choose the bits of each matrix of the fp32 artifact `parent` and round it, calibrated on `split`.

        That does not depend on the target. `known` is what the manifest of the form for the other target says of the
        bits, which are not chosen once more. `work` is a folder for temporary files. Raises UserError where no choice of
        bits keeps the budget.
        """
        from cuantiza.quantize.decide.calibrate import calibration_windows
        from cuantiza.quantize.mixed import spend, spend_again
        from cuantiza.quantize.steps import stored_bytes

        windows = calibration_windows(parent, split, self.calibration)
        if known is not None:
            return windows, spend_again(parent, work, windows, self.plan(), known)
        budget = None if self.max_bytes is None else bytes_of(self.max_bytes, stored_bytes(parent))
        return windows, spend(parent, work, windows, self.plan(), budget, self.max_kl)

    def make(
        self, parent: Path, work: Path, split: Split, spent: Spent | None = None, known: dict | None = None
    ) -> dict:
        """Write the quantized form of the fp32 artifact `parent` into the folder `work`, calibrated on `split`.

        `spent` is what `spend` returned for this recipe or its form for the other target; without it `spend` is called, which
        `known` is for. Returns `details` for the manifest. The stage calls this in another process.
        """
        from cuantiza.quantize.layers import calibrated_on
        from cuantiza.quantize.rewrite.find import left_in_float
        from cuantiza.quantize.rewrite.weight_only import quantize_weights
        from cuantiza.quantize.steps import load_graph, save_graph

        model = load_graph(parent, self.target)
        kept = left_in_float(model.graph)
        windows, found = spent or self.spend(parent, work, split, known)
        model.graph = found.model.clone().graph
        _, embeddings = quantize_weights(model, found.weights, self.target)
        details = {
            "mixed": found.details,
            "projections": {name: decision.details for name, decision in found.decisions.items()},
            "embeddings": [embedding.name for embedding in embeddings],
            "left_in_float": kept,
        }
        return calibrated_on(windows, split) | details | save_graph(model, parent, work, self.target)


class BothForms:
    """Forms of one such recipe by the names of their artifacts, which are made in one process and decide once."""

    def __init__(self, recipes: dict[str, MixedWeightOnly], parent: Path, split: Split) -> None:
        self._recipes, self._parent, self._split = recipes, parent, split

    def calibrate(self, work: Path) -> None:
        """Spend the budget, with temporary files in `work`."""
        from cuantiza.core.machine.progress import working

        with working(", ".join(self._recipes)):
            self._spent = next(iter(self._recipes.values())).spend(self._parent, work, self._split)

    def make(self, name: str, work: Path) -> dict:
        """Write the files of the artifact `name` into `work`; return `details` for the manifest."""
        return self._recipes[name].make(self._parent, work, self._split, self._spent)


def bytes_of(size: str, fp32: int) -> int:
    """Return the bytes that `size` says: "5MB", "4900kB", "5000000", or "0.16x" for a share of `fp32` bytes.

    Raises ValueError if it says none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(x|b|kb|mb|gb|)\s*", size.lower())
    if found is None or not float(found[1]) or (found[2] == "" and "." in found[1]):
        raise ValueError(f"max_bytes is {size}; give bytes, such as 5MB or 4900kB, or 0.16x for a share of fp32's")
    return int(float(found[1]) * (fp32 if found[2] == "x" else _UNITS[found[2]]))
