"""Integer arithmetic of quantization: q = round(x / scale) + zero point, x ≈ (q − zero point) · scale.

Source: the operators QuantizeLinear and DequantizeLinear of the ONNX specification.
"""

from __future__ import annotations

import numpy as np

_ROWS = 4096  # rows of a table in floating point at a time: bounds memory, changes no result


def quantize_weight(weight: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 of a float32 matrix with one scale per index of `axis`: (int8 [R, C], float32 [R] or [C]).

    The largest magnitude of each channel becomes ±127, so every element is within half a scale of its
    original. A channel of zeros takes the scale 1 and stays exactly zero.
    """
    largest = np.maximum(weight.max(axis=1 - axis), -weight.min(axis=1 - axis))
    scale = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
    quantized = np.empty(weight.shape, np.int8)
    divisor = np.expand_dims(scale, 1 - axis)
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        quantized[rows] = np.rint(weight[rows] / (divisor[rows] if axis == 0 else divisor)).clip(-127, 127)
    return quantized, scale
