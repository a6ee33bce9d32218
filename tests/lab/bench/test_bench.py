"""The benchmark runs real artifacts in real processes, and its arithmetic is checked by hand. No time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from cuantiza.core.errors import UserError
from cuantiza.core.machine.child import Failed
from lab.bench import limits, rows
from lab.bench.limits import Limits
from lab.bench.pages.markdown import page, ratios
from lab.bench.pages.plot import draw
from lab.bench.rounds import Answer, Setting, agreement, measure
from lab.bench.rows import Prepared, Row
from lab.bench.schema import result, times
from lab.checkpoints import random as models
from lab.checkpoints.shapes import SHAPES, LlamaShape, Shape

from helpers import ES_MINI, ROOT, Result, assert_user_error, stage

TINY = Shape("tiny", layers=2, width=64, heads=2, vocabulary=8192, positions=256)
SHORT = Setting(threads=1, batch=1, prefill=(8,), decode=(16,), generate=(8, 4))
BATCH = Setting(threads=1, batch=3, prefill=(8,), decode=(), generate=None)
LIMITS = Limits(1, 10e9, 50e9, 100e9)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def checkpoint(work: Path) -> Path:
    return models.checkpoint(TINY, work / "checkpoints")


@pytest.fixture(scope="module")
def own(work: Path, checkpoint: Path) -> dict[str, tuple[Row, Prepared]]:
    """The rows fp32 and int8-dynamic of a random model, made by the stages. The export checks parity with PyTorch."""
    rows.export(checkpoint, work)
    found = {row.name: row for row in rows.our_rows(work / TINY.name)}
    return {name: (found[name], rows.prepare_ours(found[name], TINY, checkpoint)) for name in ("fp32", "int8-dynamic")}


@pytest.fixture(scope="module")
def run(own: dict[str, tuple[Row, Prepared]], tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The result of two rounds: two rows of ours, one with other options, one without its files, one not installed."""
    fp32, int8 = own["fp32"][0], own["int8-dynamic"][0]
    plain = replace(fp32, name="all logits", options={"last_only": False, "chunk": None})
    gone = replace(int8, name="gone", folder=fp32.folder / "gone")
    absent = replace(int8, name="absent", module="lab.bench.peers.absent")
    present = [fp32, int8, plain, gone]
    prepared = {row.name: own["fp32" if row.kind == "fp32" else row.kind][1] for row in present}
    ids = models.prompts(TINY, 3, max(SHORT.context, BATCH.context))
    temporary = tmp_path_factory.mktemp("run")
    measured, answers, _ = measure(present, "fp32", [SHORT, BATCH], ids, 2, temporary, "bench")
    chosen, failed = [*present, absent], {"absent": "not installed: run `make peers`"}
    arguments = ([SHORT, BATCH], measured, answers, [LIMITS], 2, "fp32", 0.25)
    return json.loads(json.dumps(result(TINY, chosen, prepared, failed, *arguments)))


def row_of(result: dict, name: str) -> dict:
    return next(row for row in result["rows"] if row["name"] == name)


def test_shapes_are_those_of_the_published_models() -> None:
    assert SHAPES["gpt2"].parameters == 124_439_808 and SHAPES["gpt2-medium"].parameters == 354_823_168
    config = json.loads((ES_MINI / "config.json").read_text())
    small = SHAPES["es-mini"]
    fields = (config["n_layer"], config["n_embd"], config["n_head"], config["vocab_size"], config["n_positions"])
    assert fields == (small.layers, small.width, small.heads, small.vocabulary, small.positions)
    assert SHAPES["smollm2-135m"].parameters == 134_515_008 and SHAPES["qwen3-0.6b"].parameters == 596_049_920


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen3-0.6b"])
def test_a_random_llama_is_transformers_own(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    small = {"layers": 2, "width": 48, "heads": 4, "key_heads": 2, "head_width": 16, "hidden": 32, "vocabulary": 8192}
    shape = replace(SHAPES[name], **small)
    model, info = AutoModelForCausalLM.from_pretrained(models.checkpoint(shape, tmp_path), output_loading_info=True)
    assert not info["unexpected_keys"] and model.num_parameters() == shape.parameters
    weights = model.state_dict()
    assert (weights["model.norm.weight"] == 1).all() and 0.019 < weights["model.embed_tokens.weight"].std() < 0.021


def test_a_random_checkpoint_is_transformers_own_and_always_the_same(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file
    from transformers import GPT2LMHeadModel

    model, info = GPT2LMHeadModel.from_pretrained(checkpoint, output_loading_info=True)
    assert not info["unexpected_keys"] and model.num_parameters() == TINY.parameters
    weights = load_file(checkpoint / "model.safetensors")
    assert (weights["transformer.ln_f.weight"] == 1).all() and not weights["transformer.ln_f.bias"].any()
    assert 0.019 < weights["transformer.wte.weight"].std() < 0.021
    again = models.checkpoint(TINY, tmp_path)
    assert (again / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


def test_a_checkpoint_is_made_once_and_anew_for_another_shape(checkpoint: Path, tmp_path: Path) -> None:
    first = models.checkpoint(TINY, tmp_path)
    made = first.stat().st_ino
    assert models.checkpoint(TINY, tmp_path).stat().st_ino == made
    assert models.checkpoint(replace(TINY, layers=1), tmp_path).stat().st_ino != made
    assert not list(tmp_path.glob(".tmp-*"))


def test_prompts_are_text_for_a_trained_model_and_random_for_a_random_one() -> None:
    random = models.prompts(TINY, 8, 1000)
    assert random.shape == (8, 1000) and random.max() < 4000 and (random == models.prompts(TINY, 8, 1000)).all()
    text = models.prompts(SHAPES["es-mini"], 8, 923)
    assert text.shape == (8, 923) and len({row.tobytes() for row in text}) == 8


def test_random_models_take_the_cheap_form_of_a_recipe(own: dict, work: Path) -> None:
    manifest = json.loads((work / "tiny" / "int8-dynamic" / "manifest.json").read_text())
    assert manifest["recipe"] | rows.CHEAP == manifest["recipe"]
    assert own["int8-dynamic"][1].bytes == (work / "tiny" / "int8-dynamic" / "model.onnx").stat().st_size


def test_a_run_has_all_samples_and_ratios_of_rounds(run: dict) -> None:
    for name in ("fp32", "int8-dynamic", "all logits"):
        row = row_of(run, name)
        assert row["skipped"] is None and row["version"].startswith("onnxruntime ")
        short, batch = row["settings"]
        assert short["peak_rss_bytes"] > 2e7 and len(short["load_samples_ns"]) == 3
        assert len(batch["load_samples_ns"]) == 1
        assert [item["tokens"] for item in short["prefill"]] == [8] and [
            item["tokens"] for item in batch["prefill"]
        ] == [8]
        decode = short["decode"][0]
        assert decode["position"] == 16 and decode["samples_per_round"] == [20, 20]
        assert batch["decode"] == batch["generate"] == []
        for phase in ("prefill", "decode", "generate"):
            item, base = short[phase][0], row_of(run, "fp32")["settings"][0][phase][0]
            assert sum(item["samples_per_round"]) == len(item["samples_ns"]) and min(item["samples_ns"]) > 0
            ratios = [one / other for one, other in zip(medians(base), medians(item), strict=True)]
            assert item["speedups"] == ratios and item["speedup"] == median(ratios)
            assert (item["speedup_min"], item["speedup_max"]) == (min(ratios), max(ratios))
            assert item["min_ms"] <= item["median_ms"] <= item["max_ms"]
    assert row_of(run, "fp32")["settings"][0]["decode"][0]["speedup"] == 1


def medians(item: dict) -> list[float]:
    counts = item["samples_per_round"]
    return [median(item["samples_ns"][sum(counts[:i]) : sum(counts[: i + 1])]) for i in range(len(counts))]


def test_logits_are_compared_with_the_first_row(run: dict) -> None:
    same, close = row_of(run, "all logits")["agreement"], row_of(run, "int8-dynamic")["agreement"]
    assert row_of(run, "fp32")["agreement"] == {"max_logit_difference": 0.0, "same_top": 1.0, "positions": 33}
    assert same["max_logit_difference"] < 1e-3 and same["positions"] == 33
    assert 1e-4 < close["max_logit_difference"] < 1


def test_a_row_that_fails_is_skipped_with_its_reason(run: dict) -> None:
    gone = row_of(run, "gone")
    assert "model.onnx" in gone["skipped"] and "\n" not in gone["skipped"]
    assert row_of(run, "absent")["skipped"] == "not installed: run `make peers`"


def test_page_and_figure_show_every_row(run: dict, tmp_path: Path) -> None:
    text = page(run, "tiny")
    for row in run["rows"]:
        assert row["name"] in text
    line = " ".join(text.split())  # where a line breaks depends on the processor's name
    assert "**absent**: not installed: run `make peers`" in line and "kept 0.2 processors busy" in line
    assert "1 thread, batch of 3" in line and "10 (10) GB/s" in line
    assert max(map(len, text.split("## How it was measured")[1].splitlines())) <= 120
    draw(run, tmp_path / "tiny.svg")
    labels = [element.text for element in ElementTree.parse(tmp_path / "tiny.svg").iter() if element.text]
    assert {"fp32", "int8-dynamic", "all logits"} <= {label.strip() for label in labels}


def test_a_row_skipped_in_one_setting_keeps_the_others(run: dict) -> None:
    cut = json.loads(json.dumps(run))
    row_of(cut, "int8-dynamic")["settings"][1] = {"threads": 1, "batch": 3, "skipped": "takes batches of at most 1"}
    row_of(cut, "int8-dynamic")["engine"]["kind"] = "int8-dynamic-ort"
    row_of(cut, "all logits").update(ours=False, precision="int8 head")
    text = page(cut, "tiny")
    assert "| all logits | int8-dynamic | " in text, "a peer beside ours of its precision"
    assert "**int8-dynamic (1 thread, batch of 3)**: takes batches of at most 1" in text


def test_speed_up_is_the_ratio_within_a_round() -> None:
    item = times([[10, 30], [40]], [[40, 40], [40]], tokens=6)
    assert (item["speedup"], item["speedup_min"], item["speedup_max"]) == (1.5, 1.0, 2.0)
    assert item["median_ms"] == 30 / 1e6 and item["tokens_per_second"] == pytest.approx(6 / 30e-9)
    assert (item["min_ms"], item["max_ms"], item["samples_per_round"]) == (20 / 1e6, 40 / 1e6, [2, 1])
    assert times([[10]], [], tokens=1)["speedup"] is None


def test_theirs_over_ours_is_of_one_round_whatever_the_baseline_took() -> None:
    base = [[60], [80], [100]]
    ours, theirs = times([[10], [20], [50]], base, 1), times([[30], [20], [100]], base, 1)
    found = ratios(ours, theirs)
    assert [found[key] for key in ("ratio", "ratio_min", "ratio_max")] == pytest.approx([2, 1, 3])


def test_agreement_of_padded_vocabularies_and_of_a_library_without_logits() -> None:
    reference = Answer([1, 0], np.array([[0.0, 1.0], [2.0, 1.0]], np.float32))
    padded = Answer([1, 1], np.array([[0.0, 1.5, -9.0], [1.0, 1.25, -9.0]], np.float32))
    found = agreement(padded, reference)
    assert (found.max_logit_difference, found.same_top, found.positions) == (1.0, 0.5, 2)
    first = agreement(Answer([1], None), reference)
    assert (first.max_logit_difference, first.same_top, first.positions) == (None, 1.0, 1)
    assert agreement(None, reference) is None


def test_bytes_and_operations_by_hand() -> None:
    shape = Shape("hand", layers=3, width=4, heads=2, vocabulary=10, positions=8)
    # KV cache: 2 (keys and values) × 3 layers × width 4 × 5 positions × 2 bytes = 240 for each of 2 sequences
    assert limits.decode_bytes(shape, weight_bytes=1000, cache_bytes=2, position=5, batch=2) == 1480
    body = 3 * (12 * 16 + 13 * 4) + 8
    assert shape.body_parameters == body and shape.parameters == body + 18 * 4
    assert limits.prefill_ops(shape, tokens=6) == 2 * body * 6 + 4 * 36 * 4 * 3 + 2 * 10 * 4
    assert limits.prefill_ops(shape, tokens=6, batch=2) == 2 * limits.prefill_ops(shape, tokens=6)
    assert limits.decode_share(shape, LIMITS, 1000, 2, 5, 2, ns=296) == pytest.approx(0.5)
    ops = limits.prefill_ops(shape, 6)
    # 3 query heads and 1 key head of 4: the cache has a third of the queries' width, and the matrices of a layer
    # 5·12 + 2·5·4 + 12·5 for attention, 3·5·7 for the MLP and 2·5 for the norms
    llama = LlamaShape("hand", 2, 5, 3, 10, 8, model_type="llama", key_heads=1, head_width=4, hidden=7, rope_theta=1e4)
    assert llama.body_parameters == 2 * (60 + 40 + 60 + 105 + 10) + 5 and llama.parameters == llama.body_parameters + 50
    assert limits.decode_bytes(llama, weight_bytes=1000, cache_bytes=2, position=5) == 1000 + 2 * 2 * 4 * 5 * 2
    assert limits.prefill_ops(llama, tokens=6) == 2 * llama.body_parameters * 6 + 4 * 36 * 12 * 2 + 2 * 10 * 5
    for precision, peak in (("int4", 100e9), ("int8", 100e9), ("fp32", 50e9), ("int8 head", 50e9)):
        assert limits.prefill_share(shape, LIMITS, precision, 6, 1, ns=1e9) == pytest.approx(ops / peak)


def test_of_several_measurements_of_the_limits_the_most_counts() -> None:
    best = limits.best([Limits(2, 1.0, 5.0, 3.0), Limits(2, 4.0, 2.0, 6.0)])
    assert best == Limits(2, 4.0, 5.0, 6.0)


PEER = """
from pathlib import Path
def version(): return "peer 1"
def prepare(kind, checkpoint, ours, folder):
    assert (checkpoint / "config.json").is_file() and ours.is_dir() and not list(folder.iterdir())
    print("libraries print what they like")
    if kind == "broken":
        raise RuntimeError("this kind\\nis broken")
    (folder / "weights").write_bytes(b"1234")
    with (Path(__file__).parent / "made").open("a") as file:
        file.write(kind)
def files(kind, folder): return [folder / "weights"]
"""


def test_a_peer_is_prepared_once_for_what_it_is_made_of(
    checkpoint: Path, own: dict, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "somepeer.py").write_text(PEER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    row = Row("some peer", "good", "somepeer", Path(sys.executable), tmp_path / "peers" / "some-peer", "int8")
    inputs = rows.peer_inputs(checkpoint, work / TINY.name)
    assert set(inputs["ours"]) >= {"fp32", "int8-dynamic"}

    def prepare(**changes: object) -> Prepared:
        return rows.prepare_peer(row, checkpoint, work / TINY.name, inputs | changes, tmp_path)

    assert prepare() == prepare() == Prepared(4, "peer 1")
    assert (tmp_path / "made").read_text() == "good"
    prepare(checkpoint="another")
    assert (tmp_path / "made").read_text() == "goodgood"
    broken = replace(row, kind="broken")
    with pytest.raises(Failed, match=r"^RuntimeError: this kind is broken$"):
        rows.prepare_peer(broken, checkpoint, work / TINY.name, inputs, tmp_path)
    (tmp_path / "somepeer.py").write_text("import there_is_no_such_library")
    with pytest.raises(Failed, match=r"^there_is_no_such_library is not installed: run `make peers`$"):
        rows.prepare_peer(broken, checkpoint, work / TINY.name, inputs, tmp_path)


def test_peers_have_names_and_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEERS_PYTHON", "/nowhere/python")
    found = rows.our_rows(tmp_path / "tiny") + rows.peer_rows(tmp_path / "peers")
    assert len({row.name for row in found}) == len({row.folder for row in found}) == len(found)
    assert {row.python for row in found} >= {Path("/nowhere/python"), Path(sys.executable)}


def test_rows_are_selected_by_name_with_the_first_and_the_baseline(tmp_path: Path) -> None:
    found = rows.our_rows(tmp_path)
    names = [row.name for row in rows.select(found, ["int4-*"], "int8-static")]
    assert names == ["fp32", "int8-static", "int4-weight", "int4-weight-ort"]
    assert rows.select(found, None, None) == found
    with pytest.raises(UserError, match="--rows int9"):
        rows.select(found, ["int9"], None)
    with pytest.raises(UserError, match="--baseline int9"):
        rows.select(found, None, "int9")
    assert rows.ablation_rows(tmp_path)[0].kind == "fp32"


def test_the_command_writes_a_report(tmp_path: Path) -> None:
    output = tmp_path / "reports"
    options = ("--shapes", "es-mini", "--rows", "fp32", "--without-peers", "--rounds", 1, "--batches", 1)
    done = stage("lab.bench", *options, "--threads", 1, "--work", tmp_path / "work", "--output", output)
    assert done.status == 0, done.stderr
    assert "decode @900" in done.stdout
    assert sorted(file.name for file in output.iterdir()) == ["es-mini.json", "es-mini.md", "es-mini.svg"]
    report = json.loads((output / "es-mini.json").read_text())
    assert report["schema"] == "cuantiza/bench/2" and report["command"][:3] == ["python", "-m", "lab.bench"]
    assert [item["threads"] for item in report["limits"]] == [1] and report["machine"]["threads"] == 1
    for item in report["limits"]:
        assert min(item[key] for key in item if key != "threads") > 1e8
    assert not list((tmp_path / "work").glob(".tmp-*"))


def test_bad_options_are_one_line(tmp_path: Path) -> None:
    assert_user_error(stage("lab.bench", "--threads", 0, "--work", tmp_path), "--threads 0", "from 1 to")
    options = ("lab.bench", "--work", tmp_path / "work", "--without-peers")
    assert_user_error(stage(*options, "--rows", "int9"), "--rows int9", "int8-dynamic")


def test_make_passes_shapes_and_options_on() -> None:
    venv = Path(sys.executable).parent.parent
    goals = ["make", "-n", "-o", f"{venv}/.stamp", "bench", f"VENV={venv}", "BENCH_ARGS=--rounds 5"]
    plain, full = (
        Result(done.returncode, done.stdout, done.stderr)
        for done in (
            subprocess.run([*goals, *more], cwd=ROOT, capture_output=True, text=True, env=os.environ)
            for more in ([], ["BENCH=full"])
        )
    )
    assert plain.status == full.status == 0, plain.stderr + full.stderr
    assert "--rounds 5" in plain.stdout and "gpt2-medium" not in plain.stdout and "gpt2-medium" in full.stdout
