"""The recipe int8-static-mixed: int8-static, with linear layers left in float until perplexity is within a budget."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cuantiza.quantize.recipes.int8_static import StaticInt8
from cuantiza.quantize.settings import Calibration, Target, for_target

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from cuantiza.core.inputs.corpus import Split
    from cuantiza.quantize.decide.decision import Decision, Plan, Rewrite
    from cuantiza.quantize.layers import Calibrated

_STATIC = StaticInt8()


@dataclass(frozen=True)
class MixedStaticInt8:
    """Quantizes as `static` does, but leaves linear layers in floating point until ln perplexity is within a budget.

    The layers with the largest effect are left out first. The budget `max_delta_ln_ppl` is the rise of ln perplexity in
    nats per token, measured on calibration windows.
    """

    max_delta_ln_ppl: float = 0.002
    static: StaticInt8 = _STATIC

    def __post_init__(self) -> None:
        if not 0 <= self.max_delta_ln_ppl < math.inf:
            raise ValueError(f"max_delta_ln_ppl is {self.max_delta_ln_ppl}; give a number of nats from 0")

    @property
    def calibration(self) -> Calibration:
        return self.static.calibration

    @property
    def target(self) -> Target:
        return self.static.target

    def describe(self) -> str:
        """Describe the recipe in one line, for `cuantiza recipes`."""
        line = f"as int8-static, with linear layers left in float until Δ ln ppl is at most {self.max_delta_ln_ppl}"
        return for_target(line, self.target)

    def plan(self) -> Plan:
        """Return what calibration has to decide for each linear layer."""
        return self.static.plan()

    def rewrite(self) -> Rewrite:
        """Return the pass that writes the decisions into a graph."""
        return self.static.rewrite()

    def make(self, parent: Path, work: Path, split: Split, calibrated: Calibrated | None = None) -> dict:
        """Write the quantized form of the fp32 artifact `parent` into the folder `work`, calibrated on `split`.

        `calibrated` is what calibration decided, where that was done for several recipes at once. Returns `details` for
        the manifest. The stage calls this in another process.
        """
        from cuantiza.core.store import artifact, folders
        from cuantiza.quantize.inspect.sensitivity import EVERY, Gauge, within_budget
        from cuantiza.quantize.layers import write_quantized
        from cuantiza.quantize.rewrite.static import quantize_static

        def leave_in_float(
            model: ir.Model, decisions: dict[str, Decision], windows: np.ndarray
        ) -> tuple[dict[str, Decision], dict]:
            with folders.staging(work / "gauge") as folder:
                gauge = Gauge(parent / artifact.MODEL, windows[::EVERY], folder)
                kept, effect = within_budget(model, decisions, quantize_static, gauge, self.max_delta_ln_ppl)
            details = {
                "max_delta_ln_ppl": self.max_delta_ln_ppl,
                "measured_on_calibration": asdict(effect),
                "kept_in_float": {name: asdict(alone) for name, alone in kept.items()},
            }
            return {name: found for name, found in decisions.items() if name not in kept}, {"mixed": details}

        return write_quantized(self, parent, work, split, calibrated, leave_in_float)
