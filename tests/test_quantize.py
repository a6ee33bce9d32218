"""Int8 arithmetic, the rewritten graphs, and the quantize stage on the embedded model."""

import json

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from conftest import CORPUS, assert_user_error, stage

from core import onnx_file
from core.artifact import open_artifact
from core.corpus import Source, Split, full_windows, load_splits, stream
from core.runtime import Runtime
from core.tokenizer import encode, load_tokenizer
from quantize.calibrate import Range, calibration_windows
from quantize.dynamic import quantize_dynamic
from quantize.int8 import activation_parameters, quantize_weight
from quantize.recipes import Calibration
from quantize.sites import find_projections
from quantize.static import quantize_static

OURS = ("int8-dynamic", "int8-static")
PROJECTIONS, LAYERS = 4 * 6 + 1, 6


@pytest.fixture(scope="module")
def artifacts(es_mini_fp32):
    """Folder with the fp32, int8 and ONNX Runtime's own artifacts of es-mini, made by the command."""
    folder = es_mini_fp32.path.parent
    result = stage("quantize", "--output", folder.parent, "--recipes", *OURS, "ort-dynamic", "ort-static")
    assert result.status == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def windows(artifacts):
    """Token windows [8, 128] of the test split."""
    tokenizer = load_tokenizer(artifacts / "fp32")
    return full_windows(stream(encode(tokenizer, load_splits(Source(str(CORPUS)))[1].documents[:3]), 0), 128)[:8]


@pytest.mark.parametrize("axis", [0, 1])
def test_a_weight_comes_back_within_half_a_scale(axis):
    weight = np.random.default_rng(axis).standard_normal((5000, 7)).astype(np.float32) * 10 ** np.arange(
        -3.0, 4.0, dtype=np.float32
    )
    quantized, scale = quantize_weight(weight, axis)
    spread = np.expand_dims(scale, 1 - axis)
    assert quantized.dtype == np.int8 and np.abs(quantized).max(axis=1 - axis).min() == 127
    assert (np.abs(quantized * spread - weight) <= spread / 2 * (1 + 1e-5)).all()


def test_a_channel_of_zeros_stays_zero():
    weight = np.ones((4, 3), np.float32)
    weight[:, 1] = 0
    quantized, scale = quantize_weight(weight, 1)
    assert np.isfinite(scale).all() and (quantized[:, 1] == 0).all()


@pytest.mark.parametrize("low, high", [(-1.0, 3.0), (0.5, 2.0), (-7.0, -2.0), (0.0, 0.0), (-1e-30, 1e30)])
def test_zero_is_exact_and_the_range_is_covered(low, high):
    scale, zero_point = activation_parameters(low, high)
    assert scale > 0 and np.isfinite(scale)
    ends = (np.array([0, 255]) - float(zero_point)) * scale
    assert ends[0] <= min(low, 0) + scale / 2 and ends[1] >= max(high, 0) - scale / 2


@pytest.mark.parametrize("name", OURS)
def test_everything_is_quantized_and_stored_once(artifacts, name):
    model = onnx_file.load(artifacts / name / "model.onnx")
    weights = model.graph.initializers.values()
    assert {node.domain for node in model.graph} == {""}
    assert not [value.name for value in weights if value.dtype == ir.DataType.FLOAT and len(value.shape) > 1]
    assert [
        value.name for value in weights if value.dtype == ir.DataType.INT8 and list(value.shape) == [8192, 256]
    ] == ["wte.weight_int8"]
    assert (artifacts / name / "model.onnx").stat().st_size <= 0.27 * (artifacts / "fp32/model.onnx").stat().st_size
    onnx.checker.check_model(str(artifacts / name / "model.onnx"), full_check=True)
    details = open_artifact(artifacts / name).manifest.details
    assert len(details["quantized"]["projections"]) == PROJECTIONS and details["quantized"]["embeddings"] == [
        "wte",
        "wpe",
    ]
    kept = {item["operator"]: item["count"] for item in details["left_in_float"] if "operator" in item}
    assert kept["LayerNormalization"] == 2 * LAYERS + 1 and kept["Softmax"] == kept["Gelu"] == LAYERS
    assert kept["MatMul"] == 2 * LAYERS and "Gather" not in kept  # attention's products; both look-ups are quantized
    assert all(item["reason"] for item in details["left_in_float"])


@pytest.mark.parametrize("name", OURS)
def test_stored_weights_are_the_checkpoints(artifacts, name):
    before = onnx_file.load(artifacts / "fp32/model.onnx").graph.initializers
    after = onnx_file.load(artifacts / name / "model.onnx").graph.initializers
    for weight, axis in (
        ("wte.weight", 0),
        ("wpe.weight", 0),
        ("h.0.attn.c_attn.weight", 1),
        ("h.5.mlp.c_proj.weight", 1),
    ):
        scale = np.expand_dims(after[f"{weight}_scale"].const_value.numpy(), 1 - axis)
        restored = after[f"{weight}_int8"].const_value.numpy() * scale
        assert (np.abs(restored - before[weight].const_value.numpy()) <= scale / 2 * (1 + 1e-5)).all()


def test_onnx_runtime_computes_every_static_product_in_integers(artifacts, tmp_path):
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(artifacts / "int8-static/model.onnx"), options)
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert operators.count("MatMulIntegerToFloat") == PROJECTIONS and "DequantizeLinear" not in operators


def test_dynamic_rows_depend_neither_on_their_neighbours_nor_on_the_cache(artifacts, windows):
    runtime = Runtime(artifacts / "int8-dynamic/model.onnx", 2)
    alone = runtime.forward(windows[:1])
    beside = runtime.forward(windows[:3])[:1]
    mask = np.ones((2, 128), np.int64)
    mask[1, :40] = 0
    padded = runtime.forward(np.stack([windows[0], np.roll(windows[1], 40)]), mask)[:1]
    past, steps = runtime.empty_past(1), []
    for token in windows[0]:
        logits, past = runtime.extend(token[None, None], past)
        steps.append(logits)
    assert (beside == alone).all() and (padded == alone).all()
    # Two kernels can differ in the last bit of a float, and a value on the edge then rounds the other way.
    # That is rare: a scale that is shared by all rows (ONNX Runtime's recipe) moves every logit.
    cached, shared = np.concatenate(steps, axis=1), Runtime(artifacts / "ort-dynamic/model.onnx", 2)
    moved = np.abs(shared.forward(windows[:3])[:1] - shared.forward(windows[:1])).mean()
    assert np.abs(cached - alone).mean() < 0.02 * moved


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("operator", ["MatMul", "Gemm"])
@pytest.mark.parametrize("recipe", OURS)
def test_matmul_and_gemm_alike(operator, transposed, recipe, tmp_path):
    generator = np.random.default_rng(0)
    x, weight, bias = (generator.standard_normal(shape).astype(np.float32) for shape in ((6, 32), (32, 16), (16,)))
    stored = np.ascontiguousarray(weight.T) if transposed else weight
    constants = [ir.val(name, const_value=ir.tensor(array)) for name, array in (("w", stored), ("b", bias))]
    source, product = ir.val("x", ir.DataType.FLOAT, ["rows", 32]), ir.val("y", ir.DataType.FLOAT, ["rows", 16])
    nodes = []
    if operator == "Gemm":
        nodes.append(
            ir.node("Gemm", [source, *constants], {"transB": int(transposed)}, outputs=[product], name="projection")
        )
    else:
        if transposed:
            nodes.append(ir.node("Transpose", [constants[0]], {"perm": [1, 0]}))
        nodes.append(
            ir.node(
                "MatMul", [source, nodes[0].outputs[0] if nodes else constants[0]], outputs=[product], name="projection"
            )
        )
    ranges = {"x": Range(float(x.min()), float(x.max()))} if recipe == "int8-static" else None
    y = run(nodes, constants, source, product, x, tmp_path, ranges)
    exact = x @ weight + (bias if operator == "Gemm" else 0)
    # Half a step of either factor, times the other, summed over 32 products.
    step_x, step_w = np.abs(x).max() / 127, np.abs(weight).max() / 127
    assert np.abs(y - exact).max() <= 32 * (step_x / 2 * np.abs(weight).max() + step_w / 2 * np.abs(x).max())
    assert np.abs(y - exact).mean() < 0.02 * np.abs(exact).mean()
    assert not find_projections(onnx_file.load(tmp_path / "model.onnx").graph)


@pytest.mark.parametrize("recipe", OURS)
def test_a_product_of_a_product(recipe, tmp_path):
    """The second one reads what the first one became."""
    generator = np.random.default_rng(1)
    x, *weights = (generator.standard_normal(shape).astype(np.float32) for shape in ((5, 16), (16, 32), (32, 8)))
    constants = [ir.val(name, const_value=ir.tensor(array)) for name, array in zip("vw", weights, strict=True)]
    source, middle, product = (
        ir.val(name, ir.DataType.FLOAT, ["rows", n]) for name, n in (("x", 16), ("h", 32), ("y", 8))
    )
    nodes = [
        ir.node("MatMul", [source, constants[0]], outputs=[middle], name="first"),
        ir.node("MatMul", [middle, constants[1]], outputs=[product], name="second"),
    ]
    h = x @ weights[0]
    ranges = {name: Range(float(array.min()), float(array.max())) for name, array in (("x", x), ("h", h))}
    y = run(nodes, constants, source, product, x, tmp_path, ranges if recipe == "int8-static" else None)
    exact = h @ weights[1]
    assert np.abs(y - exact).mean() < 0.02 * np.abs(exact).mean()


@pytest.mark.parametrize("size", [1e-5, 1e-3, 1.0, 1e4])
def test_dynamic_scales_fit_small_and_massive_rows(size, tmp_path):
    """Half precision of the scale costs no bit, whatever the size of a row; a row of zeros stays zero."""
    generator = np.random.default_rng(2)
    x, weight = (generator.standard_normal(shape).astype(np.float32) for shape in ((6, 64), (64, 32)))
    x[0] *= size
    x[1] = 0
    constant = ir.val("w", const_value=ir.tensor(weight))
    source, product = ir.val("x", ir.DataType.FLOAT, ["rows", 64]), ir.val("y", ir.DataType.FLOAT, ["rows", 32])
    node = ir.node("MatMul", [source, constant], outputs=[product], name="projection")
    y = run([node], [constant], source, product, x, tmp_path)
    exact = x @ weight
    assert (y[1] == 0).all()
    for row in (0, 2):
        assert np.abs(y[row] - exact[row]).mean() < 0.02 * np.abs(exact[row]).mean()


def run(nodes, constants, source, product, x, folder, ranges=None):
    """What ONNX Runtime computes of a small graph after int8-dynamic, or int8-static where `ranges` are given."""
    graph = ir.Graph([source], [product], nodes=nodes, initializers=constants, opset_imports={"": 21}, name="small")
    model = ir.Model(graph, ir_version=10)
    quantize_static(model, ranges) if ranges else quantize_dynamic(model)
    onnx_file.save(model, folder)
    return ort.InferenceSession(str(folder / "model.onnx")).run(["y"], {"x": x})[0]


def test_ranges_merge_like_one_pass():
    assert Range(-1, 2).merge(Range(-3, 1)) == Range(-3, 2)


def test_calibration_windows_are_full_and_of_the_calibration_split(artifacts):
    split = load_splits(Source(str(CORPUS)))[0]
    windows = calibration_windows(artifacts / "fp32", split, Calibration())
    assert windows.shape == (32, 512)
    decoded = load_tokenizer(artifacts / "fp32").decode(windows[0].tolist())
    assert split.documents[0][:200] in decoded
    observed = open_artifact(artifacts / "int8-static").manifest
    assert observed.calibration == split.sha256 and observed.details["calibration"] == {
        "windows": 32,
        "tokens_per_window": 512,
    }


def test_ranges_hold_what_the_calibration_showed(artifacts):
    """The first LayerNorm's output, by the model's own arithmetic, spans exactly the range in the manifest."""
    tables = onnx_file.load(artifacts / "fp32/model.onnx").graph.initializers
    get = lambda name: tables[name].const_value.numpy()  # noqa: E731
    windows = calibration_windows(artifacts / "fp32", load_splits(Source(str(CORPUS)))[0], Calibration())
    x = get("wte.weight")[windows] + get("wpe.weight")[: windows.shape[1]]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * get("h.0.ln_1.weight") + get(
        "h.0.ln_1.bias"
    )
    measured = open_artifact(artifacts / "int8-static").manifest.details["ranges"]["h.0.attn.c_attn"]
    assert measured == {"low": pytest.approx(x.min(), rel=1e-4), "high": pytest.approx(x.max(), rel=1e-4)}


def test_a_second_run_rebuilds_nothing_and_another_corpus_what_depends_on_it(artifacts, tmp_path):
    before = {name: (artifacts / name).stat().st_ino for name in OURS}
    again = stage("quantize", "--output", artifacts.parent, "--recipes", *OURS)
    assert again.status == 0 and again.stderr.count("up to date") == 2
    assert before == {name: (artifacts / name).stat().st_ino for name in OURS}
    texts = load_splits(Source(str(CORPUS)))[1].documents
    (tmp_path / "other.txt").write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    other = stage("quantize", "--output", artifacts.parent, "--recipes", *OURS, "--corpus", tmp_path / "other.txt")
    assert "int8-dynamic: up to date" in other.stderr and "int8-static: changed: calibration" in other.stderr
    assert (artifacts / "int8-dynamic").stat().st_ino == before["int8-dynamic"]


def test_ort_recipes_are_whole_and_say_what_they_are(artifacts):
    for name in ("ort-dynamic", "ort-static"):
        manifest = open_artifact(artifacts / name).manifest
        assert manifest.recipe["type"] == {"ort-dynamic": "OrtDynamic", "ort-static": "OrtStatic"}[name]
        assert set(manifest.files) == {
            "config.json",
            "generation_config.json",
            "model.onnx",
            "tokenizer.json",
            "tokenizer_config.json",
        }


def test_unknown_recipe(artifacts):
    assert_user_error(stage("quantize", "--output", artifacts.parent, "--recipes", "int7"), "int7", "int8-dynamic")


def test_no_export_before(tmp_path):
    assert_user_error(stage("quantize", "--output", tmp_path), "fp32", "make export")


def test_too_few_calibration_windows(artifacts, tmp_path):
    (tmp_path / "short.txt").write_text("Una frase corta.\n<|endoftext|>\nY otra.\n", encoding="utf-8")
    before = json.loads((artifacts / "int8-static/manifest.json").read_text())
    assert_user_error(
        stage("quantize", "--output", artifacts.parent, "--recipes", "int8-static", "--corpus", tmp_path / "short.txt"),
        "at least 8",
    )
    assert json.loads((artifacts / "int8-static/manifest.json").read_text()) == before and not list(
        artifacts.glob(".tmp-*")
    )


def test_a_damaged_parent_is_not_quantized(es_mini_fp32, tmp_path):
    import shutil

    copy = tmp_path / "artifacts"
    shutil.copytree(es_mini_fp32.path.parent, copy / "es-mini")
    model = copy / "es-mini/fp32/model.onnx"
    data = bytearray(model.read_bytes())
    data[1000] ^= 1
    model.write_bytes(data)
    shutil.rmtree(copy / "es-mini/int8-dynamic", ignore_errors=True)
    assert_user_error(stage("quantize", "--output", copy, "--recipes", "int8-dynamic"), "model.onnx", "run make again")
    assert not (copy / "es-mini/int8-dynamic").exists()


def test_splits_know_their_content():
    assert Split("a", ("x", "y")).sha256 == Split("b", ("x", "y")).sha256 != Split("a", ("y", "x")).sha256
