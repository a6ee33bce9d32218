"""What calibration is asked to decide, and what it decided on one projection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from cuantiza.quantize.decide.activation import Activation
from cuantiza.quantize.decide.observations import Histogram
from cuantiza.quantize.decide.rounding import Grid, IntWeight

if TYPE_CHECKING:
    from cuantiza.quantize.rewrite.find import Embedding, Projection


@dataclass(frozen=True)
class Plan:
    """What to decide: the integers of the weights and how they are rounded, the exponents that smoothing tries
    (none: no smoothing), how activations get their range ("row", or a name of RANGES; None: they stay as they
    are), and how many channels a tensor may keep out of the integer product."""

    grid: Grid
    rounding: str
    alphas: tuple[float, ...] = ()
    ranges: str | None = None
    float_channels: int = 0


@dataclass(frozen=True)
class Site:
    """The decision on one projection x [.., K] · W [K, N].

    `weight` has zero rows at `float_channels` int64 [k], whose rows are `float_rows` float32 [k, N]. It is None
    for a table (`sites.find_tables`), which is rounded to nearest, for its look-ups too. `account` is what the manifest
    tells of it, `histogram` that of a static range.
    """

    weight: IntWeight | None
    activation: Activation | None
    float_channels: np.ndarray
    float_rows: np.ndarray
    account: dict = field(default_factory=dict)
    histogram: Histogram | None = None


# A pass that writes decisions, by the names of the linear layers, into a graph, and returns what it quantized.
Rewrite = Callable[[ir.Model, dict[str, Site]], "tuple[list[Projection], list[Embedding]]"]
