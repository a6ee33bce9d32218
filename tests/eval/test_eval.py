"""The eval stage on real artifacts: what it measures, what it refuses, and when it does nothing."""

import copy
import json
import math
import multiprocessing
import re
import shutil

import numpy as np
import pytest

import cuantiza.eval.measure.latency
from cuantiza.core.inputs.corpus import Source, load_splits
from cuantiza.core.inputs.weights.pytorch import pytorch_loader
from cuantiza.core.machine.process import Remote
from cuantiza.core.run.runtime import Runtime
from cuantiza.core.store.digests import sha256_file
from cuantiza.eval.measure.engines import Engine, Subject
from cuantiza.eval.measure.latency import measure_latency, shapes
from cuantiza.eval.measure.quality import PROMPT, make_task, measure_quality
from cuantiza.eval.measure.torch_engine import TorchRuntime
from cuantiza.eval.report.schema import NO_KERNELS, LeftOut, Report
from cuantiza.eval.stage import _measured

from helpers import CORPUS, ES_MINI, ROOT, assert_user_error, edit_config, stage

QUICK = ("--tokens", 600, "--rounds", 2)


@pytest.fixture(scope="module")
def artifacts(es_mini_fp32):
    folder = es_mini_fp32.path.parent
    result = stage("quantize", "--output", folder.parent)
    assert result.status == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def report(artifacts, tmp_path_factory):
    """(folder of the reports, what the command printed)"""
    output = tmp_path_factory.mktemp("reports")
    result = stage("eval", "--artifacts", artifacts.parent, "--output", output, *QUICK)
    assert result.status == 0, result.stderr
    return output, result


def evaluate(artifacts, reports, *options):
    """The eval command on little text, without the PyTorch rows."""
    little = ("--tokens", 300, "--rounds", 1, "--without-torch")
    return stage("eval", "--artifacts", artifacts.parent, "--output", reports, *little, *options)


def rows_of(output):
    return {
        row["name"]: row
        for row in json.loads((output / "es-mini/report.json").read_text(encoding="utf-8"))["artifacts"]
    }


def test_report_has_a_row_for_every_subject_and_every_documented_field(report):
    output, printed = report
    rows = rows_of(output)
    assert list(rows) == ["fp32", "int8-dynamic", "int8-static", "int8-dynamic-ort", "torch-fp32", "torch-dynamic"]
    documented = set(
        re.findall(r"^\| `artifacts\[\]\.(\w+)`", (ROOT / "docs/report.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert {
        "name",
        "bytes",
        "perplexity",
        "perplexity_stderr",
        "bits_per_byte",
        "delta_ln_ppl",
        "delta_ln_ppl_stderr",
        "kl_divergence",
        "top1_agreement",
        "load_ms",
        "peak_rss_bytes",
        "prefill",
        "decode",
    } <= documented
    for row in rows.values():
        sometimes = {"modules_with_weights", "modules_quantized", "protocols"}
        assert set(row) - sometimes == documented - sometimes
        assert [item["tokens"] for item in row["prefill"]] == [32, 128, 512]
        assert [item["position"] for item in row["decode"]] == [32, 128, 512, 1023]
        for shape in (*row["prefill"], *row["decode"]):
            assert (
                len(shape["samples_ns"]) == sum(shape["samples_per_round"]) >= 4
                and len(shape["samples_per_round"]) == 2
            )
            assert shape["p50_ms"] == pytest.approx(np.median(shape["samples_ns"]) / 1e6)
    for name in rows:
        assert name in printed.stdout
    text = (output / "es-mini/report.md").read_text(encoding="utf-8")
    assert text.count(f"**: {PROMPT}") == len(rows)


def test_quality_is_what_it_should_be(report):
    rows = rows_of(report[0])
    assert rows["fp32"]["delta_ln_ppl"] == 0 and rows["fp32"]["top1_agreement"] == 1
    # PyTorch computes the same model: the same perplexity to the tolerance of parity.
    assert abs(rows["torch-fp32"]["delta_ln_ppl"]) < 1e-4 and rows["torch-fp32"]["top1_agreement"] > 0.999
    assert abs(rows["int8-dynamic"]["delta_ln_ppl"]) < 0.01 and abs(rows["int8-static"]["delta_ln_ppl"]) < 0.03
    assert rows["int8-static"]["kl_divergence"] > rows["torch-fp32"]["kl_divergence"] >= 0
    assert rows["torch-fp32"]["continuation"] == rows["fp32"]["continuation"]


def test_documents_add_up_to_the_whole(report):
    corpus = json.loads((report[0] / "es-mini/report.json").read_text(encoding="utf-8"))["corpus"]
    assert len(corpus["document_tokens"]) == corpus["documents"] >= 1
    for row in rows_of(report[0]).values():
        assert len(row["nll_by_document"]) == corpus["documents"]
        assert sum(corpus["document_tokens"]) == row["tokens_scored"]
        mean = sum(row["nll_by_document"]) / row["tokens_scored"]
        assert math.exp(mean) == pytest.approx(row["perplexity"], rel=1e-9)


def test_keys_differ_by_what_quantization_adds(report):
    rows = rows_of(report[0])
    assert rows["fp32"]["key_error"] == [0.0] * 6
    for name in ("int8-dynamic", "int8-static"):
        # The first layer's keys carry the rounding of one product; later ones that of all before them too.
        assert all(0 < error < 0.1 for error in rows[name]["key_error"])
        assert rows[name]["key_error"][-1] == max(rows[name]["key_error"])
    assert rows["torch-fp32"]["key_error"] is None


def test_sizes_are_those_of_the_files(artifacts, report):
    for name in ("fp32", "int8-dynamic"):
        files = {
            file.name: file.stat().st_size for file in (artifacts / name).iterdir() if file.name != "manifest.json"
        }
        row = rows_of(report[0])[name]
        assert row["bytes"] == sum(files.values()) and row["model_bytes"] == files["model.onnx"]


def test_the_course_quantizes_the_head_alone(report):
    row = rows_of(report[0])["torch-dynamic"]
    assert (
        row["modules_quantized"] == 1 and row["modules_with_weights"] == 2 + 6 * 6 + 1 + 1
    )  # embeddings, 6 a layer, ln_f, head


def test_a_second_run_measures_nothing(artifacts, report):
    output, _ = report
    before = sha256_file(output / "es-mini/report.json")
    again = stage("eval", "--artifacts", artifacts.parent, "--output", output, *QUICK)
    assert again.status == 0 and "up to date" in again.stderr and "quality" not in again.stderr
    assert sha256_file(output / "es-mini/report.json") == before and "int8-static" in again.stdout


def test_a_recipe_of_ones_own_is_measured_by_its_file(artifacts, tmp_path):
    """As `make eval RECIPES=mine.json` asks for it; and nothing waits for itself where one folder has two names."""
    shutil.copytree(artifacts, tmp_path / "made/es-mini")
    (tmp_path / "made/es-mini/int8-static").rename(tmp_path / "made/es-mini/mine")
    (tmp_path / "mine.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "made/es-mini")
    recipes = ("fp32", tmp_path / "mine.json", tmp_path / "link/int8-dynamic")
    result = evaluate(tmp_path / "made/es-mini", tmp_path / "reports", "--recipes", *recipes)
    assert result.status == 0, result.stderr
    assert rows_of(tmp_path / "reports").keys() == {"fp32", "int8-static", "int8-dynamic"}


def test_python_s_rows_are_of_the_model_that_was_exported(artifacts, tmp_path):
    """Also where the baseline is quantized: the fp32 artifact beside it knows the checkpoint."""
    changed = shutil.copytree(ES_MINI, tmp_path / "es-mini")
    edit_config(changed, layer_norm_epsilon=1e-4)
    options = ("--artifacts", artifacts.parent, "--recipes", "int8-dynamic", "--model", changed)
    assert_user_error(stage("eval", *options, "--output", tmp_path / "reports", *QUICK), "has changed since")


def test_a_failure_of_python_s_int8_is_expected_without_kernels_alone():
    left = {
        reason: LeftOut(name="torch-dynamic", kind="torch-dynamic", reason=reason) for reason in ("torch", "killed")
    }
    assert not any(item.expected for item in left.values())
    assert LeftOut(name="a", kind="torch-dynamic", reason=f"torch 2 {NO_KERNELS} (NoQEngine)").expected


def test_a_foreign_file_of_the_contract_is_measured_beside_ours(artifacts, tmp_path):
    shutil.copytree(artifacts / "int8-static", tmp_path / "theirs")
    (tmp_path / "theirs/manifest.json").unlink()
    result = evaluate(
        artifacts,
        tmp_path / "reports",
        "--recipes",
        "fp32",
        "int8-static",
        "--onnx",
        tmp_path / "theirs",
    )
    assert result.status == 0, result.stderr
    rows = rows_of(tmp_path / "reports")
    assert list(rows) == ["fp32", "int8-static", "theirs"]
    assert all(
        rows["theirs"][key] == rows["int8-static"][key]
        for key in ("perplexity", "kl_divergence", "top1_agreement", "bytes", "continuation")
    )


def test_nll_is_transformers_loss(artifacts):
    import torch
    from transformers import AutoModelForCausalLM

    test = load_splits(Source(str(CORPUS)))[1]
    task = make_task(artifacts / "fp32", test, 400, 512)
    row = measure_quality([Subject("fp32", "onnx", artifacts / "fp32/model.onnx")], task, 2)["fp32"]
    model = AutoModelForCausalLM.from_pretrained(ES_MINI, dtype=torch.float32).eval()
    total = 0.0
    for tokens in task.documents:
        ids = torch.tensor([[task.start, *tokens]])
        assert ids.shape[1] - 1 <= 512 or len(task.documents) == 1
        with torch.inference_mode():
            logits = model(ids).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits[:512], ids[0, 1:513], reduction="sum").item()
        rest = ids[0, 513:]
        if len(rest):
            with torch.inference_mode():
                logits = model(ids[:, -513:-1]).logits[0, -len(rest) :]
            total += torch.nn.functional.cross_entropy(logits, rest, reduction="sum").item()
    assert row["perplexity"] == pytest.approx(np.exp(total / row["tokens_scored"]), rel=1e-4)


def test_greedy_continuation_is_transformers_generate(artifacts):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = (
        AutoTokenizer.from_pretrained(ES_MINI),
        AutoModelForCausalLM.from_pretrained(ES_MINI, dtype=torch.float32),
    )
    ids = [0, *tokenizer(PROMPT, add_special_tokens=False).input_ids]
    seen = torch.ones(
        (1, len(ids)), dtype=torch.long
    )  # the start token is the padding token too, and must not be masked
    theirs = model.generate(
        torch.tensor([ids]), attention_mask=seen, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, len(ids) :].tolist()
    with Remote(Engine, Subject("fp32", "onnx", artifacts / "fp32/model.onnx"), 2) as remote:
        assert remote.call("continue_greedy", ids, 16) == theirs


def test_pytorch_cache_can_be_stepped_again():
    runtime = TorchRuntime(pytorch_loader(ES_MINI), 2, quantized=False)
    ids = np.arange(10)[None]
    cache = runtime.cache(1, 10)
    runtime.step(cache, ids[:, :9])
    again = copy.copy(cache)
    first, second = runtime.step(cache, ids[:, 9:]), runtime.step(again, ids[:, 9:])
    assert (first == second).all() and cache.length == again.length == 10
    assert np.allclose(first[0], runtime.forward(ids)[0, 9], atol=1e-4)


def test_one_process_at_a_time_is_timed(artifacts, monkeypatch):
    """A row's latency cannot depend on how many artifacts are measured: nothing else is ever open beside it."""
    open_at_once = []

    class Watched(Remote):
        def call(self, method, *args):
            open_at_once.append(len(multiprocessing.active_children()))
            return super().call(method, *args)

    monkeypatch.setattr(cuantiza.eval.measure.latency, "Remote", Watched)
    subjects = [
        Subject(name, "onnx", artifacts / name / "model.onnx") for name in ("fp32", "int8-dynamic", "int8-static")
    ]
    fields = measure_latency(subjects, np.arange(1024) % 100, 1024, 2, 1)
    assert open_at_once == [1] * 6
    assert [item["speedup"] for item in fields["fp32"]["prefill"]] == [1.0, 1.0, 1.0]
    # int8 weights take less memory than fp32 ones, and each row's peak is its own.
    assert fields["int8-dynamic"]["peak_rss_bytes"] != fields["fp32"]["peak_rss_bytes"]


def test_shapes_fit_short_models():
    assert shapes(1024) == ([32, 128, 512], [32, 128, 512, 1023])
    assert shapes(128) == ([32, 128], [32, 127])
    assert shapes(16) == ([16], [15])


def test_sessions_do_not_spin(artifacts):
    options = Runtime(artifacts / "fp32/model.onnx", 2).session.get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)


def scaled(source, target, **changes):
    """A copy of a small graph of the contract with other initializers: {name: change}."""
    import onnx

    proto = onnx.load(source)
    for tensor in proto.graph.initializer:
        if tensor.name in changes:
            array = changes[tensor.name](onnx.numpy_helper.to_array(tensor))
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))
    onnx.save(proto, target)


def other_files(artifacts, folder):
    """Files from elsewhere that cannot be measured beside es-mini: {name of the row: why}."""
    import onnx
    import onnx_ir as ir

    ours = artifacts / "fp32/model.onnx"
    (folder / "garbage.onnx").write_bytes(b"garbage" * 100)
    (folder / "cut.onnx").write_bytes(ours.read_bytes()[:100_000])
    for name, location in (("out", "../secret.bin"), ("far", "/etc/hostname")):
        proto = onnx.load(ours)
        tensor = max(proto.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        (folder / f"{name}.onnx").write_bytes(proto.SerializeToString())
    x = ir.val("input_ids", ir.DataType.INT64, ["b", "t"])
    node = ir.node("Identity", [x])
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "logits", x.type, x.shape
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 21}, name="g")
    ir.save(ir.Model(graph, ir_version=10), folder / "other.onnx")
    scaled(ours, folder / "larger.onnx", **{"wte.weight": lambda table: np.vstack([table, table[:8]])})
    scaled(ours, folder / "nan.onnx", **{"ln_f.bias": lambda bias: bias * np.nan})
    return {
        "garbage": "not a readable ONNX file",
        "cut": "not a readable ONNX file",
        "out": "outside its folder",
        "far": "outside its folder",
        "other": "contract",
        "larger": "logits of 8200 tokens where the baseline gives 8192",
        "nan": "logits that are not numbers",
    }


def test_files_that_cannot_be_measured_are_left_out(artifacts, tmp_path):
    """The report has every other row; it, its pages and one line at the end say why these are not among them."""
    (tmp_path / "theirs").mkdir()
    why = other_files(artifacts, tmp_path / "theirs")
    files = [tmp_path / f"theirs/{name}.onnx" for name in why]
    shutil.copy(artifacts / "int8-dynamic/model.onnx", good := tmp_path / "theirs/good.onnx")
    result = evaluate(artifacts, tmp_path / "reports", "--recipes", "fp32", "--onnx", *files, good)
    assert_user_error(result, "left out", *(f"{name}: " for name in why), *why.values())
    written = Report.from_json((tmp_path / "reports/es-mini/report.json").read_bytes())
    assert [row.name for row in written.artifacts] == ["fp32", "good"]
    missing = {item.name: item for item in written.left_out}
    assert missing.keys() == why.keys()
    pages = [(tmp_path / "reports/es-mini" / page).read_text(encoding="utf-8") for page in ("report.md", "report.html")]
    for name, reason in why.items():
        assert reason in missing[name].reason and missing[name].kind == "onnx" and not missing[name].expected
        assert f"left out  {name}: " in result.stderr
        assert all(f"{name} is left out" in page for page in pages)
    # A row that failed may succeed the next time, so such a report is never up to date.
    assert _measured(tmp_path / "reports/es-mini", written.inputs) is None


NO_ENGINE = """
import torch

def refuse(*_, **__):
    raise RuntimeError("Didn't find engine for operation quantized::linear_prepack NoQEngine\\nmore of it")

torch.quantization.quantize_dynamic = refuse
"""


def test_pytorch_without_int8_is_left_out(artifacts, tmp_path):
    """As on Apple silicon: a machine's limit, which is said every time and is no error."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(NO_ENGINE)
    options = ("--recipes", "fp32", "--tokens", 300, "--rounds", 1, "--output", tmp_path / "reports")
    command = ("eval", "--artifacts", artifacts.parent, *options)
    for done in (stage(*command, env={"PYTHONPATH": str(tmp_path / "site")}) for _ in range(2)):
        assert done.status == 0 and "Traceback" not in done.stderr, done.stderr
        assert re.search(r"^left out  torch-dynamic: torch \S+ has no int8 kernels .*NoQEngine\)$", done.stderr, re.M)
    assert "up to date" in done.stderr
    assert rows_of(tmp_path / "reports").keys() == {"fp32", "torch-fp32"}
    assert "torch-dynamic is left out" in (tmp_path / "reports/es-mini/report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "options, fragments",
    [
        (("--recipes", "fp32", "int7"), ("int7", "run `make export quantize`")),
        (("--rounds", 0), ("--rounds 0",)),
        (("--onnx", "nowhere"), ("nowhere",)),
    ],
)
def test_bad_options(artifacts, tmp_path, options, fragments):
    assert_user_error(
        evaluate(artifacts, tmp_path / "reports", *options),
        *fragments,
    )


def test_a_report_folder_that_is_not_ours(artifacts, tmp_path):
    (tmp_path / "es-mini").mkdir()
    (tmp_path / "es-mini/thesis.md").write_text("mine")
    assert_user_error(evaluate(artifacts, tmp_path), "not ours", "REPORTS=")
    assert (tmp_path / "es-mini/thesis.md").read_text() == "mine"
