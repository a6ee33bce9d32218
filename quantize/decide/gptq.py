"""GPTQ, arXiv 2210.17323: round weights input by input, and adjust later inputs to compensate for earlier errors.

A weight is [K, N] here, for x [.., K] · W [K, N], as in rounding.py.
"""

from __future__ import annotations

import numpy as np

from cuantiza.quantize.decide.rounding import COLUMNS, Grid, IntWeight, choose_scale, round_to_nearest

# GPTQ updates this many rows one by one, and then all later rows at once. The number affects only the speed, and the
# last digits of floats.
_LAZY_ROWS = 128
# This share of the mean of the Hessian's diagonal is added to the diagonal (GPTQ, section 3.3), so that inputs that are
# nearly always 0 do no harm.
DAMPING = 0.01


def gptq(weight: np.ndarray, gram: np.ndarray, grid: Grid) -> IntWeight:
    """Round `weight` [K, N] so that ‖x·(Ŵ − W)‖² is small for the inputs x of which `gram` [K, K] = Σ xᵀx is the sum.

    This is algorithm 1 of GPTQ, arXiv 2210.17323, which is greedy. The weights of one input after another are rounded,
    and their error is distributed over the weights that are not yet rounded, by the Cholesky factor of the inverse
    Hessian. With per-channel scales, the inputs with the largest energy come first ("act-order" in the authors' code);
    with blocks, the inputs keep their order. Where the squares of huge inputs are beyond float32, `gram` says nothing, and
    the weights are rounded to nearest.
    """
    if not np.isfinite(gram).all():
        return round_to_nearest(weight, grid)
    inputs = len(weight)
    diagonal = gram.diagonal().astype(np.float64)
    mean = diagonal.clip(0).mean() or 1.0
    order = np.argsort(-diagonal, kind="stable") if grid.block is None else np.arange(inputs)
    hessian = gram[np.ix_(order, order)].astype(np.float64)
    dead = np.flatnonzero(diagonal[order] <= 0)  # inputs that are always 0, which are rounded to nearest
    hessian[dead, dead] = mean
    factor = _damped_factor(hessian, DAMPING * mean)
    parts = [
        _gptq_columns(weight[order, start : start + COLUMNS].astype(np.float32), factor, grid)
        for start in range(0, weight.shape[1], COLUMNS)
    ]
    q, scale, zero = (np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
    back = np.empty_like(order)
    back[order] = np.arange(inputs)
    return IntWeight(q[back], scale.astype(np.float32), zero.astype(q.dtype), grid)


def _damped_factor(hessian: np.ndarray, damping: float) -> np.ndarray:
    """Return `_inverse_factor` of `hessian` float64 [K, K] with `damping` on its diagonal, or ten times more, and so on.

    The first is enough, except where activations hardly vary: of a difference of large float32 sums little is left but
    their rounding, and that need not be positive definite. `hessian` is overwritten.
    """
    added = 0.0
    while True:
        hessian[np.diag_indices(len(hessian))] += damping - added
        try:
            return _inverse_factor(hessian)
        except np.linalg.LinAlgError:
            added, damping = damping, 10 * damping


def _inverse_factor(hessian: np.ndarray) -> np.ndarray:
    """Return the upper triangular U float32 [K, K] for which UᵀU is the inverse of `hessian` float64 [K, K].

    The Cholesky factor of the matrix with its rows and columns reversed, reversed again, is an upper triangular R with
    hessian = R·Rᵀ. So U = R⁻¹.
    """
    upper = np.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]
    return _inverse_upper(upper).astype(np.float32)


def _inverse_upper(upper: np.ndarray) -> np.ndarray:
    """Invert an upper triangular matrix [K, K] by halves, with matmuls for all but the smallest blocks."""
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
    """Return (q [K, N], scales [G, N], zero points [G, N]) of the weights `rest` float32 [K, N].

    `rest` is overwritten: it holds the weights with the errors of earlier inputs added to them.
    """
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
                # Later rows of this block may still lack the errors of earlier inputs. The block's scale needs them.
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
