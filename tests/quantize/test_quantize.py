"""Int8 arithmetic, the rewritten graphs, and the quantize stage on the embedded model."""

import json
import shutil

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from cuantiza.core.contract import window_feeds
from cuantiza.core.inputs.corpus import Source, Split, load_splits
from cuantiza.core.onnx import file as onnx_file
from cuantiza.core.run.exact_int8 import EXACT, exact_options, exact_products
from cuantiza.core.run.runtime import Runtime, open_session
from cuantiza.core.store.artifact import open_artifact
from cuantiza.quantize.decide.activation import ROW_ZERO_POINTS, PerRow, PerTensor
from cuantiza.quantize.decide.decision import Decision
from cuantiza.quantize.rewrite.dynamic import quantize_dynamic
from cuantiza.quantize.rewrite.find import find_projections
from cuantiza.quantize.rewrite.static import quantize_static
from cuantiza.quantize.settings import ALPHAS, Calibration
from cuantiza.quantize.weights.rounding import Grid, IntWeight, round_to_nearest

from helpers import CORPUS, assert_user_error, stage

OURS = ("int8-dynamic", "int8-static")
REWRITES = {"int8-dynamic": quantize_dynamic, "int8-static": quantize_static}
PROJECTIONS, LAYERS = 4 * 6 + 1, 6


@pytest.fixture(scope="module")
def artifacts(es_mini_fp32):
    """A folder with es-mini's fp32 and int8 artifacts and those of ONNX Runtime's tools, made by the command."""
    folder = es_mini_fp32.path.parent
    # While other work runs on the machine, one NumPy thread is faster than several.
    options = "--output", folder.parent, "--recipes", *OURS, "ort-dynamic", "ort-static"
    result = stage("quantize", *options, env={"OPENBLAS_NUM_THREADS": "1"})
    assert result.status == 0, result.stderr
    return folder


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
    assert len(details["projections"]) == PROJECTIONS and details["embeddings"] == ["wte", "wpe"]
    kept = {item["operator"]: item["count"] for item in details["left_in_float"] if "operator" in item}
    assert kept["LayerNormalization"] == 2 * LAYERS + 1 and kept["Softmax"] == kept["Gelu"] == LAYERS
    # Only the matmuls of attention stay in float; both embeddings are quantized.
    assert kept["MatMul"] == 2 * LAYERS and "Gather" not in kept
    assert all(item["reason"] for item in details["left_in_float"])


@pytest.mark.parametrize("name", OURS)
def test_stored_embeddings_are_the_checkpoints(artifacts, name):
    """Positions are rounded to nearest. The tied matrix is smoothed and rounded for the head; a factor undoes smoothing."""
    before = onnx_file.load(artifacts / "fp32/model.onnx").graph.initializers
    after = onnx_file.load(artifacts / name / "model.onnx").graph.initializers
    for table in ("wte.weight", "wpe.weight"):
        scale = after[f"{table}_scale"].const_value.numpy()[:, None]
        unsmooth = after.get(f"{table}_unsmooth")
        back = 1 if unsmooth is None else unsmooth.const_value.numpy()
        restored = after[f"{table}_int8"].const_value.numpy() * scale * back
        original = before[table].const_value.numpy()
        steps = np.abs(restored - original) / (scale * back)
        assert steps.mean() < 1 if table == "wte.weight" else steps.max() <= 0.5 * (1 + 1e-3)
        assert table == "wte.weight" or np.abs(after[f"{table}_int8"].const_value.numpy()).max(axis=1).min() == 127


@pytest.mark.parametrize("name", OURS)
def test_the_manifest_tells_what_was_decided_on_every_linear_layer(artifacts, name):
    manifest = open_artifact(artifacts / name).manifest
    for projection, account in manifest.details["projections"].items():
        assert account.keys() == {"alpha", "relative_error", "bits"} | (
            {"zero_point", "exponent"} if name == "int8-dynamic" else {"low", "high"}
        ) | ({"values_error"} if projection.endswith("c_attn") else set()), (
            projection
        )  # es-mini needs no float_channels
        assert account["alpha"] in ((None,) if projection.endswith("mlp.c_proj") else (None, *ALPHAS))
        assert 0 < account["relative_error"] < 1e-3
    after_gelu = [manifest.details["projections"][f"h.{layer}.mlp.c_proj"] for layer in range(LAYERS)]
    if name == "int8-dynamic":
        # GELU hardly gives negative values, so nearly all steps are used for positive ones.
        assert max(account["zero_point"] for account in after_gelu if account["bits"] == 8) <= 64
    else:
        assert all(-0.2 < account["low"] < 0 < account["high"] for account in after_gelu if account["bits"] == 8)
    assert manifest.calibration == load_splits(Source(str(CORPUS)))[0].sha256
    assert manifest.details["calibration"] == {"windows": Calibration().windows, "tokens_per_window": 512}


def test_onnx_runtime_computes_every_static_linear_layer_in_integers(artifacts, tmp_path):
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(artifacts / "int8-static/model.onnx"), options)
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert operators.count("MatMulIntegerToFloat") == PROJECTIONS
    # 16 bits need what 8 bits leave.
    accounts = open_artifact(artifacts / "int8-static").manifest.details["projections"].values()
    assert operators.count("DequantizeLinear") == [account["bits"] for account in accounts].count(16) > 0


@pytest.mark.parametrize("name", OURS)
def test_no_sum_of_two_products_leaves_16_bits(artifacts, name):
    """So the artifact asks for no option, and vpmaddubsw, which adds two products in 16 bits, never clips."""
    found = open_artifact(artifacts / name)
    graph = onnx_file.load(found.model).graph
    for layer in found.manifest.details["projections"]:
        tied = layer == "lm_head"
        q = graph.initializers["wte.weight_int8" if tied else f"{layer}.weight_int8"].const_value.numpy().astype(int)
        pairs = (q.T if tied else q).reshape(-1, 2, q.shape[0 if tied else 1])
        above, below = pairs.clip(min=0).sum(axis=1), pairs.clip(max=0).sum(axis=1)  # inputs of 255 where it counts
        assert (255 * above < 2**15).all() and (255 * below >= -(2**15)).all(), layer
    assert "session_options" not in found.manifest.details and exact_options(found.model) == {}


def test_files_of_other_tools_get_the_option_where_sums_are_clipped(artifacts, tmp_path):
    (tmp_path / "manifest.json").write_text('{"schema": 1, "details": 2}')
    for folder in (artifacts / "ort-dynamic", tmp_path, tmp_path / "none"):
        assert exact_options(folder / "model.onnx") == exact_products()


@pytest.mark.parametrize("name", ["ort-dynamic", "ort-static"])
def test_the_option_for_processors_without_vnni_loads_and_changes_no_exact_matmul(artifacts, name):
    found = open_artifact(artifacts / name)
    (options,) = found.manifest.details["session_options"].values()
    assert options == EXACT
    settings = ort.SessionOptions()
    for key, value in (exact_products() | options).items():
        settings.add_session_config_entry(key, value)
    session = ort.InferenceSession(str(found.model), settings, providers=["CPUExecutionProvider"])
    ids = np.arange(100, 140)
    logits = session.run(["logits"], window_feeds(session.get_inputs(), ids))[0]
    # Exact sums are the same with every kernel.
    assert (logits == Runtime(found.model).forward(ids[None])).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("operator", ["MatMul", "Gemm"])
@pytest.mark.parametrize("recipe", OURS)
def test_matmul_and_gemm_alike(operator, transposed, recipe, tmp_path):
    generator = np.random.default_rng(0)
    x, weight, bias = (generator.standard_normal(shape).astype(np.float32) for shape in ((6, 32), (32, 16), (16,)))
    stored = np.ascontiguousarray(weight.T) if transposed else weight
    constants = [ir.val(name, const_value=ir.tensor(array)) for name, array in (("w", stored), ("b", bias))]
    source, output = ir.val("x", ir.DataType.FLOAT, ["rows", 32]), ir.val("y", ir.DataType.FLOAT, ["rows", 16])
    nodes = []
    if operator == "Gemm":
        nodes.append(
            ir.node("Gemm", [source, *constants], {"transB": int(transposed)}, outputs=[output], name="projection")
        )
    else:
        if transposed:
            nodes.append(ir.node("Transpose", [constants[0]], {"perm": [1, 0]}))
        nodes.append(
            ir.node(
                "MatMul", [source, nodes[0].outputs[0] if nodes else constants[0]], outputs=[output], name="projection"
            )
        )
    y = run(recipe, nodes, constants, source, output, {"x": x}, tmp_path)
    exact = x @ weight + (bias if operator == "Gemm" else 0)
    # The largest possible error is half a step of each factor times the other factor, summed over 32 inputs.
    step_x, step_w = np.abs(x).max() / 127, np.abs(weight).max() / 127
    assert np.abs(y - exact).max() <= 32 * (step_x / 2 * np.abs(weight).max() + step_w / 2 * np.abs(x).max())
    assert np.abs(y - exact).mean() < 0.02 * np.abs(exact).mean()
    assert not find_projections(onnx_file.load(tmp_path / "model.onnx").graph)


@pytest.mark.parametrize("recipe", OURS)
def test_a_matmul_of_a_matmul(recipe, tmp_path):
    """The second linear layer reads the output of the first one's rewritten nodes."""
    generator = np.random.default_rng(1)
    x, *weights = (generator.standard_normal(shape).astype(np.float32) for shape in ((5, 16), (16, 32), (32, 8)))
    constants = [ir.val(name, const_value=ir.tensor(array)) for name, array in zip("vw", weights, strict=True)]
    source, middle, output = (
        ir.val(name, ir.DataType.FLOAT, ["rows", n]) for name, n in (("x", 16), ("h", 32), ("y", 8))
    )
    nodes = [
        ir.node("MatMul", [source, constants[0]], outputs=[middle], name="first"),
        ir.node("MatMul", [middle, constants[1]], outputs=[output], name="second"),
    ]
    h = x @ weights[0]
    y = run(recipe, nodes, constants, source, output, {"x": x, "h": h}, tmp_path)
    exact = h @ weights[1]
    assert np.abs(y - exact).mean() < 0.02 * np.abs(exact).mean()


@pytest.mark.parametrize("size", [1e-5, 1e-3, 1.0, 1e4])
def test_dynamic_scales_fit_small_and_massive_rows(size, tmp_path):
    """An fp16 scale costs no precision, however small or large a row is, and a row of zeros stays zero."""
    generator = np.random.default_rng(2)
    x, weight = (generator.standard_normal(shape).astype(np.float32) for shape in ((6, 64), (64, 32)))
    x[0] *= size
    x[1] = 0
    constant = ir.val("w", const_value=ir.tensor(weight))
    source, output = ir.val("x", ir.DataType.FLOAT, ["rows", 64]), ir.val("y", ir.DataType.FLOAT, ["rows", 32])
    node = ir.node("MatMul", [source, constant], outputs=[output], name="projection")
    y = run("int8-dynamic", [node], [constant], source, output, {"x": x}, tmp_path)
    exact = x @ weight
    assert (y[1] == 0).all()
    for row in (0, 2):
        assert np.abs(y[row] - exact[row]).mean() < 0.02 * np.abs(exact[row]).mean()


def model_of(nodes, constants, source, output):
    graph = ir.Graph([source], [output], nodes=nodes, initializers=constants, opset_imports={"": 21}, name="small")
    return ir.Model(graph, ir_version=10)


def evaluate(model, x, folder):
    onnx_file.save(model, folder)
    if any(node.op_type == "MatMulInteger" for node in model.graph):
        return open_session(folder / "model.onnx").run(["y"], {"x": x})[0]
    # QDQ says what it computes without any fusion. The kernels of fused graphs clip sums on processors without VNNI.
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(folder / "model.onnx"), options).run(["y"], {"x": x})[0]


def to_nearest(weight, activation, taken=()):
    """Decide to round `weight` [K, N] to nearest, with the input channels `taken` in floating point."""
    taken = np.array(taken, np.int64)
    kept = weight.copy()
    kept[taken] = 0
    return Decision(round_to_nearest(kept, Grid(8), np.ones(1)), activation, taken, weight[taken])


def run(recipe, nodes, constants, source, output, inputs, folder):
    """Apply `recipe` to a small graph and return its output in ONNX Runtime.

    `inputs` are the inputs of the graph's linear layers, by name.
    """
    model = model_of(nodes, constants, source, output)
    found = {projection.name: projection for projection in find_projections(model.graph)}
    ranges = {name: PerTensor(float(array.min()), float(array.max())) for name, array in inputs.items()}
    decisions = {
        name: to_nearest(projection.matrix, ranges[projection.x.name] if recipe == "int8-static" else PerRow())
        for name, projection in found.items()
    }
    REWRITES[recipe](model, decisions)
    return evaluate(model, inputs["x"], folder)


def pair(weights):
    """Build y = (x·v)·w [rows, N] from two MatMuls named first and second."""
    constants = [ir.val(name, const_value=ir.tensor(weight)) for name, weight in zip("vw", weights, strict=True)]
    sizes = len(weights[0]), len(weights[1]), weights[1].shape[1]
    source, middle, output = (
        ir.val(name, ir.DataType.FLOAT, ["rows", n]) for name, n in zip("xhy", sizes, strict=True)
    )
    nodes = [
        ir.node("MatMul", [source, constants[0]], outputs=[middle], name="first"),
        ir.node("MatMul", [middle, constants[1]], outputs=[output], name="second"),
    ]
    return nodes, constants, source, output


@pytest.mark.parametrize("recipe", OURS)
def test_a_linear_layer_without_a_decision_stays_in_float(recipe, tmp_path):
    generator = np.random.default_rng(3)
    x, *weights = (generator.standard_normal(shape).astype(np.float32) for shape in ((5, 16), (16, 32), (32, 8)))
    activation = PerRow() if recipe == "int8-dynamic" else PerTensor(float(x.min()), float(x.max()))
    model = model_of(*pair(weights))
    projections, embeddings = REWRITES[recipe](model, {"first": to_nearest(weights[0], activation)})
    assert [projection.name for projection in projections] == ["first"] and not embeddings
    assert [projection.name for projection in find_projections(model.graph)] == ["second"]
    assert "w" in model.graph.initializers and "v" not in model.graph.initializers
    restored = to_nearest(weights[0], activation).weight.dequantize()
    expected = activation.restore(x) @ restored @ weights[1]
    # The graph rounds per-row scales to fp16, which moves a few values to the next step.
    difference = np.abs(evaluate(model, x, tmp_path) - expected)
    assert np.median(difference) < 1e-3 * np.abs(expected).max() and difference.max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("recipe", OURS)
@pytest.mark.parametrize("quantized", [True, False])
def test_an_embedding_is_quantized_if_and_only_if_the_head_that_shares_its_matrix_is(recipe, quantized):
    table = np.random.default_rng(4).standard_normal((20, 8)).astype(np.float32)
    shared = ir.val("table", const_value=ir.tensor(table))
    ids, logits = ir.val("x", ir.DataType.INT64, ["rows"]), ir.val("logits", ir.DataType.FLOAT, ["rows", 20])
    gather, transpose = ir.node("Gather", [shared, ids], name="wte"), ir.node("Transpose", [shared], {"perm": [1, 0]})
    head = ir.node("MatMul", [gather.outputs[0], transpose.outputs[0]], outputs=[logits], name="lm_head")
    model = model_of([gather, transpose, head], [shared], ids, logits)
    activation = PerRow() if recipe == "int8-dynamic" else PerTensor(-3, 3)
    decision = Decision(None, activation, np.empty(0, np.int64), np.empty((0, 20), np.float32))
    _, embeddings = REWRITES[recipe](model, {"lm_head": decision} if quantized else {})
    assert [embedding.name for embedding in embeddings] == (["wte"] if quantized else [])
    tables = {name for name, value in model.graph.initializers.items() if len(value.shape) == 2}
    assert tables == ({"table_int8"} if quantized else {"table"})


@pytest.mark.parametrize("taken", [[3], [0, 7, 15]])
def test_float_channels_are_added_as_they_are(taken, tmp_path):
    """Channels a thousand times as large as the range, kept in float, do not reduce the precision of the others."""
    generator = np.random.default_rng(5)
    x, weight = (generator.standard_normal(shape).astype(np.float32) for shape in ((6, 16), (16, 8)))
    low, high = float(x.min()), float(x.max())
    x[:, taken] *= 1000
    constant = ir.val("w", const_value=ir.tensor(weight))
    source, output = ir.val("x", ir.DataType.FLOAT, ["rows", 16]), ir.val("y", ir.DataType.FLOAT, ["rows", 8])
    model = model_of([ir.node("MatMul", [source, constant], outputs=[output], name="p")], [constant], source, output)
    decision = to_nearest(weight, PerTensor(low, high), taken)
    quantize_static(model, {"p": decision})
    expected = decision.activation.restore(x) @ decision.weight.dequantize() + x[:, taken] @ weight[taken]
    y = evaluate(model, x, tmp_path)
    assert np.abs(y - expected).max() < 1e-5 * np.abs(expected).max()
    small = np.delete(x, taken, axis=1) @ np.delete(weight, taken, axis=0)
    assert np.abs(y - x[:, taken] @ weight[taken] - small).mean() < 0.03 * np.abs(small).mean()


@pytest.mark.parametrize(("zero_point", "exponent"), [*((zero, 0) for zero in ROW_ZERO_POINTS), (128, 20), (16, -20)])
def test_rows_come_back_as_calibration_expects(zero_point, exponent, tmp_path):
    """With an identity weight, the output of int8-dynamic is its dequantized uint8 input."""
    x = np.random.default_rng(6).standard_normal((40, 64)) * np.geomspace(1e-3, 1e3, 40)[:, None] * 2.0**exponent
    x = np.where(x < 0, x * zero_point / 128, x).astype(np.float32)
    constant = ir.val("w", const_value=ir.tensor(np.eye(64, dtype=np.float32)))
    source, output = ir.val("x", ir.DataType.FLOAT, ["rows", 64]), ir.val("y", ir.DataType.FLOAT, ["rows", 64])
    model = model_of([ir.node("MatMul", [source, constant], outputs=[output], name="p")], [constant], source, output)
    eye = IntWeight(np.eye(64, dtype=np.int8), np.ones((1, 64), np.float32), np.zeros((1, 64), np.int8), Grid(8))
    activation = PerRow(zero_point, exponent=exponent)
    quantize_dynamic(model, {"p": Decision(eye, activation, np.empty(0, np.int64), np.empty((0, 64), np.float32))})
    y, expected = evaluate(model, x, tmp_path), activation.restore(x)
    step = np.maximum(x.max(axis=1) / (255 - zero_point), -x.min(axis=1) / min(zero_point, 127))[:, None]
    assert (np.abs(y - x) <= step / 2 + np.abs(x) * 2.0**-11 + 1e-9 * 2.0**exponent).all()
    # The fp16 scale moves a value by 2⁻¹² of itself, and sometimes to the next step.
    moved = np.abs(y - expected) > np.abs(expected) * 2.0**-11
    assert moved.mean() < 0.05 and (np.abs(y - expected)[moved] < 1.1 * np.broadcast_to(step, x.shape)[moved]).all()


def test_a_second_run_rebuilds_nothing_and_another_corpus_what_depends_on_it(exported, tiny_folder, tmp_path):
    output, names = exported(tiny_folder).path.parent.parent, (*OURS, "fp16")

    def quantize(corpus):
        result = stage("quantize", "--model", tiny_folder, "--output", output, "--recipes", *names, "--corpus", corpus)
        assert result.status == 0, result.stderr
        return result.stderr, {name: (output / "tiny" / name).stat().st_ino for name in names}

    _, before = quantize(CORPUS)
    printed, again = quantize(CORPUS)
    assert printed.count("up to date") == 3 and again == before
    texts = load_splits(Source(str(CORPUS)))[1].documents
    (tmp_path / "other.txt").write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    printed, other = quantize(tmp_path / "other.txt")
    assert all(f"{name}: changed: calibration" in printed and other[name] != before[name] for name in OURS)
    assert "fp16: up to date" in printed and other["fp16"] == before["fp16"]


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
