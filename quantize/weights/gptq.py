"""GPTQ, arXiv 2210.17323: round weights input by input, and adjust later inputs to compensate for earlier errors.

A weight is [K, N] here, for x [.., K] · W [K, N], as in rounding.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from cuantiza.quantize.weights.rounding import (
    PAIR_LIMIT,
    Grid,
    IntWeight,
    channel_parts,
    choose_scale,
    in_steps,
    partners,
    round_to_nearest,
    scale_step,
)

# Applies a function to each item, in order: map, or the map of a pool of threads.
Each = Callable[[Callable, Iterable], Iterable]

# GPTQ updates this many rows one by one, and then all later rows at once. The number affects only the speed, and the
# last digits of floats.
_LAZY_ROWS = 128
# Coordinate descent does the same with fewer rows: it then takes a quarter of the time for 2,048 inputs of one scale.
_DESCENT_ROWS = 32
# This share of the mean of the Hessian's diagonal is added to the diagonal (GPTQ, section 3.3), so that inputs that are
# nearly always 0 do no harm.
DAMPING = 0.01
# How often `descend` visits every weight. Further passes hardly lower the error (es-mini: 0.3 % from 3 to 6).
_PASSES = 3
# `descend` rounds this many channels at a time, so that several threads can share the channels of one layer.
_PART = 384
# `gptq` rounds this many channels at a time where each has one scale, for the same reason, and so that the rows that it
# works on stay in a processor's cache.
_NARROW = 2048
# The same where each block has a scale. Temporary arrays for a whole vocabulary would be large.
_WIDE = 8192


def gptq(
    weight: np.ndarray, gram: np.ndarray, grid: Grid, inputs: np.ndarray | None = None, each: Each = map
) -> IntWeight:
    """Round `weight` [K, N] so that ‖x·(Ŵ − W)‖² is small for the inputs x of which `gram` [K, K] = Σ xᵀx is the sum.

    This is algorithm 1 of GPTQ, arXiv 2210.17323, which is greedy. The weights of one input after another are rounded,
    and their error is distributed over the weights that are not yet rounded, by the Cholesky factor of the inverse
    Hessian. With per-channel scales, the inputs with the largest energy come first ("act-order" in the authors' code);
    with blocks, the inputs keep their order. Where the squares of huge inputs are beyond float32, `gram` says nothing, and
    the weights are rounded to nearest. `inputs` is that of `round_to_nearest`. `each` may use several threads, as in
    `descend`.
    """
    if not np.isfinite(gram).all():
        return round_to_nearest(weight, grid, inputs=inputs)
    damping = DAMPING * _mean_energy(gram)
    if grid.block is None:
        order = np.argsort(-gram.diagonal().astype(np.float64), kind="stable")
        factor = _damped_factor(_hessian(_ordered(gram, order)), damping)
        places = np.arange(len(weight)) if inputs is None else inputs
        partner = _partners(order, places) if grid.pairs else None

        def fixed(part: slice) -> IntWeight:
            nearest = round_to_nearest(weight[:, part], grid, inputs=inputs)
            rest = weight[order, part].astype(np.float32)
            return replace(nearest, q=_gptq_fixed(rest, factor, nearest, order, partner))

        return _beside(each(fixed, channel_parts(weight.shape[1], _NARROW)), grid)
    factor = _damped_factor(_hessian(gram), damping)
    step = scale_step(weight, grid)

    def in_order(part: slice) -> IntWeight:
        steps = None if step is None else step[part]
        q, scale, zero = _gptq_columns(weight[:, part].astype(np.float32), factor, grid, steps)
        return IntWeight(q, scale.astype(np.float32), zero.astype(q.dtype), grid, steps)

    return _beside(each(in_order, channel_parts(weight.shape[1], _WIDE)), grid)


def _beside(parts: Iterable[IntWeight], grid: Grid) -> IntWeight:
    """Put weights [K, n] of the same inputs beside each other: [K, N]."""
    parts = list(parts)
    q, scale, zero = (
        np.concatenate([getattr(one, name) for one in parts], axis=1) for name in ("q", "scale", "zero_point")
    )
    step = None if grid.scale_bits == 32 else np.concatenate([one.step for one in parts])
    return IntWeight(q, scale, zero, grid, step)


def _ordered(gram: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return `gram` [K, K] with its rows and columns in `order` [K]."""
    return gram.take(order, axis=0).take(order, axis=1)


def _partners(order: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """`partners` of `inputs` [K] for weights that stand in `order` [K]."""
    partner = partners(inputs)[order]
    return np.where(partner < 0, -1, np.argsort(order)[partner])


def regression(gram: np.ndarray, target: np.ndarray, damping: float) -> np.ndarray:
    """Return the matrix [K, N] by which x gives m best: ridge regression, for `gram` [K, K] = Σ xᵀx and `target` Σ xᵀm.

    `damping` is the share of the mean of the Gram matrix's diagonal that is added to the diagonal.
    """
    factor = _damped_factor(_hessian(gram), damping * _mean_energy(gram))
    return factor.T @ (factor @ target)


def descend(weight: np.ndarray, gram: np.ndarray, grid: Grid, each: Each = map) -> IntWeight:
    """Round `weight` [K, N] as `gptq` does, and better: from two starts, coordinate by coordinate downhill.

    Each channel starts from GPTQ in the inputs' order, where each block takes its scale when its turn comes, and from
    GPTQ in the order of the inputs' energy, with scales chosen before. `_downhill` lowers the error of both, and the better
    one is kept. So no channel is worse than by `gptq`, up to the damping. `each` may use several threads: it is
    given parts of the channels, whose size does not depend on the number of threads.
    """
    if not np.isfinite(gram).all():
        return round_to_nearest(weight, grid)
    damping = DAMPING * _mean_energy(gram)
    orders = np.arange(len(weight)), np.argsort(-gram.diagonal(), kind="stable")
    factors = [_damped_factor(_hessian(_ordered(gram, order)), damping) for order in orders]
    hessian = _hessian(gram).astype(np.float32)
    hessian[np.diag_indices(len(hessian))] += damping

    def part(columns: slice) -> IntWeight:
        mine = np.ascontiguousarray(weight[:, columns], np.float32)
        step = scale_step(mine, grid)
        q, scale, zero = _gptq_columns(mine.copy(), factors[0], grid, step)
        in_order = IntWeight(q, scale, zero.astype(q.dtype), grid, step)
        nearest = round_to_nearest(mine, grid)
        by_energy = replace(nearest, q=_gptq_fixed(mine[orders[1]], factors[1], nearest, orders[1]))
        ends = [_downhill(mine, hessian, start) for start in (in_order, by_energy)]
        better = _error(mine, hessian, ends[1]) < _error(mine, hessian, ends[0])
        q, scale, zero = (
            np.where(better, getattr(ends[1], name), getattr(ends[0], name)) for name in ("q", "scale", "zero_point")
        )
        return IntWeight(q, scale, zero, grid, step)

    return _beside(each(part, channel_parts(weight.shape[1], _PART)), grid)


def _mean_energy(gram: np.ndarray) -> float:
    return gram.diagonal().astype(np.float64).clip(0).mean() or 1.0


def _hessian(gram: np.ndarray) -> np.ndarray:
    """Return `gram` in float64, with the mean of its diagonal for inputs that are always 0: they round to nearest."""
    hessian = gram.astype(np.float64)
    dead = np.flatnonzero(gram.diagonal() <= 0)
    hessian[dead, dead] = _mean_energy(gram)
    return hessian


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


def _gptq_columns(
    rest: np.ndarray, factor: np.ndarray, grid: Grid, step: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (q [K, N], scales [G, N], zero points [G, N]) of the weights `rest` float32 [K, N].

    `rest` is overwritten: it holds the weights with the errors of earlier inputs added to them. The scales are whole
    multiples of `step` [N], if it is not None.
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
                scale, zero = choose_scale(group, grid, step=step)
                scales.append(scale)
                zeros.append(zero)
            q[row] = rounded = (np.rint(rest[row] / scale) + zero).clip(low, high)
            errors[row - start] = (rest[row] - (rounded - zero) * scale) / factor[row, row]
            rest[row + 1 : end] -= factor[row, row + 1 : end, None] * errors[row - start]
        rest[end:] -= factor[start:end, end:].T @ errors
    return q, np.stack(scales), np.stack(zeros)


def _gptq_fixed(
    rest: np.ndarray, factor: np.ndarray, fixed: IntWeight, order: np.ndarray, partner: np.ndarray | None = None
) -> np.ndarray:
    """Return q [K, N] of the weights `rest` [K, N], which stand in `order` [K], with the scales of `fixed`.

    q is in the inputs' own order. `rest` is overwritten. `partner` [K], of a grid with `pairs`, says where the other weight of
    a pair stands. Where both together are above PAIR_LIMIT, the first one that is rounded gives up half of that; GPTQ
    makes up for it, as for any error.
    """
    low, high = fixed.grid.limits
    inputs = len(rest)
    block = fixed.grid.block or inputs
    q = np.empty(rest.shape, fixed.q.dtype)
    change = np.empty((_LAZY_ROWS, rest.shape[1]), np.float32)  # one array for all rows: new memory costs time
    for start in range(0, inputs, _LAZY_ROWS):
        end = min(start + _LAZY_ROWS, inputs)
        errors = np.empty((end - start, rest.shape[1]), np.float32)
        for row in range(start, end):
            scale = fixed.scale[order[row] // block]
            zero = fixed.zero_point[order[row] // block].astype(np.float32)
            steps, lowest, highest = rest[row] / scale, low, high
            if partner is not None and partner[row] > row:
                both = steps + rest[partner[row]] / scale
                steps = steps - (both - both.clip(-PAIR_LIMIT, PAIR_LIMIT)) / 2
            elif partner is not None and partner[row] >= 0:
                taken = q[order[partner[row]]].astype(np.float32)
                lowest, highest = np.maximum(low, -PAIR_LIMIT - taken), np.minimum(high, PAIR_LIMIT - taken)
            q[order[row]] = rounded = (np.rint(steps) + zero).clip(lowest, highest)
            errors[row - start] = (rest[row] - (rounded - zero) * scale) / factor[row, row]
            later = factor[row, row + 1 : end, None]
            rest[row + 1 : end] -= np.multiply(later, errors[row - start], out=change[: len(later)])
        rest[end:] -= factor[start:end, end:].T @ errors
    return q


def _downhill(weight: np.ndarray, hessian: np.ndarray, rounded: IntWeight) -> IntWeight:
    """Improve `rounded` by coordinate descent on tr(Eᵀ·H·E), E = Ŵ − W, for the Hessian H float32 [K, K].

    Block after block, the scale of each channel and then each integer takes the value with the least error while all
    others stay (QuantEase, arXiv 2309.01885, does so for the integers). The error is a parabola along each coordinate, so
    the best is its minimum, rounded to the grid, and no step raises the error. With G = H·E, the minimum along the
    direction d of Ŵ is at t = −dᵀG / dᵀHd.
    """
    grid, inputs = rounded.grid, len(weight)
    low, high = grid.limits
    block = grid.block or inputs
    q, scale = rounded.q.astype(np.float32), rounded.scale.copy()
    zero = rounded.zero_point.astype(np.float32)
    error = rounded.dequantize() - weight
    for _ in range(_PASSES):
        for group, start in enumerate(range(0, inputs, block)):
            rows = slice(start, min(start + block, inputs))
            curvature = np.ascontiguousarray(hessian[rows, rows])
            integers, errors, slope = q[rows], error[rows], hessian[rows] @ error
            direction = integers - zero[group]
            bend = curvature @ direction
            length = np.einsum("kn,kn->n", direction, bend)
            move = np.einsum("kn,kn->n", direction, slope) / np.where(length > 0, length, 1)
            new = in_steps(scale[group] - move, rounded.step)
            new = np.where((length > 0) & (new > 0), new, scale[group])
            errors += direction * (new - scale[group])
            slope += bend * (new - scale[group])
            scale[group] = new
            for first in range(0, len(integers), _DESCENT_ROWS):
                end = min(first + _DESCENT_ROWS, len(integers))
                changes = np.empty((end - first, integers.shape[1]), np.float32)
                for row in range(first, end):
                    best = np.rint(integers[row] - slope[row] / (curvature[row, row] * new)).clip(low, high)
                    changes[row - first] = change = (best - integers[row]) * new
                    integers[row] = best
                    errors[row] += change
                    slope[row + 1 : end] += curvature[row + 1 : end, row, None] * change
                slope[end:] += curvature[end:, first:end] @ changes
    return IntWeight(q.astype(rounded.q.dtype), scale, rounded.zero_point, grid, rounded.step)


def _error(weight: np.ndarray, hessian: np.ndarray, rounded: IntWeight) -> np.ndarray:
    """Return the error of each channel, [N]: the diagonal of Eᵀ·H·E."""
    error = rounded.dequantize() - weight
    return np.einsum("kn,kn->n", error, hessian @ error)
