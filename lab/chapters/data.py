"""The measured sections of docs/data/quantization.json, as lab/chapters/measure.py fills them.

Errors are relative root mean square: ‖restored − exact‖ / ‖exact‖.
"""

from __future__ import annotations

from dataclasses import dataclass

from lab.chapters.numbers import Bins, Shown


@dataclass(frozen=True)
class Bits:
    """One element, `value` at `index` of `tensor`, in every format."""

    tensor: str
    index: tuple[int, ...]
    value: float
    shown: tuple[Shown, ...]


@dataclass(frozen=True)
class Model:
    """All weights of the fp32 artifact and the activations in front of its projections: what formats must hold.

    `exact`: shares of the weights that fp16 and bf16 give back exactly; `error`: relative RMS error of each.
    `exponents` are bins of log2 |x| of weights and activations other than 0.
    """

    parameters: int
    zero_tail: float
    largest_weight: float
    largest_activation: float
    exact: dict[str, float]
    error: dict[str, float]
    weight_exponents: Bins
    activation_exponents: Bins
    tokens: int


@dataclass(frozen=True)
class Weight:
    """A matrix [K, N] and its `channel` of the smallest range; scales and relative RMS errors by kind of grid.

    `steps` are how many of the grid's values lie within the channel's range. `channels` are (largest |weight|,
    relative error by tensor, by channel, of int4) of channels in the order of their range.
    """

    tensor: str
    shape: tuple[int, int]
    largest: float
    channel: int
    channel_largest: float
    scale_tensor: float
    scale_channel: float
    int4_scale: float
    int4_zero_point: int
    steps_tensor: int
    steps_channel: int
    error: dict[str, float]
    channel_error: dict[str, float]
    values: Bins
    channel_values: Bins
    channels: tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True)
class Activation:
    """An activation [R, K]: as int8-static has it, with a range per tensor, and as int8-dynamic has it, per row.

    `zeroed` are shares of the elements that come back as 0. `row_steps` are bins of the rows' steps.
    """

    tensor: str
    rows: int
    low: float
    high: float
    static_low: float
    static_high: float
    static_scale: float
    static_zero_point: int
    clipped: float
    row_zero_point: int
    row_scale_median: float
    finer_rows: float
    negative: float
    zeroed: dict[str, float]
    error: dict[str, float]
    values: Bins
    row_steps: Bins


@dataclass(frozen=True)
class Rounding:
    """int8-dynamic's integers of a matrix beside those that are nearest on the same scales."""

    tensor: str
    moved: float
    weight_error: dict[str, float]
    product_error: dict[str, float]


@dataclass(frozen=True)
class Outliers:
    """A LayerNorm's output on es-mini and on the twin of lab/checkpoints/hard.py, the same function with larger channels.

    `largest` are max|x| of all channels, in descending order: of "tame", "twin", and "smoothed", the twin's.
    `error`: of the product in int8, relative RMS, by model and by "tensor", "row" and "smoothed" (per tensor).
    """

    tensor: str
    channels: int
    ratio: dict[str, float]
    largest: dict[str, tuple[float, ...]]
    error: dict[str, dict[str, float]]
    least_factor: float
    most_factor: float


@dataclass(frozen=True)
class Graphs:
    """Operators of each artifact's graph, the shares of the parameters and of attention that stay in float.

    `lost`: of attention's probabilities other than 0, those below half a step of 1/255; `lost_mass`: what they add
    up to, of all.
    """

    operators: dict[str, dict[str, int]]
    projections: int
    norm_parameters: float
    lost: float
    lost_mass: float
    bytes: dict[str, int]
    calibration_windows: int
    calibration_tokens: int


@dataclass(frozen=True)
class Chapters:
    """All measured sections."""

    weight_bits: Bits
    activation_bits: Bits
    model: Model
    weight: Weight
    activation: Activation
    rounding: Rounding
    outliers: Outliers
    graphs: Graphs
