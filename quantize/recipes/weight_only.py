"""The recipes int8-weight and int4-weight: weights in integers of 8 or 4 bits; activations stay in floating point."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cuantiza.quantize.settings import (
    ALPHAS,
    BLOCKS_OPSET,
    Calibration,
    Target,
    WeightRounding,
    check_exponents,
    for_target,
)

if TYPE_CHECKING:
    from cuantiza.core.inputs.corpus import Split
    from cuantiza.quantize.decide.decision import Plan, Rewrite
    from cuantiza.quantize.layers import Calibrated
    from cuantiza.quantize.weights.rounding import Grid

# At 4 bits, twice as many windows as 8 bits need lower KL further (quantize/settings.py).
_CALIBRATION = Calibration(windows=32)
# The smallest block of ONNX Runtime's MatMulNBits.
_LEAST_BLOCK = 16


@dataclass(frozen=True)
class WeightOnly:
    """Quantizes only the weights of linear layers, to `bits` bits; the graph keeps activations in floating point.

    Every `block` inputs of a channel share a scale, and a zero point unless `symmetric`; None is one scale per channel.
    With `scale_bits` 8, a byte stores each scale, as a multiple of a step of its channel. The matrices of the head and
    the embeddings have their own settings, `table_bits` and `table_block`.

    The target "ort" uses ONNX Runtime's MatMulNBits, which quantizes activations to int8 with a scale per block.
    """

    bits: Literal[4, 8]
    block: int | None
    symmetric: bool
    table_bits: Literal[4, 8] = 8
    table_block: int | None = None
    scale_bits: Literal[8, 32] = 32
    rounding: WeightRounding = "descent"
    smoothing: tuple[float, ...] = ALPHAS
    target: Target = "portable"
    calibration: Calibration = _CALIBRATION

    def __post_init__(self) -> None:
        check_exponents(self.smoothing)
        for block in (self.block, self.table_block):
            if block is not None and block < 1:
                raise ValueError(f"block is {block}; give a number of inputs from 1, or null for one scale a channel")
            if block is not None and self.target == "ort" and (block < _LEAST_BLOCK or block & (block - 1)):
                raise ValueError(
                    f"block is {block}; target ort takes blocks of a power of two from {_LEAST_BLOCK} on (MatMulNBits), or "
                    "null for one scale a channel"
                )
        if self.scale_bits == 8 and self.block is None:
            raise ValueError("scale_bits is 8, but block is null; give a block, or scale_bits 32")

    @property
    def least_opset(self) -> int:
        """The opset that the standard operators need; ONNX Runtime's own have no such limit."""
        return BLOCKS_OPSET if self.target == "portable" else 0

    def describe(self) -> str:
        """Describe the recipe in one line, for `cuantiza recipes`."""
        scale = "scale" if self.scale_bits == 32 else f"{self.scale_bits}-bit scale"
        parameters = f"{'an' if self.scale_bits == 8 else 'a'} {scale}" if self.symmetric else f"{scale} and zero point"
        place = "channel" if self.block is None else f"{self.block} inputs"
        portable = (
            "computed in fp32" if self.block is None or self.bits == 8 else "DequantizeLinear, which ONNX Runtime fuses"
        )
        how = "MatMulNBits, int8 activations" if self.target == "ort" else portable
        return for_target(f"weights in {self.bits} bits, {parameters} per {place}; {how}", self.target)

    def table(self) -> Grid:
        """Return the grid of the matrices of the head and the embeddings."""
        from cuantiza.quantize.weights.rounding import Grid

        scale_bits = self.scale_bits if self.table_block is not None else 32
        return Grid(self.table_bits, self.table_block, self.symmetric, scale_bits)

    def plan(self) -> Plan:
        """Return what calibration has to decide for each linear layer."""
        from cuantiza.quantize.decide.decision import Plan
        from cuantiza.quantize.weights.rounding import Grid

        grid = Grid(self.bits, self.block, self.symmetric, self.scale_bits)
        return Plan(grid, self.rounding, self.smoothing, table=self.table())

    def rewrite(self) -> Rewrite:
        """Return the pass that writes the decisions into a graph."""
        from cuantiza.quantize.rewrite.weight_only import choose_weights, quantize_weights

        return lambda model, decisions: quantize_weights(
            model, choose_weights(model, decisions, self.table()), self.target
        )

    def make(self, parent: Path, work: Path, split: Split, calibrated: Calibrated | None = None) -> dict:
        """Write the quantized form of the fp32 artifact `parent` into the folder `work`, calibrated on `split`.

        `calibrated` is what calibration decided, where that was done for several recipes at once. Returns `details` for
        the manifest. The stage calls this in another process.
        """
        from cuantiza.quantize.layers import write_quantized

        return write_quantized(self, parent, work, split, calibrated)
