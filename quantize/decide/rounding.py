"""Floating-point weights -> integers, each weight to the nearest one; gptq.py rounds with regard to the inputs.

A weight is [K, N] here, x [.., K] · W [K, N]: K inputs, N output channels, each of which has scales of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Shares of the full range that are tried as a clipped one, and the exponent of the error that chooses between them:
# above 2, since the few large weights matter more than their share of the squared error says (GPTQ's own choice).
CLIPS = np.linspace(1.0, 0.6, 9, dtype=np.float32)
NORM = 2.4
# Channels at a time: each is on its own, and temporaries for a whole vocabulary of them would be large.
COLUMNS = 8192


@dataclass(frozen=True)
class Grid:
    """Integers of `bits`; a scale for every `block` inputs of a channel, or one for all where that is None.

    Symmetric ones are signed with zero point 0, of 8 bits −127..127 and below −2^(b−1)..2^(b−1)−1; others are
    unsigned, 0..2^b−1.
    """

    bits: int
    block: int | None = None
    symmetric: bool = True

    @property
    def limits(self) -> tuple[int, int]:
        if not self.symmetric:
            return 0, 2**self.bits - 1
        half = 2 ** (self.bits - 1)
        return (-127 if self.bits == 8 else -half), half - 1


@dataclass(frozen=True)
class IntWeight:
    """q int8 or uint8 [K, N]; scale float32 [G, N], zero_point like q [G, N] for G = ⌈K / block⌉ groups of inputs."""

    q: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    grid: Grid

    def dequantize(self) -> np.ndarray:
        """(q − zero point) · scale, float32 [K, N]."""
        block = self.grid.block or len(self.q)
        spread = [np.repeat(array, block, axis=0)[: len(self.q)] for array in (self.scale, self.zero_point)]
        return (self.q.astype(np.float32) - spread[1]) * spread[0]


def round_to_nearest(weight: np.ndarray, grid: Grid, clips: np.ndarray = CLIPS) -> IntWeight:
    """Every weight on its own, float32 [K, N], with the scale that a search of `clips` finds best."""
    low, high = grid.limits
    inputs, channels = weight.shape
    block = grid.block or inputs
    q = np.empty(weight.shape, np.int8 if grid.symmetric else np.uint8)
    scales = np.empty((-(-inputs // block), channels), np.float32)
    zeros = np.empty(scales.shape, q.dtype)
    for first in range(0, channels, COLUMNS):
        columns = slice(first, first + COLUMNS)
        for group, start in enumerate(range(0, inputs, block)):
            rows = weight[start : start + block, columns]
            scale, zero = choose_scale(rows, grid, clips)
            q[start : start + block, columns] = (np.rint(rows / scale) + zero).clip(low, high)
            scales[group, columns], zeros[group, columns] = scale, zero
    return IntWeight(q, scales, zeros, grid)


def choose_scale(rows: np.ndarray, grid: Grid, clips: np.ndarray = CLIPS) -> tuple[np.ndarray, np.ndarray]:
    """(scale, zero point) float32 [N] for `rows` [B, N]: the range, clipped where that lowers Σ |error|^2.4.

    A channel of zeros takes the scale 1 and stays exactly zero.
    """
    low, high = grid.limits
    bottom, top = np.minimum(rows.min(axis=0), 0), np.maximum(rows.max(axis=0), 0)
    best = np.full(rows.shape[1], np.inf)
    chosen = np.ones(rows.shape[1], np.float32), np.zeros(rows.shape[1], np.float32)
    for clip in clips:
        full = np.maximum(top / high, bottom / low) if grid.symmetric else (top - bottom) / (high - low)
        scale = np.where(full > 0, full * clip, 1).astype(np.float32)
        zero = np.zeros_like(scale) if grid.symmetric else np.rint(-bottom * clip / scale).clip(low, high)
        error = (np.rint(rows / scale) + zero).clip(low, high)
        error -= zero
        error *= scale
        error -= rows
        np.abs(error, out=error)
        loss = np.power(error, NORM, out=error).sum(axis=0)
        better = loss < best
        best[better] = loss[better]
        for array, value in zip(chosen, (scale, zero), strict=True):
            array[better] = value[better]
    return chosen


def rounding_noise(weight: np.ndarray, grid: Grid) -> np.ndarray:
    """Expected squared error of `weight` [K, N] on `grid`, summed over channels: float32 [K].

    A step²/12 for each weight, with steps that span the range. GPTQ stays below it.
    """
    low, high = grid.limits
    block = grid.block or len(weight)
    starts = np.arange(0, len(weight), block)
    bottom = np.minimum(np.minimum.reduceat(weight, starts, axis=0), 0)
    top = np.maximum(np.maximum.reduceat(weight, starts, axis=0), 0)
    step = np.maximum(top / high, bottom / low) if grid.symmetric else (top - bottom) / (high - low)  # [G, N]
    return np.repeat(np.einsum("gn,gn->g", step, step) / 12, block)[: len(weight)]
