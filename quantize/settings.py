"""The settings that recipes of several kinds have, and their values. Everything in quantize/ may import this file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# How weights are rounded to integers: quantize/decide/rounding.py and quantize/decide/gptq.py.
Rounding = Literal["gptq", "nearest"]
# How the range of an activation is chosen from its histogram: quantize/decide/ranges.py.
Ranges = Literal["min-max", "percentile", "entropy", "mse"]
# Standard operators for any runtime, or the fewest and fastest ones for ONNX Runtime on a CPU (quantize/rewrite/fuse_attention.py).
Target = Literal["portable", "ort"]
# SmoothQuant's exponents, each of which calibration tries for each tensor. A recipe without exponents does not smooth.
ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Calibration:
    """Full windows of real text: `windows` of at most `tokens` tokens each; fewer than `minimum` are refused.

    16 and 32 windows measure alike for 8 bits; at 4 bits, 32 lower KL by 2 % (es-mini and es-sink).
    """

    windows: int = 16
    tokens: int = 512
    minimum: int = 8

    def __post_init__(self) -> None:
        if min(self.windows, self.tokens, self.minimum) < 1:
            raise ValueError(f"calibration has {self}; give whole numbers from 1")


# For weights and activations of 8 bits.
CALIBRATION = Calibration()


def check_exponents(smoothing: tuple[float, ...]) -> None:
    """Raises ValueError where an exponent of SmoothQuant is not from 0 to 1."""
    if not all(0 <= alpha <= 1 for alpha in smoothing):
        raise ValueError(f"smoothing has {', '.join(map(str, smoothing))}; give exponents from 0 to 1")


def for_target(line: str, target: Target) -> str:
    """A recipe's line of description, which says so where the graph runs in ONNX Runtime alone."""
    return f"{line}; for ONNX Runtime alone" if target == "ort" else line
