"""GPTQ, arXiv 2210.17323: weights are rounded input by input, and later ones make good for the errors of earlier ones.

A weight is [K, N] here, x [.., K] · W [K, N], as in rounding.py.
"""

from __future__ import annotations

import numpy as np

from cuantiza.quantize.decide.rounding import COLUMNS, Grid, IntWeight, choose_scale

# GPTQ updates so many rows one by one before it updates all later rows at once. The number changes a float's last digit
# at most.
_LAZY_ROWS = 128
# This share of the mean curvature is added to that of every input (GPTQ, section 3.3), which keeps inputs that hardly
# occur harmless.
DAMPING = 0.01


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
        _gptq_columns(weight[order, start : start + COLUMNS].astype(np.float32), factor, grid)
        for start in range(0, weight.shape[1], COLUMNS)
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
    """Inverse of an upper triangular matrix [K, K] by halves, with matmuls for all but the smallest."""
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
