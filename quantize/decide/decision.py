"""A Plan says what calibration has to decide, and a Job for which model; a Decision is the result for one linear layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from cuantiza.quantize.decide.activation import Activation
from cuantiza.quantize.decide.observations import Histogram
from cuantiza.quantize.weights.rounding import Grid, IntWeight

if TYPE_CHECKING:
    from cuantiza.quantize.rewrite.find import Embedding, Projection


@dataclass(frozen=True)
class Plan:
    """The choices of a recipe that calibration follows.

    `grid` says which integers the weights become, except those of the matrices (initializers) that `grids`
    names, which have grids of their own. `rounding` says how they are rounded: "gptq"; "descent", which goes on after GPTQ
    (gptq.descend); "follow", by which each layer also makes up for what earlier ones lost (follow.py), without float
    channels; else to nearest.
    `alphas` are the exponents that smoothing tries; without any there is no smoothing. `ranges` says how activations
    get their range: "row" for each token at run time, a name of RANGES for a static one, None where they stay in
    floating point. `float_channels` is the largest number of channels of a tensor that may stay in floating point.
    `max_error` is the largest relative squared error that activations of 8 bits may add to a matmul, as expected by
    `activation.matmul_error`; where they would add more, they get 16 bits. None leaves all at 8 bits. `table` is the grid of
    the head's matrix, where that is rounded as other linear layers are, also when the embedding shares it; None leaves it
    to the rewrite, which rounds it to nearest.
    """

    grid: Grid
    rounding: str
    alphas: tuple[float, ...] = ()
    ranges: str | None = None
    float_channels: int = 0
    max_error: float | None = None
    table: Grid | None = None
    grids: Mapping[str, Grid] = field(default_factory=dict)

    def grid_of(self, matrix: str, *, is_table: bool = False) -> Grid:
        """Return the grid of the matrix of that name, which is one of `find.find_tables` if `is_table`."""
        return self.grids.get(matrix, self.table if is_table and self.table is not None else self.grid)

    def alone(self) -> Plan:
        """Return the plan for layers that are quantized one at a time, and need not make up for others."""
        return replace(self, rounding="gptq") if self.rounding == "follow" else self


@dataclass(frozen=True)
class Job:
    """What calibration decides, by `plan`, for `model`, which it smooths in place; the first `windows` windows are for it."""

    model: ir.Model
    plan: Plan
    windows: int


@dataclass(frozen=True)
class Decision:
    """The decision on one linear layer x [.., K] · W [K, N].

    `float_channels` int64 [k] are the input channels that stay in floating point, and `float_rows` float32 [k, N] their
    rows of W; `weight` has zeros in these rows. `weight` is None for a matrix of `find.find_tables` that is rounded to
    nearest later. `details` is what the manifest says of
    the layer, and `histogram` that of the activations from which a static range was chosen. `power` [K] is the mean
    square of each input channel, after smoothing.
    """

    weight: IntWeight | None
    activation: Activation | None
    float_channels: np.ndarray
    float_rows: np.ndarray
    details: dict = field(default_factory=dict)
    histogram: Histogram | None = None
    power: np.ndarray | None = None


# A pass that writes decisions, by the names of the linear layers, into a graph, and returns what it quantized.
Rewrite = Callable[[ir.Model, dict[str, Decision]], "tuple[list[Projection], list[Embedding]]"]
