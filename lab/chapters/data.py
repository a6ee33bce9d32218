"""The measured sections of docs/data/quantization.json. lab/chapters/measure.py fills them.

Every error is a relative root mean square: ‖restored − exact‖ / ‖exact‖. A row of an activation is one token.
"""

from __future__ import annotations

from dataclasses import dataclass

from lab.chapters.numbers import Bins, Shown


@dataclass(frozen=True)
class Bits:
    """One element of a tensor, in every format: `value` is at `index` of `tensor`."""

    tensor: str
    index: tuple[int, ...]
    value: float
    shown: tuple[Shown, ...]


@dataclass(frozen=True)
class Model:
    """Statistics of all weights of the fp32 artifact and of the inputs of its linear layers.

    They show which range and precision a format needs. `zero_tail` is the share of the weights whose last 13 mantissa
    bits are 0. `exact` is the share of the weights that fp16 and bf16 represent exactly, `error` the relative RMS error
    of each. The `..._exponents` are bins of log2 |x|, without zeros.
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
    """A weight matrix [K, N], and its output channel with the smallest range.

    `error` and `channel_error` are the relative RMS errors of the matrix and of that channel, by granularity of the
    scale. `steps_...` counts the grid's values within the channel's range. Each of `channels` is (largest |weight|,
    relative error with a scale per tensor, per channel, with int4), in the order of their range.
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
    """An activation [R, K], R tokens, quantized like int8-static (one range per tensor) and int8-dynamic (per token).

    `zeroed` is the share of nonzero elements that become 0. `row_steps` are bins of the scales of all tokens, and
    `finer_rows` is the share of tokens whose scale is below the static one.
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
    """GPTQ's integers for a matrix, as int8-dynamic stores them, compared with rounding to nearest on the same scales.

    `moved` is the share of the integers that differ. `product_error` is the relative RMS error of the matmul's output.
    """

    tensor: str
    moved: float
    weight_error: dict[str, float]
    product_error: dict[str, float]


@dataclass(frozen=True)
class Outliers:
    """A LayerNorm's output on es-mini ("tame") and on its twin, the same function with outlier channels.

    lab/checkpoints/hard.py makes the twin. `largest` are max |x| of all channels in descending order; "smoothed" is the
    twin's after SmoothQuant. `error` is the relative RMS error of the int8 matmul by model and by scale: "tensor",
    "row" (per token) and "smoothed" (SmoothQuant, then per tensor).
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
    """Operators and bytes of each artifact's graph, and figures that explain which parts stay in float.

    `norm_parameters` is the LayerNorms' share of the parameters. `lost` is the share of attention's nonzero
    probabilities that uint8 would round to 0, because they are below half a step of 1/255. `lost_mass` is their share
    of the sum of all probabilities.
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
