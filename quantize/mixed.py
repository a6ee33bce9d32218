"""Give each matrix of a model a number of bits, so that the file keeps a budget in bytes, or the model one in KL.

1. Every matrix is rounded to 4 bits in blocks of 32, by GPTQ, and the KL divergence that each causes alone is measured.
2. What other grids would cause follows from the expected errors Σ power · (Ŵ − W)² of a sample of the channels.
3. The choice that loses least within the budget is a knapsack (quantize/weights/allocate.py).
4. All is rounded as chosen, as int4-weight does it, and measured on windows that decide nothing before. Where the
   budget is not kept, or a budget in KL is not used up, the choice is made again with what was learnt.

Bytes are those of the file with standard operators or with ONNX Runtime's, whichever takes more, so that both targets
have the same integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from cuantiza.core.errors import UserError
from cuantiza.core.machine.progress import report, track
from cuantiza.core.onnx import file as onnx_file
from cuantiza.core.store import artifact, folders
from cuantiza.quantize.decide.decision import Decision, Plan
from cuantiza.quantize.inspect.sensitivity import Effect, Gauge
from cuantiza.quantize.known_options import known_options
from cuantiza.quantize.layers import decide
from cuantiza.quantize.rewrite.find import find_embeddings, find_projections, find_tables
from cuantiza.quantize.rewrite.weight_only import choose_weights, quantize_weights
from cuantiza.quantize.weights.allocate import (
    Option,
    Options,
    closest,
    smallest,
    total_bytes,
    total_kl,
    within_bytes,
    within_kl,
)
from cuantiza.quantize.weights.rounding import Grid, IntWeight, round_to_nearest

# All are measured on this grid, that of int4-weight; the others are candidates beside it.
BASE = Grid(4, 32, symmetric=False, scale_bits=8)
OTHERS = (
    *(Grid(4, block, symmetric=False, scale_bits=8) for block in (128, 64, 16)),
    Grid(8, None, symmetric=True),
    Grid(8, 32, symmetric=True, scale_bits=8),
)
# Of so many windows, the first chooses, the second checks, and the others calibrate.
EVERY = 8
# At most so many times one matrix is measured on one window, if that leaves two windows: GPT-2 small's 50 matrices are
# measured on 5 windows each, SmolLM2-135M's 211 on 2.
_MEASURED = 250
_LEAST_MEASURED = 2
# How many channels of a matrix stand for all when the errors of grids are compared.
_CHANNELS = 512
# A choice for a budget in KL is good enough if the model uses this share of it.
_USED = 0.9
# How often a choice is made and rounded, at most.
_ROUNDS = 4


@dataclass(frozen=True)
class Mixed:
    """A smoothed `model` with the decisions on its linear layers and the integers of all its matrices, by name.

    `details` is what the manifest says of the budget and of the bits.
    """

    model: ir.Model
    decisions: dict[str, Decision]
    weights: dict[str, IntWeight]
    details: dict


def spend(
    parent: Path, work: Path, windows: np.ndarray, plan: Plan, max_bytes: int | None, max_kl: float | None
) -> Mixed:
    """Quantize the fp32 artifact `parent` within `max_bytes` of the ONNX file, or `max_kl` nats per token.

    One of the two is None. `windows` int64 [n, T] calibrate and measure; `plan` says how linear layers are smoothed and
    rounded; `work` is a folder for temporary files. Raises UserError where no choice keeps the budget, or where the graph
    has no linear layer.
    """
    path = parent / artifact.MODEL
    original = onnx_file.load(path)
    if not find_projections(original.graph):
        raise UserError(f"{parent}: has no linear layer (a matmul with a constant weight); nothing was quantized")
    shapes = matrix_shapes(original.graph)
    if max_bytes is not None:
        _check_bytes(original, shapes, max_bytes)
    choosing, checking = choosing_windows(windows, len(shapes)), windows[1::EVERY]
    seen = _seen(windows)
    with folders.staging(work / "gauge") as folder:
        others = np.delete(seen, np.s_[:: EVERY - 1], axis=0)
        measure = partial(_measure, path, original.clone(), shapes, choosing, others, plan, folder)
        options = known_options(path, [choosing, others], plan, measure)
    with folders.staging(work / "gauge") as folder:
        gauge = Gauge(path, checking, folder)

        def attempt(chosen: Mapping[str, Option]) -> tuple[Mixed, int, Effect]:
            grids = {name: option.grid for name, option in chosen.items()}
            model, decisions, weights = _rounded(original, grids, seen, plan, folder)
            effect = gauge.effect(model, weights, _portable)
            size = graph_bytes(model, weights)
            report(f"mixed     {size / 1e6:.2f} MB, KL {effect.kl_divergence:.5f} nats on windows that chose nothing")
            return Mixed(model, decisions, weights, _details(chosen, options, effect)), size, effect

        if max_bytes is not None:
            return _keep_bytes(options, max_bytes, attempt, original, shapes)
        assert max_kl is not None
        return _keep_kl(options, max_kl, attempt)


def spend_again(parent: Path, work: Path, windows: np.ndarray, plan: Plan, details: dict) -> Mixed:
    """Quantize the fp32 artifact `parent` as `spend` did with the same text and plan, whose `details` say what it chose.

    Nothing is measured, and the integers are the same.
    """
    model = onnx_file.load(parent / artifact.MODEL)
    grids = {(grid.bits, grid.block): grid for grid in (BASE, *OTHERS)}
    chosen = {name: grids[matrix["bits"], matrix["block"]] for name, matrix in details["matrices"].items()}
    with folders.staging(work / "gauge") as folder:
        return Mixed(*_rounded(model, chosen, _seen(windows), plan, folder), details)


def choosing_windows(windows: np.ndarray, matrices: int) -> np.ndarray:
    """The windows on which each of so many `matrices` is measured alone: the fewer, the more matrices there are."""
    return windows[::EVERY][: max(_LEAST_MEASURED, _MEASURED // matrices)]


def _seen(windows: np.ndarray) -> np.ndarray:
    """The windows on which all is rounded: those that do not check the result."""
    return np.delete(windows, np.s_[1::EVERY], axis=0)


def _rounded(
    original: ir.Model, grids: Mapping[str, Grid], windows: np.ndarray, plan: Plan, work: Path
) -> tuple[ir.Model, dict[str, Decision], dict[str, IntWeight]]:
    """Smooth a copy of the model and round each matrix on its grid; return (the copy, decisions, integers)."""
    model = original.clone()
    decisions = decide(model, windows, replace(plan, grids=grids), work)
    return model, decisions, choose_weights(model, decisions, BASE, grids)


def matrix_shapes(graph: ir.Graph) -> dict[str, tuple[int, int]]:
    """Return (K, N) of every matrix that a linear layer or an embedding reads, by its name, in the graph's order."""
    tables, found = find_tables(graph), dict[str, tuple[int, int]]()
    readers = {projection.weight: projection for projection in find_projections(graph)}
    for name, value in graph.initializers.items():
        if value in readers or value in tables:
            first, second = _tensor(value).shape.numpy()
            by_input = value in readers and readers[value].channel_axis == 1
            found[name] = (first, second) if by_input else (second, first)
    return found


def _tensor(matrix: ir.Value) -> ir.TensorProtocol:
    assert matrix.const_value is not None  # it is an initializer
    return matrix.const_value


def grids_for(inputs: int) -> list[Grid]:
    """Return the grids that a matrix of so many inputs may have, BASE first: those whose blocks divide the inputs."""
    return [BASE, *(grid for grid in OTHERS if grid.block == BASE.block or inputs % (grid.block or 1) == 0)]


def matrix_bytes(shape: tuple[int, int], grid: Grid) -> int:
    """Return the bytes of the integers, scales and zero points of a matrix (K, N) on `grid`."""
    inputs, channels = shape
    block = grid.block or inputs
    blocks = -(-inputs // block)
    scales = blocks * channels * grid.scale_bits // 8 + (4 * channels if grid.scale_bits == 8 else 0)
    zero_points = 0 if grid.symmetric else -(-blocks * channels * grid.bits // 8)
    return blocks * block * channels * grid.bits // 8 + scales + zero_points


def graph_bytes(model: ir.Model, weights: Mapping[str, IntWeight]) -> int:
    """Return the bytes of the file of `model` with `weights` for the target that takes more, with attention unfused."""
    sizes = []
    for target in ("portable", "ort"):
        copy = model.clone()
        quantize_weights(copy, dict(weights), target)
        sizes.append(onnx_file.saved_bytes(copy))
    return max(sizes)


def _blank(shape: tuple[int, int], grid: Grid) -> IntWeight:
    """A matrix of zeros on `grid`, which takes no memory: its file has the same size as any other's."""
    inputs, channels = shape
    kind = np.int8 if grid.symmetric else np.uint8
    scale = np.ones((-(-inputs // (grid.block or inputs)), channels), np.float32)
    step = np.ones(channels, np.float32) if grid.scale_bits == 8 else None
    q = np.broadcast_to(np.zeros((), kind), shape)
    return IntWeight(q, scale, np.zeros(scale.shape, kind), grid, step)


def _check_bytes(model: ir.Model, shapes: dict[str, tuple[int, int]], max_bytes: int) -> None:
    least = {
        name: min(grids_for(shape[0]), key=lambda grid: matrix_bytes(shape, grid)) for name, shape in shapes.items()
    }
    size = graph_bytes(model, {name: _blank(shape, least[name]) for name, shape in shapes.items()})
    size += _smoothing_bytes(model, shapes)
    if size > max_bytes:
        raise UserError(
            f"max_bytes are {max_bytes:,}, and the smallest file of this model, all in 4 bits, takes {size:,}; give "
            f"--max-bytes {-(-size // 10**4) / 100:.2f}MB or more"
        )


def _smoothing_bytes(model: ir.Model, shapes: dict[str, tuple[int, int]]) -> int:
    """What smoothing may add at most: a factor for each input of a matrix that head and embedding share, and its node."""
    read = {projection.weight.name for projection in find_projections(model.graph)}
    shared = read & {embedding.table.name for embedding in find_embeddings(model.graph)}
    return sum(4 * shapes[name][0] + 512 for name in shapes if name in shared)


def _portable(model: ir.Model, weights: dict[str, IntWeight]) -> object:
    return quantize_weights(model, weights, "portable")


def _measure(
    path: Path,
    model: ir.Model,
    shapes: dict[str, tuple[int, int]],
    measured: np.ndarray,
    windows: np.ndarray,
    plan: Plan,
    work: Path,
) -> Options:
    """Measure the KL that each matrix causes alone on BASE; return the options of each, the fewest bytes first."""
    base = dict.fromkeys(shapes, BASE)
    decisions = decide(model, windows, replace(plan.alone(), grids=base), work)
    weights = choose_weights(model, decisions, BASE)
    readers = {projection.weight.name: projection for projection in find_projections(model.graph)}
    gauge = Gauge(path, measured, work)
    weights = {name: weights[name] for name in shapes if name in weights}  # in an order that is the same in every run
    effects = dict(track(gauge.alone(model, weights, _portable), "sensitivity", len(weights)))
    options = {}
    for name in weights:
        alone = effects[name].kl_divergence
        grids = grids_for(shapes[name][0])
        if name in readers:
            errors = _errors(readers[name].matrix, decisions[readers[name].name].power, grids)
        else:
            errors = _errors(_tensor(model.graph.initializers[name]).numpy().T, None, grids)
        found = [
            Option(grid, matrix_bytes(shapes[name], grid), alone * error / errors[0])
            for grid, error in zip(grids, errors, strict=True)
        ]
        options[name] = sorted(found, key=lambda option: option.bytes)
    return options


def _errors(matrix: np.ndarray, power: np.ndarray | None, grids: list[Grid]) -> list[float]:
    """Return the expected squared error of x · (Ŵ − W) for each of `grids`, of some channels of W [K, N].

    The inputs have mean squares `power` [K] and are taken as independent; None for rows of an embedding.
    """
    every = -(-matrix.shape[1] // _CHANNELS)
    some = np.ascontiguousarray(matrix[:, ::every], np.float32)
    power = np.ones(len(some)) if power is None else power
    tiny = np.finfo(np.float32).tiny  # for a matrix of zeros
    rounded = [round_to_nearest(some, grid).dequantize() for grid in grids]
    return [float(power @ np.square(matrix - some).sum(axis=1) + tiny) for matrix in rounded]


Attempt = Callable[[Mapping[str, Option]], tuple[Mixed, int, Effect]]


def _keep_bytes(
    options: Options, budget: int, attempt: Attempt, model: ir.Model, shapes: dict[str, tuple[int, int]]
) -> Mixed:
    """Choose for a file of at most `budget` bytes, and round; with less to spend where smoothing made it larger."""
    spare = _smoothing_bytes(model, shapes)
    for _ in range(_ROUNDS):
        found, size, _ = attempt(_fitting(options, budget - spare, model, shapes))
        if size <= budget:
            return found
        spare += size - budget
    raise UserError(f"--max-bytes: no file of at most {budget:,} bytes was found; the last one takes {size:,}")


def _fitting(
    options: Options, budget: int, model: ir.Model, shapes: dict[str, tuple[int, int]]
) -> Mapping[str, Option]:
    """Choose what loses least in a file of `budget` bytes. What is no matrix is estimated, and corrected if too low."""
    chosen, other = smallest(options), 0
    for _ in range(_ROUNDS):
        size = graph_bytes(model, {name: _blank(shapes[name], option.grid) for name, option in chosen.items()})
        if other and size <= budget:
            return chosen
        other = max(other, size - total_bytes(chosen))  # nodes of 8 bits take more than those of 4
        chosen = within_bytes(options, budget - other) or smallest(options)
    return smallest(options)


def _keep_kl(options: Options, budget: float, attempt: Attempt) -> Mixed:
    """Choose for a KL of at most `budget`, and round, until what is measured keeps the budget and uses it up."""
    aim, best, tried = budget, None, []
    for left in reversed(range(_ROUNDS)):
        chosen = closest(options) if best is None and not left else within_kl(options, aim) or closest(options)
        if chosen in tried:
            break
        tried.append(chosen)
        found, size, effect = attempt(chosen)
        if effect.kl_divergence <= budget and (best is None or size < best[1]):
            best = found, size
        if chosen == closest(options) and effect.kl_divergence > budget:
            break
        if effect.kl_divergence <= budget and (effect.kl_divergence >= _USED * budget or chosen == smallest(options)):
            break
        # Halfway between the shares that are used up and that are not, so that the next one is within.
        aim = total_kl(chosen) * budget * (1 + _USED) / 2 / max(effect.kl_divergence, 1e-9)
    if best is None:
        lost = effect.kl_divergence
        unit = 10.0 ** (math.floor(math.log10(lost)) - 1)
        raise UserError(
            f"max_kl is {budget}, and the finest choice of bits loses {lost:.3g} nats; give --max-kl "
            f"{math.ceil(lost / unit) * unit:.2g} or more, or take int8-weight"
        )
    return best[0]


def _details(chosen: Mapping[str, Option], options: Options, effect: Effect) -> dict:
    alone = {name: next(option.kl for option in some if option.grid == BASE) for name, some in options.items()}
    return {
        "predicted_kl": total_kl(chosen),
        "measured_on_calibration": asdict(effect),
        "matrices": {
            name: {
                "bits": option.grid.bits,
                "block": option.grid.block,
                "bytes": option.bytes,
                "kl": option.kl,
                "kl_in_4_bits": alone[name],
            }
            for name, option in chosen.items()
        },
    }
