"""What calibration decides about the input of one or more linear layers: smoothing, float channels and bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from cuantiza.quantize.decide import smooth
from cuantiza.quantize.decide.activation import ROW_ZERO_POINTS, PerRow, PerTensor, fitting_row, matmul_error
from cuantiza.quantize.decide.decision import Plan
from cuantiza.quantize.decide.observations import Moments
from cuantiza.quantize.decide.ranges import RANGES
from cuantiza.quantize.decide.values import ValueMoments
from cuantiza.quantize.rewrite.find import Projection, is_head
from cuantiza.quantize.weights.rounding import Grid, rounding_noise

# Shares of the full range for which the searches below estimate the error. The final range comes from the histogram.
_SHARES = (1.0, 0.8, 0.6, 0.4, 0.2)
# Keep channels in float only if that at least halves the matmul's error (`_PAYS`). Each further channel must lower it
# by another 10 % (`_MORE`).
_PAYS, _MORE = 0.5, 0.9
# The share of the limit that holds for the head and for values. Later layers average what other linear layers lose, but
# nothing comes after the logits, and the error in the value of an attention sink is the same for every token.
_STRICT = 0.1


@dataclass(frozen=True)
class Tensor:
    """The input x [.., K] of one or more linear layers, after smoothing and before its range is chosen.

    `moments` are those of x after smoothing, and `of_values` those for the linear layers that compute values, by name;
    `weight_energy` [K] = Σₙ W² is that of the weights before smoothing, and `value_energy` that of the channels that are
    values. `keep` bool [K] marks the channels that stay in the int8 matmul; the others stay in floating point. `bits`
    are those of the activations.
    """

    name: str
    projections: tuple[Projection, ...]
    group: smooth.Group | None
    smoothing: smooth.Smoothing
    moments: Moments
    of_values: dict[str, ValueMoments]
    value_energy: dict[str, np.ndarray]
    weight_energy: np.ndarray
    keep: np.ndarray
    bits: int = 8

    @property
    def energy(self) -> np.ndarray:
        """Σₙ W² [K] of the weights after smoothing."""
        return self.weight_energy * self.smoothing.scale**2

    def per_row(self, zero_point: int = PerRow.zero_point, bits: int = 8) -> PerRow:
        """Return the quantization of each token with that zero point."""
        low, high = float(self.moments.low.min()), float(self.moments.high.max())
        return fitting_row(self.moments.rows, low, high, zero_point, bits)

    def output(self, rows: np.ndarray) -> np.ndarray:
        """Expected ‖x·W‖² [R] of `rows` [R, K] of x, with the part that the shift moved into the bias."""
        return _expected_output(rows * self.smoothing.scale + self.smoothing.shift, self.weight_energy)


def _expected_output(rows: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """Expected ‖x·W‖² [R] of `rows` [R, K], if their elements are independent. It is never 0."""
    return (rows * rows) @ energy + np.finfo(np.float32).tiny


def is_static(plan: Plan) -> bool:
    """Whether activations get fixed ranges."""
    return plan.ranges in RANGES


def decide_tensor(
    projections: Sequence[Projection],
    moments: Moments,
    of_values: dict[str, ValueMoments],
    group: smooth.Group | None,
    tables: set[ir.Value],
    whole: set[ir.Value],
    plan: Plan,
) -> Tensor:
    """Choose the smoothing, the float channels and the bits of the tensor that all of `projections` read.

    `moments` are those before smoothing, and `group` says what can take part in it. `tables` are those of
    `find.find_tables`, and `whole` the matrices of which no row stays in float, since something else reads their integers, too.
    """
    weights = [projection.matrix for projection in projections]
    grids = [plan.grid_of(one.weight.name, is_table=one.weight in tables) for one in projections]
    energy = np.sum([np.einsum("kn,kn->k", weight, weight) for weight in weights], axis=0)
    count = len(energy)
    smoothing = smooth.Smoothing(np.ones(count, np.float32), np.zeros(count, np.float32), None)
    read = {p.name: of_values[p.name] for p in projections if p.name in of_values}
    parts = {p.name: p.matrix[:, read[p.name].channels] for p in projections if p.name in read}
    value_energy = {name: np.einsum("kn,kn->k", part, part) for name, part in parts.items()}
    limit = error_limit(plan, strict=any(map(is_head, projections)))

    def smoothed(smoothing: smooth.Smoothing, bits: int) -> Tensor:
        scale, shift = smoothing.scale, smoothing.shift
        return Tensor(
            projections[0].x.name,
            tuple(projections),
            group,
            smoothing,
            moments.transformed(scale, shift) if group is not None else moments,
            {name: found.transformed(scale, shift) for name, found in read.items()},
            value_energy,
            energy,
            np.ones(count, bool),
            bits,
        )

    if group is not None:
        smoothing = _search_smoothing(moments, weights, grids, energy, group, plan)
    tensor = smoothed(smoothing, 8)
    if plan.float_channels and not any(projection.weight in whole for projection in projections):
        output = tensor.output(tensor.moments.rows)
        keep = _search_float_channels(tensor.moments, tensor.energy, output, plan.float_channels)
        tensor = replace(tensor, keep=keep)
    if plan.ranges is not None and _least_error(tensor, plan) > limit:
        # 16 bits need neither smoothing nor float channels. What is left for smoothing is to make the weights round well.
        if group is not None:
            smoothing = _search_smoothing(moments, weights, grids, energy, group, replace(plan, ranges=None))
        tensor = smoothed(smoothing, 16)
    return tensor


def _least_error(tensor: Tensor, plan: Plan) -> float:
    """The least relative error that activations of 8 bits add to the matmuls that read `tensor`."""
    if not is_static(plan):
        return row_activation(tensor)[1]
    seen, keep = tensor.moments, tensor.keep
    rows, output = seen.rows, tensor.output(seen.rows)
    return _static_error(rows[:, keep], seen.low[keep], seen.high[keep], tensor.energy[keep], output)


def error_limit(plan: Plan, strict: bool) -> float:
    """The largest relative error that activations of 8 bits may add to a matmul; `strict` for the head and for values."""
    if plan.max_error is None:
        return float("inf")
    return plan.max_error * (_STRICT if strict else 1)


def row_activation(tensor: Tensor) -> tuple[PerRow, float]:
    """Return the quantization of each token of `tensor` to 8 bits, and its expected relative error."""
    rows, output = tensor.moments.rows, tensor.output(tensor.moments.rows)
    tried = [tensor.per_row(zero) for zero in ROW_ZERO_POINTS]
    errors = {one: matmul_error(rows, one.restore(rows), tensor.energy, output) for one in tried}
    best = min(errors, key=errors.__getitem__)
    return best, errors[best]


def _search_smoothing(
    moments: Moments,
    weights: list[np.ndarray],
    grids: list[Grid],
    energy: np.ndarray,
    group: smooth.Group,
    plan: Plan,
) -> smooth.Smoothing:
    """Find the smoothing exponent, or none, with the least expected error of activations and weights together."""
    shift = moments.mean.astype(np.float32) if group.shift is not None else np.zeros(len(energy), np.float32)
    weight_max = group.shared(np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0))
    low, high = moments.low - shift, moments.high - shift
    output = _expected_output(moments.rows, energy)
    # An embedding that shares the matrix reads W as it is, divided by s again: as an input of which all channels are alike.
    alike = float(np.sqrt(output.mean() / (energy.sum() or 1.0))) if group.embedded else 0.0
    lowest, highest = -group.shared(np.maximum(-low, alike)), group.shared(np.maximum(high, alike))
    options: list[tuple[float | None, np.ndarray]] = [(None, np.ones(len(energy), np.float32))]
    options += [(alpha, smooth.candidate(lowest, highest, weight_max, alpha)) for alpha in plan.alphas]

    def cost(scale: np.ndarray) -> float:
        rows = (moments.rows - shift) / scale
        after = energy * scale**2
        activations = 0.0
        if is_static(plan):
            activations = _static_error(rows, low / scale, high / scale, after, output)
        elif plan.ranges == "row":
            row = fitting_row(rows, float((low / scale).min()), float((high / scale).max()))
            activations = matmul_error(rows, row.restore(rows), after, output)
        both = zip(weights, grids, strict=True)
        noise = sum(rounding_noise(weight * scale[:, None], grid) for weight, grid in both)
        embedding = float(np.sum(noise / scale**2) / (energy.sum() or 1.0)) if group.embedded else 0.0
        return activations + float(np.mean((rows * rows) @ noise / output)) + embedding

    alpha, scale = min(options, key=lambda option: cost(option[1]))
    return smooth.Smoothing(scale, shift, alpha)


def _static_error(rows: np.ndarray, low: np.ndarray, high: np.ndarray, energy: np.ndarray, output: np.ndarray) -> float:
    """Least expected error of rows [R, K] with a static range, over the `_SHARES` of the full range.

    `low` and `high` [K] are the smallest and largest value of each channel.
    """
    bottom, top = min(float(low.min()), 0.0), max(float(high.max()), 0.0)
    return min(
        matmul_error(rows, PerTensor(bottom * share, top * share).restore(rows), energy, output) for share in _SHARES
    )


def _search_float_channels(moments: Moments, energy: np.ndarray, output: np.ndarray, limit: int) -> np.ndarray:
    """Find the channels that stay in the int8 matmul, bool [K]: all, or all but the largest few if that pays.

    At least one stays, however few there are.
    """
    order = np.argsort(-np.maximum(moments.high, -moments.low), kind="stable")

    def error(count: int) -> float:
        kept = np.sort(order[count:])
        return _static_error(moments.rows[:, kept], moments.low[kept], moments.high[kept], energy[kept], output)

    counts = [0, *(2**power for power in range(limit.bit_length()) if 2**power < len(energy))]
    errors = {count: error(count) for count in counts}
    in_float = min(counts, key=lambda count: errors[count] / _MORE**count)
    if errors[in_float] > _PAYS * errors[0]:
        in_float = 0
    keep = np.ones(len(energy), bool)
    keep[order[:in_float]] = False
    return keep
