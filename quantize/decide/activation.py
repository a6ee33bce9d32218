"""How activations are quantized to uint8, once or twice, and the error this adds to the matmul that reads them.

Activations become uint8 and not int8, because x86 kernels are fast for uint8 activations with int8 weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# The zero points that are tried where each token has its own scale. 128 is symmetric. Activations that are hardly
# negative (those after a GELU) need a small one, which leaves nearly all 8 bits for positive values.
ROW_ZERO_POINTS = (128, 64, 32, 16, 8)
# 16 bits: rounding leaves half a step at most, to either side, which the second 8 bits divide into −127..127.
RESIDUAL_STEPS, RESIDUAL_ZERO = 254, 128
# The graph rounds the largest magnitude of a row to fp16 (quantize/rewrite/dynamic.py), after clipping it to the range in
# which fp16 has all of its 11 bits.
LARGEST_MIN, LARGEST_MAX = np.float32(np.finfo(np.float16).tiny), np.float32(np.finfo(np.float16).max)
# The largest magnitude that calibration saw is at least by this factor below, and that of the usual row above.
_SPARE = 4


@dataclass(frozen=True)
class PerRow:
    """Each row (token) has its own scale, computed at run time: the smallest that covers the row.

    The zero point is fixed. With zero point 128 the integers stand for −127..127, as in symmetric int8, so that
    max|x| alone gives the scale.

    With 16 `bits`, what the first integers leave is quantized again, with a scale that is 1/254 of theirs: the matmul of
    a second uint8 tensor with the same weights is added.

    Rows are divided by 2^`exponent` before their largest magnitude is rounded to fp16. It is 0 where they fit as they are.
    """

    zero_point: int = 128
    bits: int = 8
    exponent: int = 0

    def restore(self, x: np.ndarray) -> np.ndarray:
        """Quantize `x` [R, K] to uint8 and dequantize it again."""
        above, below = _levels(self.zero_point)
        scale = np.maximum(x.max(axis=1, keepdims=True) / above, -x.min(axis=1, keepdims=True) / below)
        unit = np.float32(2.0**self.exponent / above)
        scale = scale.clip(LARGEST_MIN * unit, LARGEST_MAX * unit)
        rounded = np.rint(x / scale).clip(-self.zero_point, above)
        return _with_residual(x / scale, rounded, self.bits) * scale


def fitting_row(rows: np.ndarray, low: float, high: float, zero_point: int = 128, bits: int = 8) -> PerRow:
    """Return PerRow with the exponent that suits `rows` [R, K], a sample of those between `low` and `high`.

    fp16 has a range of 2^30, so nearly all activations fit as they are. The inputs of the last linear layer of a gated
    MLP, products of two activations, are those that may not.
    """
    above, below = _levels(zero_point)
    largest = max(high, -low * above / below)
    sizes = np.maximum(rows.max(axis=1), -rows.min(axis=1) * (above / below))
    too_large = _SPARE * largest > LARGEST_MAX
    too_small = bool(sizes.any()) and np.median(sizes[sizes > 0]) < _SPARE * LARGEST_MIN
    fitting = math.frexp(largest)[1] - math.frexp(float(LARGEST_MAX) / _SPARE)[1] + 1
    return PerRow(zero_point, bits, fitting if too_large else min(fitting, 0) if too_small else 0)


def _levels(zero_point: int) -> tuple[int, int]:
    """How many integers there are above and below the zero point of a row; as many of both for 128."""
    above = 255 - zero_point
    return above, min(zero_point, above)


@dataclass(frozen=True)
class PerTensor:
    """The whole tensor has one scale and zero point, fixed in advance. Values outside `low`..`high` are clipped.

    16 `bits` are two tensors of 8 bits, as in PerRow.
    """

    low: float
    high: float
    bits: int = 8

    @classmethod
    def of_16_bits(cls, largest: float) -> PerTensor:
        """Return a range for 16 bits, where `largest` is the largest magnitude that was seen.

        It is twice as wide: of 16 bits, one can be given away so that no value of another text is clipped.
        """
        return cls(-2 * largest, 2 * largest, 16)

    @property
    def parameters(self) -> tuple[np.float32, np.uint8]:
        """(scale, zero point) that map [low, high] to 0..255. The range is widened to contain 0, which stays exact.

        For 16 bits, the range is symmetric and maps to 1..255.
        """
        if self.bits == 16:
            return np.float32(self.high / 127) or np.float32(1), np.uint8(RESIDUAL_ZERO)
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        scale = np.float32((high - low) / 255) or np.float32(1)
        return scale, np.uint8(np.clip(round(-low / float(scale)), 0, 255))

    def restore(self, x: np.ndarray) -> np.ndarray:
        """Quantize `x` [R, K] to uint8 and dequantize it again."""
        scale, zero = self.parameters
        below = float(zero)
        return _with_residual(x / scale, np.rint(x / scale).clip(-below, 255 - below), self.bits) * scale


def _with_residual(steps: np.ndarray, rounded: np.ndarray, bits: int) -> np.ndarray:
    """Return the integers `rounded` of `steps`, for 16 `bits` with what a second uint8 tensor holds of the rest."""
    if bits == 8:
        return rounded
    rest = np.rint((steps - rounded) * RESIDUAL_STEPS)
    return rounded + rest.clip(-RESIDUAL_ZERO, 255 - RESIDUAL_ZERO) / RESIDUAL_STEPS


Activation = PerRow | PerTensor


def matmul_error(x: np.ndarray, restored: np.ndarray, energy: np.ndarray, output: np.ndarray) -> float:
    """Expected squared error of x·W, relative to ‖x·W‖², as a mean over rows.

    `x` and `restored` are [R, K]; `energy` [K] = Σₙ W²; `output` [R] is the expected ‖x·W‖² of each row. The errors of
    single elements are taken as independent, so that no matmul has to be computed:
    E‖(x̂ − x)·W‖² = Σₖ (x̂ₖ − xₖ)² Σₙ Wₖₙ². The error of each row is relative to its own output, so that one
    massive row does not decide for all the others, nor they for it.
    """
    difference = restored - x
    return float(np.mean((difference * difference) @ energy / output))
