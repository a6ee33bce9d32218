"""Floating-point weights -> integers: to nearest, or by GPTQ, which lets later weights make good for earlier ones.

A weight is [K, N] here, x [.., K] · W [K, N]: K inputs, N output channels, each of which has scales of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Shares of the full range that are tried as a clipped one, and the exponent of the error that chooses between them:
# above 2, since the few large weights matter more than their share of the squared error says (GPTQ's own choice).
CLIPS = np.linspace(1.0, 0.6, 9, dtype=np.float32)
NORM = 2.4
# Rows that GPTQ updates one by one before it updates all the rest at once; changes no more than a float's last digit.
_LAZY_ROWS = 128
# Channels at a time: each is on its own, and temporaries for a whole vocabulary of them would be large.
_COLUMNS = 8192
# Share of the mean curvature that is added to every one (GPTQ, section 3.3): inputs that hardly occur stay harmless.
DAMPING = 0.01


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
    for first in range(0, channels, _COLUMNS):
        columns = slice(first, first + _COLUMNS)
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


def gptq(weight: np.ndarray, gram: np.ndarray, grid: Grid) -> IntWeight:
    """Least ‖x·(Ŵ − W)‖² over the inputs that `gram` [K, K] = Σ xᵀx was summed from, greedily, input by input.

    GPTQ, arXiv 2210.17323, algorithm 1: each input's weights are rounded, and the error is spread over those
    that are not yet rounded along the Cholesky factor of the inverse curvature. With one scale a channel, the
    inputs that carry the most come first ("act-order" in the authors' code); blocks keep their own order.
    """
    inputs = len(weight)
    diagonal = gram.diagonal().astype(np.float64)
    mean = diagonal.mean() or 1.0
    order = np.argsort(-diagonal, kind="stable") if grid.block is None else np.arange(inputs)
    curvature = gram[np.ix_(order, order)].astype(np.float64)
    dead = np.flatnonzero(diagonal[order] <= 0)  # an input that never occurs: rounding it to nearest costs nothing
    curvature[dead, dead] = mean
    curvature[np.diag_indices(inputs)] += DAMPING * mean
    factor = _inverse_factor(curvature)
    parts = [
        _gptq_columns(weight[order, start : start + _COLUMNS].astype(np.float32), factor, grid)
        for start in range(0, weight.shape[1], _COLUMNS)
    ]
    q, scale, zero = (np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
    back = np.empty_like(order)
    back[order] = np.arange(inputs)
    return IntWeight(q[back], scale.astype(np.float32), zero.astype(q.dtype), grid)


def _inverse_factor(curvature: np.ndarray) -> np.ndarray:
    """Upper triangular U float32 [K, K] with UᵀU the inverse of `curvature` float64 [K, K].

    Reversed, a matrix has its Cholesky factor the other way round: curvature = R·Rᵀ with R upper, so U = R⁻¹.
    """
    upper = np.linalg.cholesky(curvature[::-1, ::-1])[::-1, ::-1]
    return _inverse_upper(upper).astype(np.float32)


def _inverse_upper(upper: np.ndarray) -> np.ndarray:
    """Inverse of an upper triangular matrix [K, K] by halves, of which all but the smallest are products."""
    size = len(upper)
    if size <= 64:
        return np.linalg.inv(upper)
    half = size // 2
    first, last = _inverse_upper(upper[:half, :half]), _inverse_upper(upper[half:, half:])
    inverse = np.zeros_like(upper)
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[:half, half:] = -first @ (upper[:half, half:] @ last)
    return inverse


def _gptq_columns(rest: np.ndarray, factor: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(q [K, N], scales [G, N], zero points [G, N]) of weights `rest` float32 [K, N], which is used up."""
    low, high = grid.limits
    inputs, channels = rest.shape
    block = grid.block or inputs
    q = np.empty(rest.shape, np.int8 if grid.symmetric else np.uint8)
    scales, zeros = [], []
    for start in range(0, inputs, _LAZY_ROWS):
        end = min(start + _LAZY_ROWS, inputs)
        errors = np.empty((end - start, channels), np.float32)
        for row in range(start, end):
            if row % block == 0:
                # A block may reach beyond the rows that are up to date: settle what it is owed first.
                pending = rest[end : row + block] - factor[start:row, end : row + block].T @ errors[: row - start]
                group = np.concatenate([rest[row : min(end, row + block)], pending])
                scale, zero = choose_scale(group, grid)
                scales.append(scale)
                zeros.append(zero)
            q[row] = rounded = (np.rint(rest[row] / scale) + zero).clip(low, high)
            errors[row - start] = (rest[row] - (rounded - zero) * scale) / factor[row, row]
            rest[row + 1 : end] -= factor[row, row + 1 : end, None] * errors[row - start]
        rest[end:] -= factor[start:end, end:].T @ errors
    return q, np.stack(scales), np.stack(zeros)
