"""int-mixed on a tiny checkpoint: budgets in bytes and in KL are kept, told apart, and refused where they cannot be."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Source, load_splits
from cuantiza.core.onnx import file as onnx_file
from cuantiza.core.store.artifact import Artifact
from cuantiza.core.store.user_cache import OFF, VARIABLE
from cuantiza.export.stage import export
from cuantiza.quantize import mixed, stage
from cuantiza.quantize.decide.calibrate import calibration_windows
from cuantiza.quantize.inspect.sensitivity import Gauge
from cuantiza.quantize.recipes.budget.int_mixed import MixedWeightOnly, bytes_of
from cuantiza.quantize.recipes.registry import RECIPES, DynamicInt8
from cuantiza.quantize.rewrite.weight_only import quantize_weights
from cuantiza.quantize.settings import Calibration
from cuantiza.quantize.stage import Wanted, opened, quantize_all, with_bits_budget
from cuantiza.quantize.weights.follow import with_embedding
from cuantiza.quantize.weights.gptq import descend
from cuantiza.quantize.weights.rounding import Grid, round_to_nearest

from helpers import CORPUS, copy_tokenizer, tiny_llama

LITTLE = Calibration(windows=10, tokens=64, minimum=10)


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache would know for one test what was measured in another."""
    monkeypatch.setenv(VARIABLE, OFF)


@pytest.fixture(scope="module")
def split():
    return load_splits(Source(str(CORPUS)))[0]


@pytest.fixture(scope="module")
def fp32(tiny_folder, tmp_path_factory) -> Path:
    return export(tiny_folder, tmp_path_factory.mktemp("artifacts")).path


@pytest.fixture
def make(fp32, split, tmp_path):
    """`make(name, **budget)` returns (bytes of the file, details of the manifest, the graph)."""

    def call(name: str, target: str = "portable", **budget: object) -> tuple[int, dict, ir.Model]:
        (work := tmp_path / name).mkdir()
        details = MixedWeightOnly(**budget, target=target, calibration=LITTLE).make(fp32, work, split)
        assert not [path.name for path in work.iterdir() if path.is_dir()]  # no temporary folder is left
        return (work / "model.onnx").stat().st_size, details, onnx_file.load(work / "model.onnx")

    return call


def integers(model: ir.Model) -> dict[str, np.ndarray]:
    kinds = (ir.DataType.UINT4, ir.DataType.INT8, ir.DataType.UINT8)
    stored = model.graph.initializers.items()
    return {name: value.const_value.numpy() for name, value in stored if "_int" in name and value.dtype in kinds}


def test_a_budget_in_bytes_is_kept_and_used_up(make, fp32):
    whole = (fp32 / "model.onnx").stat().st_size
    size, details, model = make("small", max_bytes="0.19x")
    assert 0.95 * 0.19 * whole < size <= 0.19 * whole
    found = details["mixed"]
    assert found["predicted_kl"] > 0 and found["measured_on_calibration"]["kl_divergence"] > 0
    assert {part["bits"] for part in found["matrices"].values()} == {4, 8}
    assert len(found["matrices"]) == 2 * 4 + 2
    for name, part in found["matrices"].items():
        assert f"{name}_int{part['bits']}" in model.graph.initializers
        assert part["kl"] > 0 and (part["bits"] == 8) == (part["kl"] < 0.1 * part["kl_in_4_bits"])

    larger, more, _ = make("large", max_bytes=str(int(0.2 * whole)))
    assert size < larger <= 0.2 * whole and more["mixed"]["predicted_kl"] < found["predicted_kl"]

    fast, again, graph = make("fast", "ort", max_bytes="0.19x")
    assert fast <= 0.19 * whole and again["mixed"] == found
    assert {node.op_type for node in graph.graph} >= {"MatMulNBits", "GatherBlockQuantized", "GroupQueryAttention"}
    q, packed = (integers(one)["wte.weight_int4"] for one in (model, graph))
    assert np.array_equal(q[:, ::2].astype(np.uint8) | q[:, 1::2].astype(np.uint8) << 4, packed.reshape(len(q), -1))


def test_both_forms_spend_the_budget_once(fp32, tmp_path, monkeypatch, capfd):
    """In one command, or where the portable form lies beside it, the other form has the bytes that it has alone."""
    forms = {
        name: MixedWeightOnly("0.19x", target=target, calibration=LITTLE)
        for name, target in (("mine", "portable"), ("mine-ort", "ort"))
    }

    def make(folder: str, *names: str) -> list[Artifact]:
        wanted = [Wanted(tmp_path / folder / name, name, forms[name]) for name in names]
        with opened(fp32, tmp_path / folder) as parent:
            return quantize_all(parent, wanted, Source(str(CORPUS)))

    alone = [*make("portable", "mine"), *make("ort", "mine-ort")]
    assert capfd.readouterr().err.count("sensitivity:") == 2
    make("later", "mine")
    assert capfd.readouterr().err.count("sensitivity:") == 1
    later = make("later", "mine", "mine-ort")
    assert capfd.readouterr().err.count("sensitivity:") == 0
    monkeypatch.setattr(stage, "_make", lambda *_: pytest.fail("a form is made alone"))
    together = make("together", "mine", "mine-ort")
    assert capfd.readouterr().err.count("sensitivity:") == 1
    for found in (later, together):
        for one, other in zip(found, alone, strict=True):
            assert one.digest == other.digest and one.manifest == other.manifest


def test_another_budget_takes_what_was_measured_for_the_first(make, monkeypatch, tmp_path, capfd):
    budgets = {"first": {"max_bytes": "0.19x"}, "second": {"max_bytes": "0.2x"}, "third": {"max_kl": 0.02}}
    alone = {name: make(f"{name}-alone", **budget) for name, budget in budgets.items()}
    assert capfd.readouterr().err.count("sensitivity:") == 3
    monkeypatch.setenv(VARIABLE, str(tmp_path / "caches"))
    for name, budget in budgets.items():
        size, details, _ = make(name, **budget)
        printed = capfd.readouterr().err
        assert printed.count("sensitivity:") == (name == "first")
        assert printed.count("known from an earlier budget") == (name != "first")
        assert (size, details) == alone[name][:2]
        files = [(tmp_path / folder / "model.onnx").read_bytes() for folder in (name, f"{name}-alone")]
        assert files[0] == files[1]


def test_a_budget_in_kl_is_kept_with_fewer_bytes_than_8_bits(make, fp32):
    size, details, _ = make("loose", max_kl=0.02)
    assert 0.01 < details["mixed"]["measured_on_calibration"]["kl_divergence"] <= 0.02
    assert 0.15 < size / (fp32 / "model.onnx").stat().st_size < 0.29


def test_budgets_that_nothing_keeps_are_refused_with_the_least(make, fp32, split, tmp_path):
    with pytest.raises(
        UserError, match=r"max_bytes are .* the smallest file .* takes [\d,]+; give --max-bytes ([\d.]+)MB or more"
    ) as told:
        make("tiny", max_bytes="0.1x")
    least = re.search(r"--max-bytes ([\d.]+MB)", str(told.value))[1]
    assert make("least", max_bytes=least)[0] <= bytes_of(least, 0)
    with pytest.raises(
        UserError, match=r"max_kl is 1e-09, .* give --max-kl ([\d.e-]+) or more, .* int8-weight"
    ) as told:
        make("exact", max_kl=1e-9)
    make("advised", max_kl=float(re.search(r"--max-kl ([\d.e-]+)", str(told.value))[1]))


def test_head_and_embedding_of_their_own(split, tmp_path):
    """In a Llama whose head is not tied, both get bits of their own, and so do the layers that read one tensor."""
    tiny_llama(num_hidden_layers=1, tie_word_embeddings=False).save_pretrained(tmp_path / "llama")
    copy_tokenizer(tmp_path / "llama")
    fp32 = export(tmp_path / "llama", tmp_path / "artifacts")
    (work := tmp_path / "work").mkdir()
    found = MixedWeightOnly("0.19x", calibration=LITTLE).make(fp32.path, work, split)["mixed"]
    assert (work / "model.onnx").stat().st_size <= 0.19 * fp32.model.stat().st_size
    assert len(found["matrices"]) == 7 + 2 and {part["bits"] for part in found["matrices"].values()} == {4, 8}


def test_predictions_come_true(fp32, split, tmp_path):
    """The size of a graph of blank matrices is that of the file, and the KL of matrices adds up."""
    windows = calibration_windows(fp32, split, LITTLE)
    model = onnx_file.load(fp32 / "model.onnx")
    shapes = mixed.matrix_shapes(model.graph)
    assert shapes["h.0.attn.c_attn.weight"] == (32, 96) and shapes["wte.weight"] == (32, 8192)
    grids = {name: mixed.grids_for(shape[0])[place % 3] for place, (name, shape) in enumerate(shapes.items())}
    weights = {}
    for name, shape in shapes.items():
        array = model.graph.initializers[name].const_value.numpy()
        weights[name] = round_to_nearest(array if array.shape == shape else array.T, grids[name])
    sizes = []
    for target in ("portable", "ort"):
        quantize_weights(copy := model.clone(), weights, target)
        onnx_file.save(copy, tmp_path)
        sizes.append((tmp_path / "model.onnx").stat().st_size)
        assert onnx_file.saved_bytes(copy) == sizes[-1]
    blank = {name: mixed._blank(shape, grids[name]) for name, shape in shapes.items()}
    assert mixed.graph_bytes(model, blank) == mixed.graph_bytes(model, weights) == max(sizes)

    gauge = Gauge(fp32 / "model.onnx", windows, tmp_path)
    four = {name: round_to_nearest(weights[name].dequantize(), Grid(4, 16, False, 8)) for name in shapes}
    alone = [gauge.effect(model, {name: weight}, mixed._portable).kl_divergence for name, weight in four.items()]
    assert gauge.effect(model, four, mixed._portable).kl_divergence == pytest.approx(sum(alone), rel=0.25)


def test_a_shared_matrix_is_rounded_for_both():
    """The embedding's error falls by far more than the head's rises."""
    generator = np.random.default_rng(0)
    x = (generator.standard_normal((600, 64)) @ generator.standard_normal((64, 64))).astype(np.float32)
    weight, gram, power = generator.standard_normal((64, 200)).astype(np.float32), x.T @ x, np.ones(64, np.float32)
    rounded = [descend(weight, matrix, Grid(4, 32, False, 8)) for matrix in (gram, with_embedding(gram, power))]
    errors = [one.dequantize() - weight for one in rounded]
    embedding = [np.square(error).sum() for error in errors]
    head = [np.square(x @ error).sum() for error in errors]
    assert embedding[1] < 0.5 * embedding[0] and head[0] < head[1] < 1.5 * head[0]


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ("5MB", 5_000_000),
        ("4900kB", 4_900_000),
        ("0.16x", 160),
        ("1.5gb", 1_500_000_000),
        ("123", 123),
        (" 1 KB", 1000),
    ],
)
def test_sizes(size, wanted):
    assert bytes_of(size, 1000) == wanted


def test_options_of_the_command():
    recipes = {"mine": DynamicInt8(), "int-mixed": RECIPES["int-mixed"]}
    changed = with_bits_budget(recipes, None, 0.01)
    assert changed["mine"] == recipes["mine"] and list(changed) == list(recipes)
    assert changed["int-mixed"] == replace(recipes["int-mixed"], max_bytes=None, max_kl=0.01)
    assert with_bits_budget(recipes, "5MB", None)["int-mixed"].max_bytes == "5MB"
    for budget, fragment in (
        (("5MB", 0.1), "two budgets"),
        (("five", None), "--max-bytes five: .*5MB"),
        ((None, -1.0), "--max-kl -1.0: .*above 0"),
    ):
        with pytest.raises(UserError, match=fragment):
            with_bits_budget(recipes, *budget)
    with pytest.raises(UserError, match="none of mine has such a budget; add int-mixed"):
        with_bits_budget({"mine": DynamicInt8()}, "5MB", None)


@pytest.mark.parametrize(("matrices", "measured"), [(26, 5), (50, 5), (97, 2), (211, 2)])
def test_the_more_matrices_the_fewer_windows_measure_each(matrices, measured):
    windows = np.arange(40)[:, None]
    found = mixed.choosing_windows(windows, matrices)
    assert len(found) == measured and not set(found.ravel()) & set(windows[1 :: mixed.EVERY].ravel())
    assert len(mixed.choosing_windows(windows[:3], matrices)) == 1
