"""Rounding by coordinate descent, and following the rounded model: no step raises the error, and errors are made up for."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from cuantiza.core.inputs.corpus import Source, load_splits
from cuantiza.core.inputs.gpt2_config import parse_config
from cuantiza.core.inputs.model_config import read_config
from cuantiza.core.inputs.weights.checkpoint import read_checkpoint
from cuantiza.export.graphs.gpt2 import build
from cuantiza.quantize.decide.blocks import open_block, split
from cuantiza.quantize.decide.calibrate import calibration_windows
from cuantiza.quantize.layers import decide
from cuantiza.quantize.recipes.registry import RECIPES
from cuantiza.quantize.rewrite.weight_only import choose_weights
from cuantiza.quantize.settings import Calibration
from cuantiza.quantize.weights import gptq
from cuantiza.quantize.weights.gptq import DAMPING, descend, regression
from cuantiza.quantize.weights.rounding import STEPS, Grid, round_to_nearest

from helpers import CORPUS, ES_MINI

GRIDS = [Grid(4, 16, False, 8), Grid(4, 48, True, 8), Grid(4, 64, False), Grid(4, None, True), Grid(8, 32, False)]
INPUTS, CHANNELS = 200, 24  # no block size divides 200
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


@pytest.fixture(scope="module")
def layer():
    """(weight [K, N] with heavy tails, inputs [R, K] that correlate and are of different size)."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((1000, 20)) @ generator.standard_normal((20, INPUTS))
    x = (x + generator.standard_normal(x.shape)) * np.exp(generator.standard_normal(INPUTS))
    return generator.standard_t(4, (INPUTS, CHANNELS)).astype(np.float32), x.astype(np.float32)


def losses(weight, rounded, gram):
    """The error of each channel that GPTQ and the descent lower, with the damped Hessian."""
    hessian = gram + DAMPING * gram.diagonal().mean() * np.eye(len(gram))
    error = rounded.dequantize().astype(np.float64) - weight
    return np.einsum("kn,kl,ln->n", error, hessian, error)


@each_grid
def test_no_channel_is_worse_than_by_gptq(grid, layer):
    weight, x = layer
    gram = x.T @ x
    before, after = (losses(weight, method(weight, gram, grid), gram) for method in (gptq.gptq, descend))
    assert (after <= before * (1 + 1e-4)).all() and after.sum() < 0.99 * before.sum()


@each_grid
def test_no_pass_raises_the_error(grid, layer, monkeypatch):
    weight, x = layer
    gram = x.T @ x
    found = []
    for passes in range(4):
        monkeypatch.setattr(gptq, "_PASSES", passes)
        found.append(losses(weight, descend(weight, gram, grid), gram))
    assert all((after <= before * (1 + 1e-4)).all() for before, after in itertools.pairwise(found))
    assert found[1].sum() < found[0].sum()


@pytest.mark.parametrize("scale_bits", [8, 32])
def test_weights_on_the_grid_stay_as_they_are(scale_bits, layer):
    generator = np.random.default_rng(1)
    q = generator.integers(0, 16, (INPUTS, CHANNELS))
    q[::40], q[1::40] = 0, 15  # each block spans all integers
    multiples = generator.integers(100, STEPS + 1, (INPUTS // 40, CHANNELS))
    multiples[0] = STEPS
    scale = np.repeat(multiples * np.float32(0.001), 40, axis=0)
    weight = ((q - 7) * scale).astype(np.float32)
    for method in (descend, gptq.gptq):
        rounded = method(weight, layer[1].T @ layer[1], Grid(4, 40, False, scale_bits))
        assert (rounded.q == q).all() and np.allclose(rounded.dequantize(), weight, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", ["nearest", "gptq", "descent"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_byte_stores_each_scale(method, symmetric, layer):
    weight, x = layer[0].copy(), layer[1]
    weight[:, 3], weight[:16, 5] = 0, 0
    grid = Grid(4, 16, symmetric, 8)
    round_by = {"nearest": lambda w, _, g: round_to_nearest(w, g), "gptq": gptq.gptq, "descent": descend}[method]
    rounded = round_by(weight, x.T @ x, grid)
    multiples = np.rint(rounded.scale / rounded.step)
    assert (multiples * rounded.step == rounded.scale).all()
    assert multiples.min() >= 1 and multiples.max() <= STEPS
    assert (rounded.dequantize()[:, 3] == 0).all() and rounded.scale.dtype == np.float32


def test_threads_change_nothing(layer, monkeypatch):
    weight, x = layer
    monkeypatch.setattr(gptq, "_PART", 7)
    alone = descend(weight, x.T @ x, Grid(4, 16, False, 8))
    with ThreadPoolExecutor(3) as pool:
        shared = descend(weight, x.T @ x, Grid(4, 16, False, 8), each=pool.map)
    for name in ("q", "scale", "zero_point", "step"):
        assert np.array_equal(getattr(alone, name), getattr(shared, name))


def test_a_layer_makes_up_for_what_its_inputs_lost(layer):
    """The inputs have lost a part that the others still tell; a regression gives these weights that bring it back."""
    weight, x = layer
    y = x.copy()
    y[:, ::10] *= 0.9
    gram, missing = y.T @ y, y.T @ ((x - y) @ weight)
    errors = [
        np.linalg.norm(y @ descend(better, gram, Grid(4, 16, False, 8)).dequantize() - x @ weight)
        for better in (weight + regression(gram, missing, DAMPING), weight)
    ]
    assert errors[0] < 0.5 * errors[1]


def test_huge_inputs_round_to_nearest(layer):
    gram = np.full((INPUTS, INPUTS), np.inf, np.float32)
    rounded, nearest = descend(layer[0], gram, GRIDS[0]), round_to_nearest(layer[0], GRIDS[0])
    assert np.array_equal(rounded.q, nearest.q)


# --- es-mini ---


def graph_of(folder):
    return build(parse_config(read_config(folder), folder), read_checkpoint(folder).weights, 21, folder)


def test_a_layer_that_is_quantized_alone_makes_up_for_no_other():
    plans = {name: RECIPES[name].plan() for name in ("int4-weight", "int8-dynamic")}
    assert plans["int4-weight"].alone() == replace(plans["int4-weight"], rounding="gptq")
    assert plans["int8-dynamic"].alone() == plans["int8-dynamic"]


def test_the_rounded_model_stays_closer_to_the_fp32_model(tmp_path):
    """After the first layer, on text that did not calibrate."""
    test, calibration = (
        calibration_windows(ES_MINI, part, Calibration(8, 256, 8)) for part in load_splits(Source(str(CORPUS)))[::-1]
    )
    recipe = replace(RECIPES["int4-weight"], smoothing=())
    plain = graph_of(ES_MINI)
    end = split(plain.graph)[1].end

    def residual(model):
        whole = replace(split(model.graph)[0], end=end)
        run = open_block(model, whole, [end], tmp_path)
        return np.concatenate([run(window, None)[0] for window in test[:3]])

    def distance(recipe):
        model = graph_of(ES_MINI)
        decisions = decide(model, calibration, recipe.plan(), tmp_path, "h.0.mlp.c_proj")
        for name, weight in choose_weights(model, decisions, Grid(8)).items():
            if weight.grid.bits == 4:
                model.graph.initializers[name].const_value = ir.tensor(weight.dequantize(), name=name)
        return float(np.square(residual(model) - wanted).sum())

    wanted = residual(plain)
    assert distance(recipe) < 0.9 * distance(replace(recipe, rounding="gptq"))
