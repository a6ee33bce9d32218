"""The settings that several kinds of recipes share, and their values. Everything in quantize/ may import this file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cuantiza.core.errors import UserError

# How weights are rounded to integers: quantize/weights/rounding.py and quantize/weights/gptq.py.
Rounding = Literal["gptq", "nearest"]
# Where activations stay in float, also "descent", which goes on after GPTQ, and "follow", by which each layer also makes up
# for what earlier ones lost: quantize/weights/follow.py.
WeightRounding = Literal["follow", "descent", "gptq", "nearest"]
# How the range of an activation is chosen from its histogram: quantize/decide/ranges.py.
Ranges = Literal["min-max", "percentile", "entropy", "mse"]
# Which operators the graph uses: standard ones for any runtime, or the fewest and fastest ones for ONNX Runtime on a
# CPU (quantize/rewrite/fuse_attention.py).
Target = Literal["portable", "ort"]
# Standard ONNX has blocked quantization and 4-bit integers from this opset on.
BLOCKS_OPSET = 21
# The exponents of SmoothQuant that calibration tries for each tensor. A recipe without exponents does not smooth.
ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

# The relative squared error from which on activations get 16 bits: noise of 1 % of a matmul's output.
MAX_ERROR = 1e-4


@dataclass(frozen=True)
class Calibration:
    """How much text calibrates: `windows` full windows of at most `tokens` tokens each; at least `minimum` are needed.

    At 8 bits, 16 and 32 windows give the same quality; at 4 bits, 32 lower KL by 2 % (es-mini and es-sink).
    """

    windows: int = 16
    tokens: int = 512
    minimum: int = 8

    def __post_init__(self) -> None:
        if min(self.windows, self.tokens, self.minimum) < 1:
            raise ValueError(f"calibration has {self}; give whole numbers from 1")
        if self.minimum > self.windows:
            raise ValueError(
                f"calibration has windows {self.windows} and a minimum of {self.minimum}; give a minimum of at most as many"
            )


# The calibration of recipes with 8-bit weights and activations.
CALIBRATION = Calibration()


def check_exponents(smoothing: tuple[float, ...]) -> None:
    """Raise ValueError if an exponent of SmoothQuant is not from 0 to 1."""
    if not all(0 <= alpha <= 1 for alpha in smoothing):
        raise ValueError(f"smoothing has {', '.join(map(str, smoothing))}; give exponents from 0 to 1")


def check_max_error(max_error: float | None) -> None:
    """Raise ValueError if `max_error` is below 0."""
    if max_error is not None and not max_error >= 0:
        raise ValueError(f"max_error is {max_error}; give a number from 0, or null for 8 bits everywhere")


def for_target(line: str, target: Target) -> str:
    """Add to a recipe's description `line` that its graph runs in ONNX Runtime alone, if `target` is "ort"."""
    return f"{line}; for ONNX Runtime alone" if target == "ort" else line


def check_opset(opset: int, least: int) -> None:
    """Raise UserError if the graph's `opset` is below `least`, which weights in blocks or in 4 bits need."""
    if opset < least:
        raise UserError(f"opset {opset} has neither blocked quantization nor 4-bit integers; export with OPSET={least}")
