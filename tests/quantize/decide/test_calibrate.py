"""Calibration: the statistics it keeps, the ranges it chooses from them, the blocks it runs, and what it decides."""

import dataclasses
import itertools

import numpy as np
import onnx_ir as ir
import pytest

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Source, Split, load_splits
from cuantiza.core.inputs.gpt2_config import parse_config
from cuantiza.core.inputs.model_config import read_config
from cuantiza.core.inputs.tokenizer import load_tokenizer
from cuantiza.core.inputs.weights.checkpoint import read_checkpoint
from cuantiza.core.onnx import file as onnx_file
from cuantiza.core.run.divergence import compare
from cuantiza.core.run.runtime import Runtime, open_session
from cuantiza.export.graphs.gpt2 import build
from cuantiza.quantize.decide.activation import ROW_ZERO_POINTS, PerRow, PerTensor
from cuantiza.quantize.decide.blocks import open_block, split
from cuantiza.quantize.decide.calibrate import calibration_windows
from cuantiza.quantize.decide.observations import BINS, SAMPLE_EVERY, Histogram, Moments
from cuantiza.quantize.decide.ranges import RANGES, least_error, min_max, percentile
from cuantiza.quantize.layers import decide
from cuantiza.quantize.recipes.registry import StaticInt8
from cuantiza.quantize.rewrite.find import find_projections
from cuantiza.quantize.rewrite.static import quantize_static
from cuantiza.quantize.settings import Calibration
from lab.checkpoints.hard import make

from helpers import CORPUS, ES_MINI

LITTLE = Calibration(windows=8, tokens=128)
LAYER = ("h.2.attn.c_attn", "h.2.attn.c_proj", "h.2.mlp.c_fc", "h.2.mlp.c_proj")


@pytest.fixture(scope="module")
def splits():
    return load_splits(Source(str(CORPUS)))


@pytest.fixture(scope="module")
def windows(splits):
    """Token windows [8, 128] of the calibration split."""
    return calibration_windows(ES_MINI, splits[0], LITTLE)


@pytest.fixture(scope="module")
def chain(windows, tmp_path_factory):
    """Run es-mini block by block on 4 windows: (blocks, inputs of the linear layers by name, logits)."""
    model, work = graph_of(ES_MINI), tmp_path_factory.mktemp("blocks")
    blocks, inputs, before = split(model.graph), {}, [None] * 4
    for block in blocks:
        names = [projection.x.name for projection in block.projections]
        run = open_block(model, block, [*names, block.end or "logits"], work)
        *columns, before = zip(*itertools.starmap(run, zip(windows[:4], before, strict=True)), strict=True)
        for projection, column in zip(block.projections, columns, strict=True):
            inputs[projection.name] = [x.reshape(-1, x.shape[-1]) for x in column]
    assert not list(work.iterdir())
    return blocks, inputs, before


def graph_of(folder):
    return build(parse_config(read_config(folder), folder), read_checkpoint(folder).weights, 21, folder)


# --- statistics ---


@pytest.mark.parametrize("name", LAYER)
def test_moments_of_parts_are_those_of_the_whole(chain, name):
    parts = chain[1][name]
    x = np.concatenate(parts)
    merged = Moments.of(parts[0], True)
    for part in parts[1:]:
        merged = merged.merge(Moments.of(part, True))
    exact = x.astype(np.float64)
    assert merged.count == len(x) == 512
    assert (merged.low == x.min(axis=0)).all() and (merged.high == x.max(axis=0)).all()
    assert np.abs(merged.mean - exact.mean(axis=0)).max() < 1e-7 * np.abs(exact).max()
    assert relative(merged.gram, exact.T @ exact) < 1e-6
    assert (merged.rows == x[::SAMPLE_EVERY]).all() and (merged.rows[0] == x[0]).all()
    assert Moments.of(x, False).merge(Moments.of(x, False)).gram is None


@pytest.mark.parametrize("name", LAYER)
def test_transformed_moments_are_those_of_transformed_rows(chain, name):
    x = np.concatenate(chain[1][name])
    generator = np.random.default_rng(0)
    scale = (np.abs(x).max(axis=0) ** 0.8 * np.exp(generator.standard_normal(x.shape[1]))).astype(np.float32)
    shift = x.mean(axis=0)
    found, y = Moments.of(x, True).transformed(scale, shift), (x.astype(np.float64) - shift) / scale
    wanted = Moments.of(y, True)
    # The sums are float32, of channels whose mean is up to 7 standard deviations from 0.
    assert relative(found.gram, wanted.gram) < 2e-6
    assert np.abs(found.total - wanted.total).max() < 1e-6 * np.abs(y).sum(axis=0).max()
    for field in ("low", "high", "rows"):
        assert np.abs(getattr(found, field) - getattr(wanted, field)).max() < 1e-6 * np.abs(y).max()
    assert found.count == 512 and found.rows.dtype == np.float32
    assert Moments.of(x, False).transformed(scale, shift).gram is None


def relative(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def test_only_the_sample_of_rows_grows_with_the_text(chain):
    parts = chain[1][LAYER[0]]

    def sizes(moments):
        return {field.name: np.size(getattr(moments, field.name)) for field in dataclasses.fields(moments)}

    one, many = Moments.of(parts[0], True), Moments.of(parts[0], True)
    for index in range(1, 40):
        many = many.merge(Moments.of(parts[index % 4], True))
    before, after = sizes(one), sizes(many)
    assert after.pop("rows") == 40 * before.pop("rows") == 40 * 8 * 256
    assert before == after == {"count": 1, "low": 256, "high": 256, "total": 256, "gram": 256 * 256}
    histogram = Histogram.of(parts[0], -1, 1, np.ones_like(parts[0]))
    assert histogram.merge(histogram).counts.shape == histogram.counts.shape == histogram.weights.shape == (BINS,)


def histogram_of(x, weight=None):
    return Histogram.of(
        x, min(float(x.min()), 0), max(float(x.max()), 0), np.ones_like(x) if weight is None else weight
    )


def test_histograms_of_halves_merge_to_the_whole(chain):
    x = np.concatenate(chain[1]["h.2.mlp.c_proj"])
    weight = np.random.default_rng(0).random(x.shape)
    whole = histogram_of(x, weight)
    halves = [Histogram.of(x[rows], whole.low, whole.high, weight[rows]) for rows in (slice(200), slice(200, None))]
    merged = halves[0].merge(halves[1])
    assert (merged.counts == whole.counts).all() and whole.counts.sum() == x.size
    assert np.allclose(merged.weights, whole.weights, rtol=1e-12) and whole.weights.sum() == pytest.approx(weight.sum())
    assert (merged.low, merged.high) == (whole.low, whole.high) == (x.min(), x.max())
    # The bins are those of NumPy, except that float32 may put a value at the edge of a bin into its neighbour.
    assert np.abs(whole.counts - np.histogram(x, BINS, (whole.low, whole.high))[0]).sum() < 1e-4 * x.size
    assert (np.diff(whole.centers) > 0).all() and whole.centers.mean() == pytest.approx((x.min() + x.max()) / 2)
    outside = Histogram.of(x, -0.01, 0.01, weight)
    assert outside.counts.sum() == x.size
    assert outside.counts[-1] >= (x > 0.01).sum() > 1000 and outside.counts[0] >= (x < -0.01).sum() > 1000


# --- ranges ---


def made(low, high, density, far=0, far_weight=1):
    """A histogram with density(x) elements of weight 1 in each bin, and `far` more of `far_weight` in the last."""
    empty = Histogram(low, high, np.zeros(BINS, np.int64), np.zeros(BINS))
    counts = np.round(density(empty.centers)).astype(np.int64)
    weights = counts.astype(np.float64)
    counts[-1] += far
    weights[-1] += far * far_weight
    return Histogram(low, high, counts, weights)


def normal(x):
    return 1e6 * np.exp(-x * x / 2)


def test_min_max_is_exact(chain):
    for name in LAYER:
        x = np.concatenate(chain[1][name])
        assert min_max(histogram_of(x)) == (x.min(), x.max())


@pytest.mark.parametrize("share", [0.9, 0.99, 0.9999])
def test_percentile_holds_its_share(share, chain):
    for name in LAYER:
        x = np.concatenate(chain[1][name])
        histogram = histogram_of(x)
        low, high = percentile(histogram, share)
        assert histogram.low <= low < high <= histogram.high
        assert ((x >= low) & (x <= high)).mean() >= share - 1e-5  # float32 rounds at the edge of a bin
        width = (histogram.high - histogram.low) / BINS
        # Equal shares lie below and above the range, and a range narrower by one bin would hold too little.
        for beyond, nearer in (((x < low), (x < low + width)), ((x > high), (x > high - width))):
            assert beyond.mean() <= (1 - share) / 2 + 1e-5 and nearer.mean() >= (1 - share) / 2 - 1e-5


@pytest.mark.parametrize("choose", RANGES.values(), ids=RANGES)
def test_ranges_lie_inside_the_whole_one(choose, chain):
    for name in LAYER:
        histogram = histogram_of(np.concatenate(chain[1][name]))
        low, high = choose(histogram)
        assert histogram.low <= low <= 0 <= high <= histogram.high and high - low > 0.05 * (
            histogram.high - histogram.low
        )


@pytest.mark.parametrize("name", ["percentile", "entropy", "mse"])
def test_one_far_element_is_clipped(name):
    """One element 100 standard deviations from millions of normally distributed ones is clipped."""
    low, high = RANGES[name](made(-6, 100, normal, far=1))
    assert -6 <= low < -3 and 3 < high < 10


def test_mse_weighs_errors_by_what_they_cost_the_matmul():
    """The range includes a far element if its error costs as much as all others, and excludes it if it costs nothing.

    A distribution without tails is not clipped at all.
    """
    assert least_error(made(-6, 100, normal, far=1, far_weight=1e8))[1] > 95
    assert least_error(made(-6, 100, normal, far=1, far_weight=0))[1] < 6
    assert least_error(made(-1, 3, lambda x: 0 * x + 1000)) == (-1, 3)


@pytest.mark.parametrize("name", LAYER)
def test_mse_finds_the_range_with_the_least_error(name, chain):
    """The error is measured on the elements themselves, and compared with that of 30 x 30 other ranges."""
    x = np.concatenate(chain[1][name])[::4]

    def error(low, high):
        return float(((PerTensor(low, high).restore(x) - x) ** 2).mean())

    shares = np.geomspace(0.05, 1, 30)
    least = min(error(x.min() * a, x.max() * b) for a, b in itertools.product(shares, shares))
    found, full = error(*least_error(histogram_of(x))), error(x.min(), x.max())
    assert found < 1.1 * least and found <= full * 1.001


@pytest.mark.parametrize("choose", RANGES.values(), ids=RANGES)
def test_a_tensor_of_zeros_has_a_range(choose, recwarn):
    low, high = choose(histogram_of(np.zeros((4, 8), np.float32)))
    scale, zero_point = PerTensor(low, high).parameters
    assert np.isfinite(scale) and scale > 0 and zero_point in range(256) and not recwarn.list


# --- uint8 as ONNX Runtime computes it ---


def through_onnx_runtime(x, scale, zero_point, folder):
    """Compute DequantizeLinear(QuantizeLinear(x)), with a scale per row where `scale` is a vector."""
    source, result = ir.val("x", ir.DataType.FLOAT, x.shape), ir.val("y", ir.DataType.FLOAT, x.shape)
    constants = [ir.val(name, const_value=ir.tensor(value)) for name, value in (("s", scale), ("z", zero_point))]
    axis = {"axis": 0} if np.ndim(scale) else {}
    quantize = ir.node("QuantizeLinear", [source, *constants], axis)
    restore = ir.node("DequantizeLinear", [quantize.outputs[0], *constants], axis, outputs=[result])
    graph = ir.Graph([source], [result], nodes=[quantize, restore], initializers=constants, opset_imports={"": 21})
    onnx_file.save(ir.Model(graph, ir_version=10), folder)
    return open_session(folder / "model.onnx").run(None, {"x": x})[0]


def test_per_tensor_is_what_onnx_runtime_computes(chain, tmp_path):
    # With a scale of 1, every second value lies exactly between two integers.
    halves = np.arange(-200, 200, 0.5, dtype=np.float32).reshape(8, -1)
    whole = PerTensor(-128, 127)
    assert whole.parameters == (1, 128)
    restored = whole.restore(halves)
    assert restored[np.isin(halves, [0.5, 1.5, 2.5, -0.5, -1.5])].tolist() == [-2, 0, 0, 2, 2]
    assert restored.min() == -128 and restored.max() == 127
    assert (through_onnx_runtime(halves, *whole.parameters, tmp_path) == restored).all()
    for name in LAYER:
        x = np.concatenate(chain[1][name])
        for share in (1, 0.3):
            chosen = PerTensor(float(x.min()) * share, float(x.max()) * share)
            assert (through_onnx_runtime(x, *chosen.parameters, tmp_path) == chosen.restore(x)).all()


@pytest.mark.parametrize("zero_point", ROW_ZERO_POINTS)
def test_per_row_is_what_onnx_runtime_computes(zero_point, chain, tmp_path):
    halves = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, 255 - zero_point, 0]], np.float32)
    assert PerRow(zero_point).restore(halves)[0, :5].tolist() == [0, 2, 2, 0, -2]
    for x in (halves, *(np.concatenate(chain[1][name]) for name in LAYER), np.zeros((2, 4), np.float32)):
        below = min(zero_point, 127)
        scale = np.maximum(x.max(axis=1) / (255 - zero_point), -x.min(axis=1) / below).astype(np.float32)
        scale[scale == 0] = 1
        zeros = np.full(len(x), zero_point, np.uint8)
        restored = PerRow(zero_point).restore(x)
        assert (through_onnx_runtime(x, scale, zeros, tmp_path) == restored).all()
        assert (np.abs(restored - x) <= scale[:, None] / 2 * (1 + 1e-4)).all()  # nothing is clipped


# --- blocks ---


def test_blocks_one_after_another_compute_the_model(chain, windows, tmp_path):
    blocks, inputs, logits = chain
    # A block ends where only the residual stream is read later: after attention and after the MLP of each layer. The
    # last block is the head.
    assert len(blocks) == 2 * 6 + 1 and blocks[0].start is None and blocks[-1].end is None
    assert all(before.end == after.start for before, after in itertools.pairwise(blocks))
    assert [len(block.projections) for block in blocks] == [2] * 12 + [1]
    model = graph_of(ES_MINI)
    assert list(inputs) == [projection.name for projection in find_projections(model.graph)]
    onnx_file.save(model, tmp_path)
    whole = Runtime(tmp_path / "model.onnx")
    for window, found in zip(windows, logits, strict=False):
        assert np.abs(found[0] - whole.forward(window[None])[0]).max() < 1e-5


def test_the_value_that_a_block_starts_from_is_not_computed_again(chain, windows, tmp_path):
    """Linear layers without a norm before them read it (OLMo 2). All blocks before would have to run for it."""
    model, block = graph_of(ES_MINI), chain[0][3]
    start = np.random.default_rng(0).standard_normal((1, windows.shape[1], 256)).astype(np.float32)
    inner = block.projections[0].x.name
    found = open_block(model, block, [block.start, inner, block.start], tmp_path)(windows[0], start)
    assert found[0] is found[2] is start
    (alone,) = open_block(model, block, [inner], tmp_path)(windows[0], start)
    assert (found[1] == alone).all() and open_block(model, block, [block.start], tmp_path)(windows[0], start) == [start]


@pytest.mark.parametrize("skips", [False, True])
def test_a_value_that_is_read_again_does_not_end_a_block(skips):
    """The graph is h = E[ids]·A, y = h·B (+ E[ids]), with an embedding matrix E."""
    table, a, b = (ir.val(name, const_value=ir.tensor(np.eye(4, dtype=np.float32))) for name in ("t", "a", "b"))
    ids, logits = ir.val("ids", ir.DataType.INT64, ["n"]), ir.val("logits", ir.DataType.FLOAT, ["n", 4])
    gather = ir.node("Gather", [table, ids])
    first = ir.node("MatMul", [gather.outputs[0], a], name="first")
    second = ir.node("MatMul", [first.outputs[0], b], name="second")
    last = ir.node("Add", [second.outputs[0], gather.outputs[0] if skips else a], outputs=[logits])
    nodes = [gather, first, second, last]
    graph = ir.Graph([ids], [logits], nodes=nodes, initializers=[table, a, b], opset_imports={"": 21})
    found = [[projection.name for projection in block.projections] for block in split(graph)]
    assert found == ([["first", "second"]] if skips else [["first"], ["second"]])


# --- decisions ---


def test_windows_are_full_and_of_the_calibration_split(splits):
    tokens = calibration_windows(ES_MINI, splits[0], Calibration())
    assert tokens.shape == (Calibration().windows, 512) and tokens.dtype == np.int64
    assert splits[0].documents[0][:200] in load_tokenizer(ES_MINI).decode(tokens[0].tolist())
    assert calibration_windows(ES_MINI, splits[0], Calibration(tokens=4096)).shape[1] == 1024  # all its positions
    with pytest.raises(UserError, match=r"CORPUS=.* 0 windows of 128; .* at least 8: give more text, or CORPUS=self"):
        calibration_windows(ES_MINI, Split("short", ("Una frase corta.",)), LITTLE)


def test_markers_of_another_tokenizer_are_named_once(splits, capsys):
    marked = Split("calibration", tuple(f"{text}</s>" for text in splits[0].documents))
    for _ in range(2):
        calibration_windows(ES_MINI, marked, LITTLE)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "calibration documents have </s>, which the model's tokenizer reads as text" in line


def test_min_max_holds_what_the_calibration_showed(windows, tmp_path):
    """The range of the first linear layer is exactly that of its input, the first LayerNorm's output, computed here."""
    model = graph_of(ES_MINI)
    get = lambda name: model.graph.initializers[name].const_value.numpy()  # noqa: E731
    x = get("wte.weight")[windows] + get("wpe.weight")[: windows.shape[1]]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * get("h.0.ln_1.weight") + get(
        "h.0.ln_1.bias"
    )
    decisions = decide(model, windows, StaticInt8("nearest", (), "min-max", 0, LITTLE, max_error=None).plan(), tmp_path)
    found = decisions["h.0.attn.c_attn"].details
    assert found["low"] == pytest.approx(x.min(), rel=1e-4) and found["high"] == pytest.approx(x.max(), rel=1e-4)
    assert len(decisions) == 25 and not any(len(decision.float_channels) for decision in decisions.values())


@pytest.fixture(scope="module")
def sink(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hard") / "sink"
    return folder, make("sink", ES_MINI, folder)


def test_the_neuron_of_a_massive_activation_stays_in_float(sink, windows, splits, tmp_path):
    folder, account = sink
    text = calibration_windows(ES_MINI, splits[1], Calibration(4, 128, 4))

    def logits(model):
        onnx_file.save(model, tmp_path)
        runtime = Runtime(tmp_path / "model.onnx")
        return [runtime.forward(window[None])[0, :-1] for window in text]

    exact, losses = logits(graph_of(folder)), {}
    for limit in (0, 16):
        model = graph_of(folder)
        recipe = StaticInt8("nearest", float_channels=limit, calibration=LITTLE, max_error=None)
        decisions = decide(model, windows, recipe.plan(), tmp_path)
        taken = {
            name: decision.float_channels.tolist()
            for name, decision in decisions.items()
            if len(decision.float_channels)
        }
        quantize_static(model, decisions)
        pairs = zip(exact, logits(model), text, strict=True)
        losses[limit] = np.mean([compare(p, [q], window[1:])[1][1].mean() for p, q, window in pairs])
        if limit == 0:
            assert not taken
    block = f"h.{account.layer}.mlp"
    assert account.neuron in taken[f"{block}.c_proj"] and account.marker in taken[f"{block}.c_fc"]
    assert account.massive in taken[f"h.{account.layer + 1}.attn.c_attn"]
    assert all(len(channels) <= 16 for channels in taken.values()) and "lm_head" not in taken
    decision = decisions[f"{block}.c_proj"]
    assert decision.details["float_channels"] == taken[f"{block}.c_proj"]
    assert decision.activation.high < 30  # the massive activation is 60
    row = decision.float_rows[taken[f"{block}.c_proj"].index(account.neuron)]
    assert (row == read_checkpoint(folder).weights[f"{block}.c_proj.weight"].read()[account.neuron]).all() and row.any()
    assert not decision.weight.q[decision.float_channels].any()
    assert losses[16] < 0.6 * losses[0], losses
