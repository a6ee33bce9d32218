"""Rounding weights to nearest and by GPTQ, tested by properties whose answers are exact or known.

GPTQ is tested by what it promises. Where inputs do not correlate, it is rounding to nearest. Where they do, the error
of the matmul falls: tr(Eᵀ·G·E), with E = Ŵ − W and G = Σ xᵀx.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest

from cuantiza.core.inputs.corpus import Source, load_splits
from cuantiza.core.onnx import file as onnx_file
from cuantiza.quantize.decide.blocks import Block, open_block
from cuantiza.quantize.decide.calibrate import calibration_windows
from cuantiza.quantize.rewrite.find import find_projections
from cuantiza.quantize.settings import Calibration
from cuantiza.quantize.weights import rounding
from cuantiza.quantize.weights.gptq import DAMPING, gptq
from cuantiza.quantize.weights.rounding import (
    NORM,
    PAIR_LIMIT,
    Grid,
    channel_parts,
    choose_scale,
    partners,
    round_to_nearest,
    rounding_noise,
)

from helpers import CORPUS

GRIDS = [Grid(*fields) for fields in itertools.product((8, 4), (None, 16, 64, 48), (True, False))]
FULL = np.ones(1)  # only the whole range is tried: no clipping
INPUTS, CHANNELS = 200, 24  # no block size divides 200, so the last block is shorter
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.bits}-{grid.block}-{grid.symmetric}")


def random_weight(seed=0, inputs=INPUTS, channels=CHANNELS):
    """Make a weight float32 [K, N] with heavy tails, channels of very different size, and one shifted channel."""
    generator = np.random.default_rng(seed)
    weight = generator.standard_t(4, (inputs, channels)) * np.geomspace(1e-3, 1e3, channels)
    weight[:, channels // 2] += 5 * np.abs(weight[:, channels // 2]).max()
    return weight.astype(np.float32)


@cache
def correlated(seed=0, inputs=INPUTS, rank=20):
    """Make the Gram matrix [K, K] of inputs of different size, most of whose variance lies in a few directions."""
    generator = np.random.default_rng(seed)
    hidden = generator.standard_normal((1000, rank)) @ generator.standard_normal((rank, inputs))
    x = (hidden + generator.standard_normal((1000, inputs))) * np.exp(generator.standard_normal(inputs))
    return x.T @ x


def matmul_loss(quantized, weight, gram):
    """Compute tr(Eᵀ·G·E), relative to tr(Wᵀ·G·W)."""
    error = quantized.dequantize().astype(np.float64) - weight
    return np.einsum("kn,kl,ln->", error, gram, error) / np.einsum("kn,kl,ln->", weight, gram, weight, dtype=float)


def spread(quantized, array):
    """Repeat [G, N] for the inputs of each block: [K, N]."""
    return np.repeat(array, quantized.grid.block or len(quantized.q), axis=0)[: len(quantized.q)]


def same(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("q", "scale", "zero_point"))


# --- to nearest ---


@each_grid
def test_nearest_is_within_half_a_scale(grid):
    weight = random_weight()
    quantized = round_to_nearest(weight, grid, FULL)
    error, scale = np.abs(quantized.dequantize() - weight), spread(quantized, quantized.scale)
    assert (error <= scale / 2 * (1 + 1e-4)).all()
    # The scale is as small as the range allows: one end of the range is one end of the grid.
    low, high = grid.limits
    for start in range(0, INPUTS, grid.block or INPUTS):
        rows = quantized.q[start : start + (grid.block or INPUTS)].astype(int)
        assert ((rows.max(axis=0) >= high - 1) | (rows.min(axis=0) <= low + 1)).all()


@each_grid
@pytest.mark.parametrize("method", ["nearest", "gptq"])
def test_shapes_types_and_limits(grid, method):
    weight, groups = random_weight(), -(-INPUTS // (grid.block or INPUTS))
    quantized = round_to_nearest(weight, grid) if method == "nearest" else gptq(weight, correlated(), grid)
    integer = np.int8 if grid.symmetric else np.uint8
    assert quantized.q.shape == weight.shape and quantized.q.dtype == quantized.zero_point.dtype == integer
    assert quantized.scale.shape == quantized.zero_point.shape == (groups, CHANNELS)
    assert quantized.scale.dtype == np.float32 and (quantized.scale > 0).all()
    low, high = grid.limits
    assert (low, high) == {
        (8, True): (-127, 127),
        (4, True): (-8, 7),
        (8, False): (0, 255),
        (4, False): (0, 15),
    }[grid.bits, grid.symmetric]
    assert low <= quantized.q.min() <= low + 1 and quantized.q.max() == high
    assert (quantized.zero_point <= high).all() and not (grid.symmetric and quantized.zero_point.any())
    restored = quantized.dequantize()
    assert restored.shape == weight.shape and restored.dtype == np.float32
    by_hand = (quantized.q.astype(float) - spread(quantized, quantized.zero_point)) * spread(quantized, quantized.scale)
    assert np.allclose(restored, by_hand, rtol=1e-6, atol=0)


@each_grid
@pytest.mark.parametrize("method", ["nearest", "gptq"])
def test_zeros_come_back_as_zeros(grid, method):
    weight = random_weight()
    weight[:, 3] = 0  # a channel
    weight[:64, 5] = 0  # blocks
    weight[::7] = 0  # single weights
    if method == "nearest":
        quantized = round_to_nearest(weight, grid)
        zeros = weight == 0
    else:
        quantized = gptq(weight, correlated(), grid)
        zeros = np.zeros(weight.shape, bool)
        zeros[:, 3] = True  # single zeros need not stay zero: GPTQ adds the errors of other weights to them
    assert zeros.any() and (quantized.dequantize()[zeros] == 0).all()
    assert np.isfinite(quantized.scale).all() and (quantized.scale[:, 3] == 1).all()


@each_grid
def test_clipping_never_loses(grid):
    weight = random_weight()
    clipped, full = round_to_nearest(weight, grid), round_to_nearest(weight, grid, FULL)

    def losses(quantized):
        error = np.abs(quantized.dequantize().astype(np.float64) - weight) ** NORM
        return np.add.reduceat(error, range(0, INPUTS, grid.block or INPUTS), axis=0)

    assert (losses(clipped) <= losses(full) * (1 + 1e-4)).all()
    assert (clipped.scale <= full.scale).all()
    if grid.bits == 4:
        assert losses(clipped).sum(axis=0).mean() < losses(full).sum(axis=0).mean()
        assert (clipped.scale < full.scale).mean() > 0.2


def test_the_best_clip_is_found():
    """The clip for 127 weights up to 1 and one of 1.6, in 4 bits, is that of a brute-force search."""
    rows = np.concatenate([np.linspace(-1, 1, 127), [1.6]]).astype(np.float32)[:, None]
    grid = Grid(4)

    def loss(scale):
        return float((np.abs(np.rint(rows / scale).clip(-8, 7) * scale - rows) ** NORM).sum())

    (scale,), (zero,) = choose_scale(rows, grid)
    best = min((1.6 / 7 * clip for clip in rounding.CLIPS), key=loss)
    assert scale == pytest.approx(best, rel=1e-6) and zero == 0 and best < 1.6 / 7


def test_channels_at_a_time_change_nothing(monkeypatch):
    weight, grid, gram = random_weight(), Grid(4, 48, False), correlated()
    nearest, by_gptq = round_to_nearest(weight, grid), gptq(weight, gram, grid)
    monkeypatch.setattr(rounding, "_AT_ONCE", 7 * grid.block)
    monkeypatch.setattr("cuantiza.quantize.weights.gptq._WIDE", 7)
    assert same(round_to_nearest(weight, grid), nearest)
    # The kernels of BLAS differ in a last bit for matrices of other widths, which may move a weight to the next integer.
    moved = np.abs(gptq(weight, gram, grid).q.astype(int) - by_gptq.q)
    assert moved.max() <= 1 and (moved > 0).mean() < 0.001


@each_grid
def test_the_noise_that_rounding_is_expected_to_make(grid):
    """For uniform weights, the squared error of each input over 4,000 channels is what step²/12 predicts."""
    weight = np.random.default_rng(0).uniform(-1, 1, (160, 4000)).astype(np.float32)
    weight[:, ::2] *= 10
    measured = ((round_to_nearest(weight, grid, FULL).dequantize() - weight) ** 2).sum(axis=1)
    assert rounding_noise(weight, grid) == pytest.approx(measured, rel=0.15)


# --- GPTQ ---


@each_grid
@pytest.mark.parametrize("spread_of_inputs", [0, 3])
def test_gptq_of_inputs_that_do_not_correlate_is_to_nearest(grid, spread_of_inputs):
    """No other weight can compensate an error, and the order by size (with per-channel scales) must not matter."""
    weight = random_weight()
    sizes = 7 * np.exp(spread_of_inputs * np.random.default_rng(1).standard_normal(INPUTS))
    assert same(gptq(weight, np.diag(sizes), grid), round_to_nearest(weight, grid))


@each_grid
def test_gptq_lowers_the_error_of_the_matmul(grid):
    weight, gram = random_weight(), correlated()
    by_gptq, nearest = gptq(weight, gram, grid), round_to_nearest(weight, grid)
    assert matmul_loss(by_gptq, weight, gram) < 0.5 * matmul_loss(nearest, weight, gram)


@pytest.mark.parametrize("block", [None, 48, 100, 160])
def test_lazy_updates_change_nothing(block, monkeypatch):
    """The result does not depend on how many rows GPTQ updates at once, even where a block needs later rows early."""
    weight, gram, grid = random_weight(inputs=300), correlated(inputs=300), Grid(4, block, False)
    before = gptq(weight, gram, grid)
    for rows in (1, 7, 1000):
        monkeypatch.setattr("cuantiza.quantize.weights.gptq._LAZY_ROWS", rows)
        after = gptq(weight, gram, grid)
        # The sums are the same in another order, which changes the last digits of float32.
        assert np.allclose(after.scale, before.scale, rtol=1e-5, atol=0) and (after.q == before.q).mean() > 0.999
        assert (after.zero_point == before.zero_point).all()


@pytest.mark.parametrize("grid", [Grid(8), Grid(4, 64, False)], ids=str)
def test_dead_inputs_and_no_inputs_at_all(grid):
    """The weights of an input that is always 0 are rounded to nearest, and do not affect the others."""
    weight, gram = random_weight(), correlated().copy()
    dead = [0, 17, 18, 199]
    gram[dead], gram[:, dead] = 0, 0
    quantized = gptq(weight, gram, grid)
    restored, scale = quantized.dequantize(), spread(quantized, quantized.scale)
    assert np.isfinite(restored).all()
    low, high = grid.limits
    inside = (quantized.q[dead] > low) & (quantized.q[dead] < high)
    assert inside.any() and (np.abs(restored - weight)[dead][inside] <= scale[dead][inside] / 2 * (1 + 1e-4)).all()
    alive = [row for row in range(INPUTS) if row not in dead]
    if grid.block is None:
        rest = gptq(weight[alive], gram[np.ix_(alive, alive)], grid)
        changed = (rest.q != quantized.q[alive]).mean()
        # Dead inputs have a small effect: they count in the mean for the damping, and may have the largest weight,
        # which decides the scale.
        assert changed < 0.02
    assert same(gptq(weight, np.zeros_like(gram), grid), round_to_nearest(weight, grid))


def test_a_pair_of_weights_by_brute_force():
    """Of two inputs, the one with more energy is rounded to nearest, the other to the best of all 16 integers.

    The best is judged by the damped Hessian, so the pair is never worse than rounding both to nearest.
    """
    generator, grid, better = np.random.default_rng(0), Grid(4), 0
    for _ in range(200):
        weight = generator.standard_normal((2, 1)).astype(np.float32)
        x = generator.standard_normal((50, 1)) * [2, 3] + generator.standard_normal((50, 2)) * 0.5
        gram = x.T @ x
        damped = gram + DAMPING * gram.diagonal().mean() * np.eye(2)
        quantized, nearest = gptq(weight, gram, grid), round_to_nearest(weight, grid)
        first = int(np.argmax(gram.diagonal()))
        assert quantized.scale == nearest.scale and quantized.q[first] == nearest.q[first]

        def loss(q, weight=weight, scale=float(nearest.scale[0, 0]), damped=damped):
            error = np.asarray(q, np.float64).ravel() * scale - weight.ravel()
            return error @ damped @ error

        pairs = [np.insert([q], first, nearest.q[first, 0]) for q in range(-8, 8)]
        assert loss(quantized.q) <= min(map(loss, pairs)) * (1 + 1e-3) + 1e-9
        better += loss(quantized.q) < 0.9 * loss(nearest.q)
    assert better > 5  # this is rare, because the larger weight is exactly on the grid


@pytest.fixture(scope="module")
def real_layers(es_mini_fp32, tmp_path_factory):
    """{name of a linear layer: (weight, Gram matrix of the calibration split, Gram matrix of the test split)}."""
    model = onnx_file.load(es_mini_fp32.path / "model.onnx")
    names = ("h.2.attn.c_attn", "h.2.mlp.c_fc")
    found = {projection.name: projection for projection in find_projections(model.graph)}
    inputs = [found[name].x.name for name in names]
    run = open_block(model, Block(None, None, ()), inputs, tmp_path_factory.mktemp("layers"))
    grams = []
    for part in load_splits(Source(str(CORPUS))):
        rows = [run(window, None) for window in calibration_windows(es_mini_fp32.path, part, Calibration(8, 256, 8))]
        grams.append([sum(x[0].T @ x[0] for x in column) for column in zip(*rows, strict=True)])
    weights = [found[name].weight.const_value.numpy() for name in names]
    return dict(zip(names, zip(weights, *grams, strict=True), strict=True))


@pytest.mark.parametrize("grid", [Grid(8), Grid(4, 64, False)], ids=str)
@pytest.mark.parametrize("name", ["h.2.attn.c_attn", "h.2.mlp.c_fc"])
def test_gptq_on_a_real_layer(real_layers, name, grid):
    """GPTQ has about an eighth of the error of rounding to nearest, also on text that it has not seen."""
    weight, seen, unseen = real_layers[name]
    by_gptq, nearest = gptq(weight, seen, grid), round_to_nearest(weight, grid)
    ratios = [matmul_loss(by_gptq, weight, gram) / matmul_loss(nearest, weight, gram) for gram in (seen, unseen)]
    assert max(ratios) < 0.25, ratios  # measured: 0.07 to 0.14


# --- pairs ---


@pytest.mark.parametrize("method", ["nearest", "gptq"])
@pytest.mark.parametrize("kept", ["all", "some"])
def test_pairs_stay_within_their_limit_and_lose_less_than_7_bits(method, kept):
    """Of weights whose large ones are neighbours; a pair is that of the matmul's inputs, also where some are left out."""
    generator = np.random.default_rng(0)
    inputs = np.arange(INPUTS) if kept == "all" else np.delete(np.arange(INPUTS), [3, 10, 11, 120])
    weight = generator.standard_normal((INPUTS, CHANNELS)).astype(np.float32)[inputs]
    gram = correlated()[np.ix_(inputs, inputs)]

    def rounded(grid):
        return (
            round_to_nearest(weight, grid, inputs=inputs) if method == "nearest" else gptq(weight, gram, grid, inputs)
        )

    found = rounded(Grid(8, pairs=True))
    whole = np.zeros((INPUTS, CHANNELS), int)
    whole[inputs] = found.q
    largest = np.abs(whole.reshape(-1, 2, CHANNELS).sum(axis=1)).max()
    assert largest == PAIR_LIMIT and np.abs(found.q.astype(int)).max() <= 127
    free, coarse = (matmul_loss(rounded(grid), weight, gram) for grid in (Grid(8), Grid(7)))
    assert np.abs(rounded(Grid(8)).q.astype(int).reshape(-1, 2, CHANNELS).sum(axis=1)).max() > PAIR_LIMIT
    assert free < matmul_loss(found, weight, gram) < 0.6 * coarse


def test_weights_without_large_neighbours_are_rounded_as_without_the_limit():
    weight = random_weight()
    weight[1::2] = 0
    assert same(*(round_to_nearest(weight, Grid(8, pairs=pairs), FULL) for pairs in (True, False)))


def test_partners():
    assert list(partners(np.arange(4))) == [1, 0, 3, 2]
    assert list(partners(np.array([0, 2, 3, 7]))) == [-1, 2, 1, -1]


def test_parts_cover_all_channels():
    for channels, size in itertools.product(range(1, 40), (1, 2, 3, 7)):
        parts = channel_parts(channels, size)
        assert [channel for part in parts for channel in range(part.start, part.stop)] == list(range(channels))
        assert channels == 1 or min(part.stop - part.start for part in parts) > 1


@pytest.mark.parametrize("pairs", [True, False])
def test_threads_and_parts_change_nothing(monkeypatch, pairs):
    weight, gram, grid = random_weight(), correlated(), Grid(8, pairs=pairs)
    whole = gptq(weight, gram, grid)
    monkeypatch.setattr("cuantiza.quantize.weights.gptq._NARROW", 7)
    monkeypatch.setattr(rounding, "_AT_ONCE", 3 * INPUTS)
    with ThreadPoolExecutor(3) as pool:
        parts = gptq(weight, gram, grid, each=pool.map)
    # A matmul of fewer channels may add up in another order, and such a bit can change which way a weight is rounded.
    assert np.array_equal(parts.scale, whole.scale) and (parts.q != whole.q).mean() < 0.01
