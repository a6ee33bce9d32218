"""The recipe int8-static: weights and activations in 8 bits, with one range per activation, fixed by calibration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cuantiza.quantize.settings import (
    ALPHAS,
    CALIBRATION,
    MAX_ERROR,
    Calibration,
    Ranges,
    Rounding,
    Target,
    check_exponents,
    check_max_error,
    for_target,
)

if TYPE_CHECKING:
    from cuantiza.core.inputs.corpus import Split
    from cuantiza.quantize.decide.decision import Plan, Rewrite
    from cuantiza.quantize.layers import Calibrated


@dataclass(frozen=True)
class StaticInt8:
    """Quantizes weights to int8 per channel, and activations to uint8 per tensor, with ranges from calibration.

    Up to `float_channels` input channels of a linear layer stay in floating point, where that lowers its error enough.
    Where 8 bits would still add a relative squared error above `max_error` to a matmul, its activations get 16: two
    uint8 tensors. null leaves all at 8 bits.
    """

    rounding: Rounding = "gptq"
    smoothing: tuple[float, ...] = ALPHAS
    ranges: Ranges = "mse"
    float_channels: int = 16
    calibration: Calibration = CALIBRATION
    target: Target = "portable"
    max_error: float | None = MAX_ERROR

    def __post_init__(self) -> None:
        check_exponents(self.smoothing)
        check_max_error(self.max_error)
        if self.float_channels < 0:
            raise ValueError(f"float_channels is {self.float_channels}; give a number from 0")

    def describe(self) -> str:
        """Describe the recipe in one line, for `cuantiza recipes`."""
        line = f"weights s8 per channel; activations u8, a fixed {self.ranges} range per tensor"
        return for_target(line, self.target)

    def plan(self) -> Plan:
        """Return what calibration has to decide for each linear layer."""
        from cuantiza.quantize.decide.decision import Plan
        from cuantiza.quantize.weights.rounding import Grid

        grid = Grid(8, pairs=True)
        return Plan(grid, self.rounding, self.smoothing, self.ranges, self.float_channels, self.max_error, grid)

    def rewrite(self) -> Rewrite:
        """Return the pass that writes the decisions into a graph."""
        from cuantiza.quantize.rewrite.static import quantize_static

        return lambda model, decisions: quantize_static(model, decisions, self.target)

    def make(self, parent: Path, work: Path, split: Split, calibrated: Calibrated | None = None) -> dict:
        """Write the quantized form of the fp32 artifact `parent` into the folder `work`, calibrated on `split`.

        `calibrated` is what calibration decided, where that was done for several recipes at once. Returns `details` for
        the manifest. The stage calls this in another process.
        """
        from cuantiza.quantize.layers import write_quantized

        return write_quantized(self, parent, work, split, calibrated)
