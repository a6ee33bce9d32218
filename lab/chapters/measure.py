"""Measures the numbers that the chapters show on the artifacts, and fills the sections of lab/chapters/data.py.

The weights are the fp32 artifact's. The activations come from real text: ranges are taken from the calibration split,
as the recipes do, and every error is measured on the test split.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx

from cuantiza.core.contract import window_feeds
from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Source, Split, full_windows, load_calibration, load_splits, stream
from cuantiza.core.inputs.gpt2_config import parse_config
from cuantiza.core.inputs.model_config import read_config, start_token
from cuantiza.core.inputs.tokenizer import encode, load_tokenizer
from cuantiza.core.onnx import file as onnx_file
from cuantiza.core.run.runtime import open_session
from cuantiza.core.store import artifact
from cuantiza.core.store.artifact import Artifact
from cuantiza.quantize.decide.activation import PerRow, PerTensor
from cuantiza.quantize.decide.smooth import candidate
from cuantiza.quantize.inspect.commands import observe
from cuantiza.quantize.recipes.registry import RECIPES
from cuantiza.quantize.weights.rounding import Grid, IntWeight, round_to_nearest
from lab.chapters import numbers
from lab.chapters.data import Activation, Bits, Chapters, Graphs, Model, Outliers, Rounding, Weight
from lab.chapters.numbers import FORMATS, Bins
from lab.checkpoints.hard import OUTLIER_FACTOR, twin

WINDOW, WINDOWS = 512, 8  # tokens per window, and windows per split
# The layers whose tensors are shown. The channels of WEIGHT differ tenfold in range. No recipe smooths the input of
# ACTIVATION, so the artifacts' own ranges hold for it unchanged.
WEIGHT, ACTIVATION, OUTLIERS = "h.0.mlp.c_fc", "h.2.mlp.c_proj", "h.3.mlp.c_fc"
INT8, INT4 = Grid(8), Grid(4, 32, symmetric=False, scale_bits=8)  # those of int8-dynamic and of int4-weight
ALPHA = 0.5  # SmoothQuant's default exponent
_UNCLIPPED = np.ones(1, np.float32)
_POINTS = 128  # channels that a curve shows


class Tensors:
    """The weights of an fp32 artifact, and its activations on windows of a corpus, one row per token."""

    def __init__(self, fp32: Artifact, corpus: Source, work: Path) -> None:
        """Write a copy of the graph to the folder `work` that has the inner values as further outputs.

        Reading activations later raises UserError if the corpus is too short.
        """
        self._folder, self._splits = fp32.path, load_splits(corpus)
        graph = onnx_file.load(fp32.model).graph
        self.weights = {name: value.const_value.numpy() for name, value in graph.initializers.items()}
        nodes = {node.name: node for node in graph}
        self.linear_layers = [
            name for name, node in nodes.items() if f"{name}.weight" in self.weights and node.op_type == "MatMul"
        ]
        self._values = {name: nodes[name].inputs[0].name for name in self.linear_layers}
        self.softmaxes = [name for name, node in nodes.items() if node.op_type == "Softmax"]
        self._values |= {name: nodes[name].outputs[0].name for name in self.softmaxes}
        proto = onnx.load(fp32.model)
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self._values.values())
        onnx.save(proto, work / artifact.MODEL)
        self._session = open_session(work / artifact.MODEL, 1)

    @property
    def floats(self) -> dict[str, np.ndarray]:
        """The model's float32 weights by name, without the graph's own scalar constants."""
        return {name: array for name, array in self.weights.items() if array.dtype == np.float32 and array.size > 1}

    def matrix(self, layer: str) -> np.ndarray:
        """The weight of the linear layer `layer`, float32 [K, N]."""
        return self.weights[f"{layer}.weight"]

    def calibration(self, layer: str) -> np.ndarray:
        """The input of the linear layer `layer` [R, K] on the calibration split."""
        return self._run(self._splits[0], [layer])[layer]

    @cached_property
    def test(self) -> dict[str, np.ndarray]:
        """Inputs of all linear layers [R, K] and attention's probabilities [R, T] on the test split, by node name."""
        return self._run(self._splits[1], list(self._values))

    def _run(self, split: Split, names: list[str]) -> dict[str, np.ndarray]:
        documents = encode(load_tokenizer(self._folder), split.documents, enough=WINDOW * WINDOWS)
        windows = full_windows(stream(documents, start_token(self._folder)), WINDOW)[:WINDOWS]
        if len(windows) < WINDOWS:
            raise UserError(
                f"CORPUS=: its {split.name} split has fewer than {WINDOWS} windows of {WINDOW} tokens; add more text"
            )
        parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for ids in windows:
            values = self._session.run(
                [self._values[name] for name in names], window_feeds(self._session.get_inputs(), ids)
            )
            for name, value in zip(names, values, strict=True):
                parts[name].append(value.reshape(-1, value.shape[-1]))
        return {name: np.concatenate(parts.pop(name)) for name in names}


def measure(fp32: Artifact, dynamic: Artifact, static: Artifact, corpus: Source) -> Chapters:
    """Measure all sections of the chapters. Raises UserError if an artifact is not what the chapters describe."""
    for item in (static, dynamic):
        decision = item.manifest.details.get("projections", {}).get(ACTIVATION)
        odd = decision is None or decision.get("alpha") is not None or decision.get("float_channels")
        if odd or decision.get("bits") != 16:
            raise UserError(
                f"{item.path}: {ACTIVATION} is not quantized to 16 bits, is smoothed or has float channels, and the chapters "
                f"say otherwise; set ACTIVATION in lab/chapters/measure.py to another linear layer"
            )
    with tempfile.TemporaryDirectory() as work:
        tensors = Tensors(fp32, corpus, Path(work))
        fixed, own = (in_8_bits(name, fp32.path, Path(work), corpus) for name in ("int8-static", "int8-dynamic"))
        activation, row = PerTensor(fixed["low"], fixed["high"]), PerRow(own["zero_point"])
        return Chapters(
            weight_bits(tensors.matrix(WEIGHT)),
            activation_bits(tensors.test[ACTIVATION], activation, row),
            whole_model(tensors),
            weight_section(tensors.matrix(WEIGHT)),
            activation_section(tensors.test[ACTIVATION], tensors.matrix(ACTIVATION), activation, row),
            rounding_section(tensors.test[ACTIVATION], tensors.matrix(ACTIVATION), stored(dynamic, ACTIVATION)),
            outlier_section(tensors, fp32.path),
            graph_section(tensors, {item.manifest.name: item for item in (fp32, dynamic, static)}),
        )


def in_8_bits(recipe: str, fp32: Path, work: Path, corpus: Source) -> dict:
    """What `recipe` would decide on ACTIVATION if it had 8 bits for every activation."""
    return observe(replace(RECIPES[recipe], max_error=None), fp32, work, load_calibration(corpus), ACTIVATION)[1]


def narrowest(matrix: np.ndarray) -> int:
    """The output channel of `matrix` [K, N] with the smallest range."""
    return int(np.abs(matrix).max(axis=0).argmin())


def by_tensor(matrix: np.ndarray) -> IntWeight:
    """`matrix` [K, N] in int8 with one scale for the whole tensor."""
    scale = np.float32(np.abs(matrix).max() / 127)
    q = np.rint(matrix / scale).astype(np.int8)
    channels = matrix.shape[1]
    return IntWeight(q, np.full((1, channels), scale), np.zeros((1, channels), np.int8), INT8)


def weight_bits(matrix: np.ndarray) -> Bits:
    """Show the first weight of the narrowest channel as floats, as int8 per channel, and as int4 in blocks of 64."""
    channel = narrowest(matrix)
    value = float(matrix[0, channel])
    int8, int4 = (round_to_nearest(matrix[:, [channel]], grid, _UNCLIPPED) for grid in (INT8, INT4))
    shown = [numbers.as_float(value, form) for form in FORMATS.values()]
    shown += [
        numbers.as_integer(name, value, float(w.scale[0, 0]), int(w.zero_point[0, 0]), *w.grid.limits)
        for name, w in (("int8", int8), ("int4", int4))
    ]
    return Bits(f"{WEIGHT}.weight", (0, channel), value, tuple(shown))


def activation_bits(x: np.ndarray, static: PerTensor, row: PerRow) -> Bits:
    """Show one element of `x` [R, K] as floats, as uint8 with a scale per tensor, and as uint8 with a scale per token.

    The element is the second largest of a typical token: the one whose largest element is the median over all tokens.
    """
    largest = x.max(axis=1)
    line = int(np.argsort(largest, kind="stable")[len(largest) // 2])
    column = int(np.argsort(x[line], kind="stable")[-2])
    value, (scale, zero) = float(x[line, column]), static.parameters
    row_scale = float(row_scales(x[line : line + 1], row.zero_point)[0])
    shown = [numbers.as_float(value, form) for form in FORMATS.values()]
    shown.append(numbers.as_integer("u8-tensor", value, float(scale), int(zero), 0, 255))
    shown.append(numbers.as_integer("u8-row", value, row_scale, row.zero_point, 0, 255))
    return Bits(ACTIVATION, (line, column), value, tuple(shown))


def row_scales(x: np.ndarray, zero_point: int) -> np.ndarray:
    """The scales [R] that cuantiza.quantize.decide.activation.PerRow gives to the tokens `x` [R, K]."""
    above = 255 - zero_point
    return np.maximum(x.max(axis=1) / above, -x.min(axis=1) / min(zero_point, above))


def whole_model(tensors: Tensors) -> Model:
    everything = np.concatenate([array.ravel() for array in tensors.floats.values()])
    activations = np.concatenate([tensors.test[name].ravel() for name in tensors.linear_layers])
    exact, error = {}, {}
    for name in ("fp16", "bf16"):
        back = everything.astype(FORMATS[name].dtype).astype(np.float32)
        exact[name] = float(np.mean(back == everything))
        error[name] = numbers.relative_rms(back, everything)

    def exponents(values: np.ndarray) -> Bins:
        return numbers.histogram(np.log2(np.abs(values[values != 0])), -24, 6, 60)

    return Model(
        parameters=everything.size,
        zero_tail=numbers.trailing_zeros(everything, 13),
        largest_weight=float(np.abs(everything).max()),
        largest_activation=float(np.abs(activations).max()),
        exact=exact,
        error=error,
        weight_exponents=exponents(everything),
        activation_exponents=exponents(activations),
        tokens=WINDOW * WINDOWS,
    )


def weight_section(matrix: np.ndarray) -> Weight:
    channel = narrowest(matrix)
    kinds = {
        "tensor": by_tensor(matrix),
        "channel": round_to_nearest(matrix, INT8, _UNCLIPPED),
        "int4": round_to_nearest(matrix, INT4, _UNCLIPPED),
    }
    restored = {name: weight.dequantize() for name, weight in kinds.items()}
    errors = {name: numbers.relative_rms(array, matrix) for name, array in restored.items()}
    whole_channels = round_to_nearest(matrix, Grid(INT4.bits, symmetric=False), _UNCLIPPED)
    errors["int4_channel"] = numbers.relative_rms(whole_channels.dequantize(), matrix)
    columns = {name: numbers.relative_rms(array, matrix, axis=0) for name, array in restored.items()}
    largest = np.abs(matrix).max(axis=0)
    picked = np.argsort(largest, kind="stable")[np.linspace(0, len(largest) - 1, _POINTS).astype(int)]
    edge = float(largest[channel])

    def steps(scale: float) -> int:
        levels = numbers.grid(scale, 0, -127, 127)
        return int(np.sum(np.abs(levels) <= edge * (1 + 1e-6)))

    scales = {name: float(weight.scale[0, channel]) for name, weight in kinds.items()}
    whole = float(largest.max())
    return Weight(
        tensor=f"{WEIGHT}.weight",
        shape=matrix.shape,
        largest=whole,
        channel=channel,
        channel_largest=edge,
        scale_tensor=scales["tensor"],
        scale_channel=scales["channel"],
        int4_scale=scales["int4"],
        int4_zero_point=int(kinds["int4"].zero_point[0, channel]),
        steps_tensor=steps(scales["tensor"]),
        steps_channel=steps(scales["channel"]),
        error=errors,
        channel_error={name: float(column[channel]) for name, column in columns.items()},
        values=numbers.histogram(matrix, -whole, whole, 81),
        channel_values=numbers.histogram(matrix[:, channel], -edge, edge, 41),
        channels=tuple((float(largest[i]), *(float(column[i]) for column in columns.values())) for i in picked),
    )


def activation_section(x: np.ndarray, matrix: np.ndarray, static: PerTensor, row: PerRow) -> Activation:
    scale, zero = static.parameters
    steps = row_scales(x, row.zero_point)
    restored = {"tensor": static.restore(x), "row": row.restore(x)}
    exact = x @ matrix
    return Activation(
        tensor=ACTIVATION,
        rows=len(x),
        low=float(x.min()),
        high=float(x.max()),
        static_low=-float(zero) * float(scale),
        static_high=(255 - float(zero)) * float(scale),
        static_scale=float(scale),
        static_zero_point=int(zero),
        clipped=float(np.mean(x > (255 - float(zero)) * float(scale))),
        row_zero_point=row.zero_point,
        row_scale_median=float(np.median(steps)),
        finer_rows=float(np.mean(steps < scale)),
        negative=float(np.mean(x < 0)),
        zeroed={name: float(np.mean((array == 0) & (x != 0))) for name, array in restored.items()},
        error={name: numbers.relative_rms(array @ matrix, exact) for name, array in restored.items()},
        values=numbers.histogram(x, float(x.min()), float(x.max()), 80),
        row_steps=numbers.histogram(steps, 0, float(max(steps.max(), scale)), 60),
    )


def stored(dynamic: Artifact, layer: str) -> IntWeight:
    """The integers and scales that the int8-dynamic artifact stores for the weight of the linear layer `layer`."""
    initializers = onnx_file.load(dynamic.model).graph.initializers
    q, scale = (initializers[f"{layer}.weight_{part}"].const_value.numpy() for part in ("int8", "scale"))
    return IntWeight(q, scale[None], np.zeros((1, len(scale)), np.int8), INT8)


def rounding_section(x: np.ndarray, matrix: np.ndarray, gptq: IntWeight) -> Rounding:
    low, high = INT8.limits
    nearest = IntWeight(np.rint(matrix / gptq.scale).clip(low, high).astype(np.int8), gptq.scale, gptq.zero_point, INT8)
    exact = x @ matrix
    restored = {"nearest": nearest.dequantize(), "gptq": gptq.dequantize()}
    return Rounding(
        tensor=f"{ACTIVATION}.weight",
        moved=float(np.mean(nearest.q != gptq.q)),
        weight_error={name: numbers.relative_rms(array, matrix) for name, array in restored.items()},
        product_error={name: numbers.relative_rms(x @ array, exact) for name, array in restored.items()},
    )


def outlier_section(tensors: Tensors, folder: Path) -> Outliers:
    """Compare int8 on es-mini and on its twin with outlier channels.

    The twin computes the same function, so its activations need no further run: they are es-mini's, with each channel
    multiplied by the factor that the twin applied to the LayerNorm's weight.
    """
    config, weights = parse_config(read_config(folder), folder / "config.json"), tensors.floats
    changed, made = twin(weights, config, seed=0)
    norm = f"{OUTLIERS.split('.mlp')[0]}.ln_2.weight"
    factor = (changed[norm].astype(np.float64) / weights[norm]).astype(np.float32)
    models = {
        "tame": (np.ones_like(factor), tensors.matrix(OUTLIERS)),
        "twin": (factor, changed[f"{OUTLIERS}.weight"].astype(np.float32)),
    }
    error: dict[str, dict[str, float]] = {}
    largest: dict[str, np.ndarray] = {}
    for name, (channels, matrix) in models.items():
        calibration, x = (part * channels for part in (tensors.calibration(OUTLIERS), tensors.test[OUTLIERS]))
        exact = x @ matrix
        scale = candidate(calibration.min(axis=0), calibration.max(axis=0), np.abs(matrix).max(axis=1), ALPHA)
        forms = {
            "tensor": (x, matrix, PerTensor(float(calibration.min()), float(calibration.max()))),
            "row": (x, matrix, PerRow()),
            "smoothed": (
                x / scale,
                matrix * scale[:, None],
                PerTensor(float((calibration / scale).min()), float((calibration / scale).max())),
            ),
        }
        error[name] = {
            kind: numbers.relative_rms(how.restore(values) @ round_to_nearest(w, INT8, _UNCLIPPED).dequantize(), exact)
            for kind, (values, w, how) in forms.items()
        }
        largest[name] = np.abs(x).max(axis=0)
        if name == "twin":
            largest["smoothed"] = np.abs(x / scale).max(axis=0)
    return Outliers(
        tensor=OUTLIERS,
        channels=len(made.channels),
        ratio={name: float(array.max() / np.median(array)) for name, array in largest.items()},
        largest={name: tuple(np.sort(array)[::-1].tolist()) for name, array in largest.items()},
        error=error,
        least_factor=OUTLIER_FACTOR[0],
        most_factor=OUTLIER_FACTOR[1],
    )


def graph_section(tensors: Tensors, artifacts: dict[str, Artifact]) -> Graphs:
    operators = {
        name: dict(Counter(node.op_type for node in onnx_file.load(item.model).graph))
        for name, item in artifacts.items()
    }
    floats = {name: array.size for name, array in tensors.floats.items()}
    below = total = lost_mass = mass = 0.0
    for name in tensors.softmaxes:
        p = tensors.test[name]
        seen = p[p > 0]
        small = seen[seen < 0.5 / 255]
        below, total = below + small.size, total + seen.size
        lost_mass, mass = lost_mass + small.sum(dtype=np.float64), mass + seen.sum(dtype=np.float64)
    details = artifacts["int8-static"].manifest.details
    return Graphs(
        operators=operators,
        projections=len(details["projections"]),
        norm_parameters=sum(size for name, size in floats.items() if ".ln_" in name or name.startswith("ln_f"))
        / sum(floats.values()),
        lost=float(below / total),
        lost_mass=float(lost_mass / mass),
        bytes={name: item.model.stat().st_size for name, item in artifacts.items()},
        calibration_windows=details["calibration"]["windows"],
        calibration_tokens=details["calibration"]["tokens_per_window"],
    )
