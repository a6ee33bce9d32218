"""int8-dynamic: weights and activations in 8 bits; each token's activations get a scale when they are computed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cuantiza.quantize.settings import ALPHAS, CALIBRATION, Calibration, Rounding, Target, check_exponents, for_target

if TYPE_CHECKING:
    from cuantiza.core.inputs.corpus import Split
    from cuantiza.quantize.decide.decision import Plan, Rewrite


@dataclass(frozen=True)
class DynamicInt8:
    """Weights s8 per channel; activations u8 with a scale for every token, computed as the token comes."""

    rounding: Rounding = "gptq"
    smoothing: tuple[float, ...] = ALPHAS
    calibration: Calibration = CALIBRATION
    target: Target = "portable"

    def __post_init__(self) -> None:
        check_exponents(self.smoothing)

    def describe(self) -> str:
        """One line for `cuantiza recipes`."""
        return for_target("weights s8 per channel; activations u8, a scale per token as it comes", self.target)

    def plan(self) -> Plan:
        """What calibration decides on each linear layer."""
        from cuantiza.quantize.decide.decision import Plan
        from cuantiza.quantize.decide.rounding import Grid

        return Plan(Grid(8), self.rounding, self.smoothing, "row")

    def rewrite(self) -> Rewrite:
        """The pass that writes the decisions into a graph."""
        from cuantiza.quantize.rewrite.dynamic import quantize_dynamic

        return lambda model, decisions: quantize_dynamic(model, decisions, self.target)

    def make(self, parent: Path, work: Path, split: Split) -> dict:
        """Write the quantized form of the fp32 artifact `parent` into the folder `work`, calibrated on `split`.

        Returns what the manifest says of it. The work is done in a process of its own.
        """
        from cuantiza.core.run.exact_int8 import SESSION_OPTIONS
        from cuantiza.quantize.layers import write_quantized

        return write_quantized(self, parent, work, split) | SESSION_OPTIONS
