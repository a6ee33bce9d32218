"""Round floating-point weights to integers, each to the nearest one. gptq.py takes the layer's inputs into account.

A weight is [K, N] here, for x [.., K] · W [K, N]: K inputs and N output channels. Each channel has scales of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

# Shares of the full range that are tried as a clipped range. The one with the least Σ |error|^NORM is chosen. NORM is
# above 2, because the few large weights matter more than their part of the squared error (GPTQ's own choice).
CLIPS = np.linspace(1.0, 0.6, 9, dtype=np.float32)
# The same for a grid with `pairs`, whose integers have to be smaller where large weights are neighbours.
PAIR_CLIPS = np.concatenate([np.linspace(2.0, 1.1, 10, dtype=np.float32), CLIPS])
NORM = 2.4
# How many steps the largest scale of a channel has, where a byte stores each scale.
STEPS = 255
# The largest sum of two neighbouring integers of a channel, so that u8·s8 + u8·s8 fits into 16 bits: 255 · 128 = 32,640.
PAIR_LIMIT = 128
# Channels are independent. So many weights are rounded at a time that temporary arrays stay in a processor's cache.
_AT_ONCE = 2**17


@dataclass(frozen=True)
class Grid:
    """The integers of a weight: their number of bits, and whether they are symmetric around zero.

    There is a scale for every `block` inputs of a channel, or one per channel if `block` is None. Symmetric integers
    are signed and have zero point 0: −127..127 for 8 bits, −2^(b−1)..2^(b−1)−1 for b < 8. Others are unsigned: 0..2^b−1.
    With `scale_bits` 8, the scales of a channel are 1 to 255 times a step of the channel, so that a byte stores each
    (double quantization, QLoRA, arXiv 2305.14314); with 32 they are float32.

    With `pairs`, the integers of the inputs 2i and 2i + 1 of a channel add up to PAIR_LIMIT at most, above and below 0. The
    instruction vpmaddubsw of x86-64 adds the products with two such inputs in 16 bits, and clips what does not fit
    (cuantiza/core/run/exact_int8.py). It never has to clip these, whatever the activations are.
    """

    bits: int
    block: int | None = None
    symmetric: bool = True
    scale_bits: int = 32
    pairs: bool = False

    @property
    def limits(self) -> tuple[int, int]:
        if not self.symmetric:
            return 0, 2**self.bits - 1
        half = 2 ** (self.bits - 1)
        return (-127 if self.bits == 8 else -half), half - 1


@dataclass(frozen=True)
class IntWeight:
    """An integer weight: q int8 or uint8 [K, N], scale float32 [G, N], and zero_point [G, N] of the type of q.

    G = ⌈K / block⌉ is the number of blocks of inputs. `step` float32 [N] divides the scales, where a byte stores each.
    """

    q: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    grid: Grid
    step: np.ndarray | None = None

    def dequantize(self) -> np.ndarray:
        """Return (q − zero point) · scale, float32 [K, N]."""
        block = self.grid.block or len(self.q)
        spread = [np.repeat(array, block, axis=0)[: len(self.q)] for array in (self.scale, self.zero_point)]
        return (self.q.astype(np.float32) - spread[1]) * spread[0]

    def with_channels(self, channels: slice, other: IntWeight) -> IntWeight:
        """Return this weight with `other` [K, n] in place of its `channels`."""
        q, scale, zero_point = (array.copy() for array in (self.q, self.scale, self.zero_point))
        q[:, channels], scale[:, channels], zero_point[:, channels] = other.q, other.scale, other.zero_point
        step = None if self.step is None else self.step.copy()
        if step is not None:
            step[channels] = other.step
        return IntWeight(q, scale, zero_point, self.grid, step)


def round_to_nearest(
    weight: np.ndarray, grid: Grid, clips: np.ndarray | None = None, inputs: np.ndarray | None = None
) -> IntWeight:
    """Round each weight of float32 [K, N] to the nearest integer, with the best of the scales that `clips` allow.

    `inputs` int64 [K] says which inputs of the matmul the weights belong to, where they are not all of them; only a grid
    with `pairs` needs it.
    """
    count, channels = weight.shape
    block = grid.block or count
    q = np.empty(weight.shape, np.int8 if grid.symmetric else np.uint8)
    scales = np.empty((-(-count // block), channels), np.float32)
    zeros = np.empty(scales.shape, q.dtype)
    step = scale_step(weight, grid)
    inputs = np.arange(count) if inputs is None else inputs
    for columns in channel_parts(channels, _AT_ONCE // min(block, count)):
        steps = None if step is None else step[columns]
        for group, start in enumerate(range(0, count, block)):
            # A copy lies together in the cache. "K" keeps the order of the axes, and so the order in which sums add up.
            rows, places = weight[start : start + block, columns].copy("K"), inputs[start : start + block]
            scale, zero = choose_scale(rows, grid, clips, steps, places)
            q[start : start + block, columns] = _to_integers(rows, scale, zero, grid, places)
            scales[group, columns], zeros[group, columns] = scale, zero
    return IntWeight(q, scales, zeros, grid, step)


def channel_parts(channels: int, size: int) -> list[slice]:
    """Return slices of about `size` of the `channels`.

    No slice has a single channel unless there is only one, since NumPy would add it up in another order.
    """
    starts = range(0, max(channels - 1, 1), max(size, 2))
    return [slice(start, end) for start, end in pairwise([*starts, channels])]


def _to_integers(
    rows: np.ndarray, scale: np.ndarray, zero: np.ndarray, grid: Grid, inputs: np.ndarray | None
) -> np.ndarray:
    """Return rows [B, N] / scale [N] + zero [N], rounded to integers of `grid`, as floats."""
    low, high = grid.limits
    q: np.ndarray = (np.rint(rows / scale) + zero).clip(low, high)
    if grid.pairs:
        _limit_pairs(q, np.arange(len(q)) if inputs is None else inputs)
    return q


def partners(inputs: np.ndarray) -> np.ndarray:
    """For each of `inputs` int64 [K], where the other one of its pair (2i, 2i + 1) stands in `inputs`; -1 if nowhere."""
    place = np.full(inputs.max() + 2, -1)
    place[inputs] = np.arange(len(inputs))
    return place[inputs ^ 1]


def _limit_pairs(q: np.ndarray, inputs: np.ndarray) -> None:
    """Take from both integers of a pair half of what is above PAIR_LIMIT, in `q` [K, N] itself."""
    if 2 * max(q.max(), -q.min()) <= PAIR_LIMIT:
        return
    first: slice | np.ndarray
    second: slice | np.ndarray
    if inputs[0] % 2 == 0 and (np.diff(inputs) == 1).all():  # views are much faster than lists of rows
        even = len(inputs) // 2 * 2
        first, second = slice(0, even, 2), slice(1, even, 2)
    else:
        partner = partners(inputs)
        first = np.flatnonzero((inputs % 2 == 0) & (partner >= 0))
        second = partner[first]
    both = q[first] + q[second]
    excess = both - both.clip(-PAIR_LIMIT, PAIR_LIMIT)
    if excess.any():
        half = np.floor(excess / 2)  # // takes ten times as long
        q[first] -= half
        q[second] -= excess - half


def scale_step(weight: np.ndarray, grid: Grid) -> np.ndarray | None:
    """Return the step float32 [N] of the scales of `weight` [K, N]: 255 steps cover its widest block. None: no step."""
    if grid.scale_bits == 32:
        return None
    largest = _full_scales(weight, grid).max(axis=0)
    return np.where(largest > 0, largest / STEPS, 1).astype(np.float32)


def in_steps(scale: np.ndarray, step: np.ndarray | None) -> np.ndarray:
    """Round `scale` [.., N] to 1 to 255 steps [N], or return it as it is where there is no step."""
    return scale if step is None else np.rint(scale / step).clip(1, STEPS) * step


def _full_scales(weight: np.ndarray, grid: Grid) -> np.ndarray:
    """Return the scales [G, N] with which the integers span the whole range of each block of `weight` [K, N]."""
    low, high = grid.limits
    if grid.block is None:
        bottom, top = weight.min(axis=0, keepdims=True), weight.max(axis=0, keepdims=True)
    else:
        starts = np.arange(0, len(weight), grid.block)
        bottom, top = (at.reduceat(weight, starts, axis=0) for at in (np.minimum, np.maximum))
    bottom, top = np.minimum(bottom, 0), np.maximum(top, 0)
    return np.maximum(top / high, bottom / low) if grid.symmetric else (top - bottom) / (high - low)


def choose_scale(
    rows: np.ndarray,
    grid: Grid,
    clips: np.ndarray | None = None,
    step: np.ndarray | None = None,
    inputs: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (scale, zero point), float32 [N] each, for `rows` [B, N], the weights of one block of inputs.

    They cover the range of each channel, or a share of it where clipping lowers Σ |error|^2.4, in whole multiples of
    `step` [N] if there is one. A channel of zeros gets scale 1 and stays exactly zero. `inputs` is that of
    `round_to_nearest`.
    """
    low, high = grid.limits
    clips = clips if clips is not None else PAIR_CLIPS if grid.pairs else CLIPS
    bottom, top = np.minimum(rows.min(axis=0), 0), np.maximum(rows.max(axis=0), 0)
    best = np.full(rows.shape[1], np.inf)
    chosen = np.ones(rows.shape[1], np.float32), np.zeros(rows.shape[1], np.float32)
    for clip in clips:
        full = np.maximum(top / high, bottom / low) if grid.symmetric else (top - bottom) / (high - low)
        scale = in_steps(np.where(full > 0, full * clip, 1).astype(np.float32), step)
        zero = np.zeros_like(scale) if grid.symmetric else np.rint(-bottom * clip / scale).clip(low, high)
        error = _to_integers(rows, scale, zero, grid, inputs)
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
    """Estimate the squared error of `weight` [K, N] on `grid`, summed over channels: float32 [K].

    Each weight contributes step²/12, with steps that span the whole range. The error of GPTQ is below this estimate.
    """
    step = _full_scales(weight, grid)
    return np.repeat(np.einsum("gn,gn->g", step, step) / 12, grid.block or len(weight))[: len(weight)]
