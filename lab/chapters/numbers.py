"""The chapters' arithmetic: bits of floating-point numbers, integers with scale and zero point, grids, errors.

These functions only know numbers and arrays; lab/chapters/measure.py applies them to the artifacts.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format: 1 sign bit, `exponent` bits and `mantissa` bits. `dtype` is its NumPy type."""

    name: str
    exponent: int
    mantissa: int
    dtype: np.dtype

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent - 1) - 1

    @property
    def largest(self) -> float:
        return (2 - 2.0**-self.mantissa) * 2.0**self.bias

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    def step(self, value: float) -> float:
        """The distance between neighbouring numbers at |value|: 2^(e − mantissa bits), where 2^e ≤ |value| < 2^(e+1).

        Below the smallest normal number the distance is constant.
        """
        exponent = int(np.floor(np.log2(abs(value)))) if value else 1 - self.bias
        return 2.0 ** (max(exponent, 1 - self.bias) - self.mantissa)


FORMATS = {
    "fp32": FloatFormat("fp32", 8, 23, np.dtype(np.float32)),
    "fp16": FloatFormat("fp16", 5, 10, np.dtype(np.float16)),
    "bf16": FloatFormat("bf16", 8, 7, np.dtype(ml_dtypes.bfloat16)),
}


@dataclass(frozen=True)
class Shown:
    """One number in one format.

    `groups` are its bits as text, the highest first: sign, exponent and mantissa of a float, or all bits of an integer
    in one group. `restored` is the dequantized number, `error` = restored − number. Integers have a `scale` and a
    `zero_point` as well.
    """

    format: str
    groups: tuple[str, ...]
    restored: float
    error: float
    integer: int | None = None
    scale: float | None = None
    zero_point: int | None = None


def float_bits(value: float, form: FloatFormat) -> tuple[str, str, str]:
    """Round `value` to nearest in `form`, and return its (sign, exponent, mantissa) bits as text of 0 and 1."""
    raw = np.array(value, np.float32).astype(form.dtype).view(np.dtype(f"u{form.bits // 8}")).item()
    text = f"{raw:0{form.bits}b}"
    return text[0], text[1 : 1 + form.exponent], text[1 + form.exponent :]


def assemble(groups: tuple[str, str, str], form: FloatFormat) -> float:
    """The finite number that the bits `groups` (sign, exponent, mantissa) encode."""
    sign, exponent, mantissa = (int(group, 2) for group in groups)
    fraction = mantissa / 2**form.mantissa
    magnitude = (1 + fraction) * 2.0 ** (exponent - form.bias) if exponent else fraction * form.smallest_normal
    return -magnitude if sign else magnitude


def as_float(value: float, form: FloatFormat) -> Shown:
    groups = float_bits(value, form)
    restored = assemble(groups, form)
    return Shown(form.name, groups, restored, restored - value)


def as_integer(name: str, value: float, scale: float, zero_point: int, low: int, high: int) -> Shown:
    """Quantize `value` to the grid (q − zero_point) · scale with q = low..high, rounding to nearest and clipping.

    Negative q are written in two's complement.
    """
    bits = (high - min(low, 0)).bit_length()
    q = int(np.clip(np.rint(value / scale) + zero_point, low, high))
    restored = (q - zero_point) * float(scale)
    text = f"{q & (2**bits - 1):0{bits}b}"
    return Shown(name, (text,), restored, restored - value, q, float(scale), zero_point)


def grid(scale: float, zero_point: int, low: int, high: int) -> np.ndarray:
    """All values (q − zero_point) · scale for q = low..high, in order."""
    return (np.arange(low, high + 1) - zero_point) * float(scale)


def relative_rms(restored: np.ndarray, exact: np.ndarray, axis: int | None = None) -> np.ndarray | float:
    """‖restored − exact‖ / ‖exact‖, over all elements or along `axis`."""
    difference = np.square(restored.astype(np.float64) - exact).sum(axis=axis)
    result = np.sqrt(difference / np.square(exact.astype(np.float64)).sum(axis=axis))
    return float(result) if axis is None else result


@dataclass(frozen=True)
class Bins:
    """A histogram: `counts` of the values between neighbouring `edges`, of which there is one more."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


def histogram(values: np.ndarray, low: float, high: float, bins: int) -> Bins:
    """A histogram of all elements of `values`. Those outside [low, high] are not counted."""
    counts, edges = np.histogram(values, bins=bins, range=(low, high))
    return Bins(tuple(edges.tolist()), tuple(counts.tolist()))


def trailing_zeros(values: np.ndarray, bits: int) -> float:
    """Share of float32 `values` whose last `bits` bits are all 0."""
    raw = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return float(np.mean(raw & np.uint32(2**bits - 1) == 0))
