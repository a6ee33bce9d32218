"""How an activation becomes u8, and what that costs the product behind it.

u8 rather than s8: the pair u8 · s8 is the one that x86 kernels are fast for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Zero points that a scale per row can take. 128 is symmetric; what is hardly negative (behind a GELU) gets nearly
# all 8 bits for its positive side from a small one.
ROW_ZERO_POINTS = (128, 64, 32, 16, 8)


@dataclass(frozen=True)
class PerRow:
    """A scale for every row as it comes, the smallest that covers the row; the zero point is fixed.

    128 takes −127..127, as symmetric int8 does, so that one look at max|x| finds the scale.
    """

    zero_point: int = 128

    def restore(self, x: np.ndarray) -> np.ndarray:
        """`x` [R, K] as it comes back from u8."""
        above = 255 - self.zero_point
        below = min(self.zero_point, above)
        scale = np.maximum(x.max(axis=1, keepdims=True) / above, -x.min(axis=1, keepdims=True) / below)
        scale[scale <= 0] = 1
        return np.rint(x / scale) * scale


@dataclass(frozen=True)
class PerTensor:
    """One scale and zero point, for values from `low` to `high`; what lies beyond is clipped."""

    low: float
    high: float

    @property
    def parameters(self) -> tuple[np.float32, np.uint8]:
        """(scale, zero point) that map [low, high], widened to hold 0 exactly, to 0..255."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        scale = np.float32((high - low) / 255) or np.float32(1)
        return scale, np.uint8(np.clip(round(-low / float(scale)), 0, 255))

    def restore(self, x: np.ndarray) -> np.ndarray:
        """`x` [R, K] as it comes back from u8."""
        scale, zero = self.parameters
        zero = float(zero)
        return np.rint(x / scale).clip(-zero, 255 - zero) * scale


Activation = PerRow | PerTensor


def product_error(x: np.ndarray, restored: np.ndarray, energy: np.ndarray, output: np.ndarray) -> float:
    """Expected squared error of x·W relative to x·W itself, mean over rows.

    x, restored [R, K]; energy [K] = Σₙ W², output [R] the expected ‖x·W‖². Errors of single elements are taken as
    independent, so no product has to be computed: E‖(x̂ − x)·W‖² = Σₖ (x̂ₖ − xₖ)² Σₙ Wₖₙ². Relative to each row, so
    that one massive row does not decide for all the others, nor they for it.
    """
    difference = restored - x
    return float(np.mean((difference * difference) @ energy / output))
