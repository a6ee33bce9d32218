"""The gate on real artifacts: it passes copies, and catches what is worse, larger or slower.

`pytest -m slow tests/eval/compare/test_compare_gate.py` compares identical artifacts twenty times and measures a slower one.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from cuantiza.core.inputs.corpus import Source, load_splits
from cuantiza.core.machine.process import Remote
from cuantiza.core.store import artifact, folders
from cuantiza.eval.compare.latency import Pair, measure_pairs
from cuantiza.eval.measure.engines import Engine, Subject
from cuantiza.eval.measure.quality import make_task
from cuantiza.eval.measure.score import score

from helpers import CORPUS, assert_user_error, stage, variant

TOKENS = 2500
QUICK = ("--tokens", TOKENS)


def renamed(model: ir.Model) -> None:
    """Another file of the same graph."""
    model.metadata_props["copy"] = "1"


def larger(model: ir.Model) -> None:
    """A twentieth more bytes, in a weight that nothing uses."""
    nbytes = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    padding = ir.tensor(np.zeros(nbytes // 19, np.uint8), name="padding")
    model.graph.register_initializer(ir.Value(name="padding", const_value=padding))


def slower(model: ir.Model) -> None:
    """The products of four of the six MLPs twice, about a third more time. The second one's input is scaled, so that it is no common subexpression, and its
    result is added, far below the last digit, so that it is no dead one either."""
    half = ir.Value(name="half", const_value=ir.tensor(np.float32(0.5), name="half"))
    little = ir.Value(name="little", const_value=ir.tensor(np.float32(1e-20), name="little"))
    for value in (half, little):
        model.graph.register_initializer(value)
    for node in list(model.graph):
        if node.op_type == "MatMul" and re.match(r"h\.[0-3]\.mlp\.", node.inputs[1].name or ""):
            product = node.outputs[0]
            scaled = ir.node("Mul", [node.inputs[0], half])
            again = ir.node("MatMul", [scaled.outputs[0], node.inputs[1]])
            small = ir.node("Mul", [again.outputs[0], little])
            total = ir.node("Add", [product, small.outputs[0]])
            ir.convenience.replace_all_uses_with(product, total.outputs[0])
            total.replace_input_with(0, product)
            model.graph.insert_after(node, [scaled, again, small, total])


def noisy(share: float) -> Callable[[ir.Model], None]:
    """Normal noise on the weights of every projection, `share` of the weights' own standard deviation."""

    def change(model: ir.Model) -> None:
        generator = np.random.default_rng(0)
        for name, value in model.graph.initializers.items():
            weight = value.const_value.numpy()
            if weight.ndim == 2 and name.startswith("h."):
                spoilt = weight + generator.normal(0, share * weight.std(), weight.shape).astype(np.float32)
                value.const_value = ir.tensor(spoilt.astype(np.float32), name=name)

    return change


@pytest.fixture(scope="module")
def es_mini_fp32(es_mini_fp32, tmp_path_factory):
    """A copy in a folder of its own, since other tests put further artifacts beside the one that they share."""
    folder = tmp_path_factory.mktemp("gate") / "es-mini"
    shutil.copytree(es_mini_fp32.path, folder / "fp32")
    (folder / folders.LOCK).touch()
    return artifact.open_artifact(folder / "fp32")


def spoilt_by(base: artifact.Artifact, folder: Path, wanted: float) -> artifact.Artifact:
    """`base` with noise that costs `wanted` nats per token of the text that is compared, to a tenth."""
    task = make_task(base.path, load_splits(Source(str(CORPUS)))[1], TOKENS, 512)
    share = 0.1
    with Remote(Engine, Subject("base", "onnx", base.model), 2) as one:
        for number in range(8):
            head = variant(base, folder / str(number), noisy(share))
            with Remote(Engine, Subject("head", "onnx", head.model), 2) as other:
                theirs, ours = score(task.rolling, [one, other])
            delta = float(np.mean(ours.nll - theirs.nll))
            if abs(delta - wanted) < wanted / 10:
                return head
            share *= min(2.0, max(0.5, math.sqrt(max(wanted / delta, 0)))) if delta else 2.0  # about its variance
    raise AssertionError(f"no noise costs {wanted} nats; {share} costs {delta}")


def compare(base: Path, head: Path, output: Path, *options: object):
    return stage("cuantiza", "compare", base, head, "--output", output / "compare.md", *options, timeout=3600)


def verdicts(output: Path) -> dict[tuple[str, str], str]:
    """{(recipe, figure): first word of the verdict} of the page."""
    rows = re.findall(r"^\| (\S+) \| ([^|]+?) \| .*\| ([^|]+?) \|$", (output / "compare.md").read_text(), re.MULTILINE)
    return {(recipe, figure): re.sub(r"[*]", "", last) for recipe, figure, last in rows if recipe != "recipe"}


def test_copies_pass_and_are_really_evaluated(es_mini_fp32, tmp_path):
    copy = variant(es_mini_fp32, tmp_path / "head", renamed)
    assert copy.digest != es_mini_fp32.digest
    result = compare(es_mini_fp32.path.parent, copy.path.parent, tmp_path, *QUICK, "--without-latency")
    assert result.status == 0, result.stderr
    assert verdicts(tmp_path) == {
        ("fp32", "ln perplexity"): "ok (KL 0.00000 nats, same top token 100.0 %, last words 2.2 % (+0 −0, p 1.000))",
        ("fp32", "size"): "ok",
    }
    assert "es-mini: no regression" in result.stdout and "quality" in result.stderr


def test_the_same_file_is_not_measured(es_mini_fp32, tmp_path):
    folder = shutil.copytree(es_mini_fp32.path.parent, tmp_path / "head")
    (folder / folders.LOCK).unlink(missing_ok=True)  # as a download leaves it
    result = compare(es_mini_fp32.path.parent, folder, tmp_path)
    assert result.status == 0, result.stderr
    assert verdicts(tmp_path) == {("fp32", "all"): "same file"} and "quality" not in result.stderr
    for text in ((tmp_path / "compare.md").read_text(), result.stdout):
        assert "nothing was measured" in text and not re.search("rounds|threads|Change of ln perplexity", text)


def test_larger_is_caught(es_mini_fp32, tmp_path):
    head = variant(es_mini_fp32, tmp_path / "head", larger)
    size = [sum(file.bytes for file in item.manifest.files.values()) for item in (es_mini_fp32, head)]
    assert 1.045 < size[1] / size[0] < 1.055
    result = compare(es_mini_fp32.path.parent, head.path.parent, tmp_path, *QUICK, "--without-latency")
    assert result.status == 1 and "fp32, size: +5." in result.stdout, result.stderr
    assert verdicts(tmp_path)["fp32", "size"] == "regression"


@pytest.mark.parametrize(
    "wanted",
    [
        pytest.param(0.02, id="2 % of perplexity"),
        pytest.param(0.084, id="2 % of ln perplexity", marks=pytest.mark.slow),  # easier still
    ],
)
def test_worse_is_caught(es_mini_fp32, tmp_path, wanted):
    head = spoilt_by(es_mini_fp32, tmp_path / "heads", wanted)
    result = compare(es_mini_fp32.path.parent, head.path.parent, tmp_path, *QUICK, "--without-latency")
    assert result.status == 1, result.stderr
    delta = float(re.search(r"fp32, ln perplexity: \+(\S+) ", result.stdout).group(1))
    assert abs(delta - wanted) < wanted / 10 + 1e-4
    assert verdicts(tmp_path)["fp32", "ln perplexity"].startswith("regression")
    assert verdicts(tmp_path)["fp32", "size"] == "ok"


def test_a_graph_that_gives_no_numbers_is_a_regression(es_mini_fp32, tmp_path):
    def broken(model: ir.Model) -> None:
        weight = model.graph.initializers["ln_f.bias"]
        weight.const_value = ir.tensor(np.full(weight.shape.numpy(), np.nan, np.float32), name="ln_f.bias")

    head = variant(es_mini_fp32, tmp_path / "head", broken)
    result = compare(es_mini_fp32.path.parent, head.path.parent, tmp_path, *QUICK, "--without-latency")
    assert result.status == 1 and "not finite" in result.stdout, result.stderr


@pytest.mark.parametrize(
    "spoil, fragments",
    [
        (lambda head: (head / "model.onnx").write_bytes(b"garbage"), ("model.onnx", "run make again")),
        (lambda head: (head / "manifest.json").write_text("{"), ("manifest.json", "broken manifest")),
        (lambda head: head.rename(head.with_name("int8")), ("lacks fp32", "--recipes")),
    ],
)
def test_folders_that_cannot_be_compared(es_mini_fp32, tmp_path, spoil, fragments):
    head = variant(es_mini_fp32, tmp_path / "head", renamed)
    spoil(head.path)
    result = compare(es_mini_fp32.path.parent, head.path.parent, tmp_path)
    assert_user_error(result, *fragments)
    assert not (tmp_path / "compare.md").exists()


def test_another_tokenizer(es_mini_fp32, tmp_path):
    head = variant(es_mini_fp32, tmp_path / "head", renamed)
    shutil.copytree(head.path, tmp_path / "work")
    text = (tmp_path / "work/tokenizer.json").read_text(encoding="utf-8")
    # One merge less: the same vocabulary, other tokens.
    merges = re.search(r'"merges":\s*\[\s*(\[[^\]]*\]|"[^"]*"),', text)
    (tmp_path / "work/tokenizer.json").write_text(text[: merges.start(1)] + text[merges.end(1) + 1 :], encoding="utf-8")
    (tmp_path / "work/manifest.json").unlink()
    told = head.manifest
    fields = {
        key: getattr(told, key)
        for key in ("name", "model", "recipe", "inputs", "parent", "calibration", "versions", "details")
    }
    artifact.publish(tmp_path / "work", head.path, **fields)
    assert_user_error(compare(es_mini_fp32.path.parent, head.path.parent, tmp_path), "tokenizers or contexts differ")


def test_a_report_beside_a_folder(es_mini_fp32, tmp_path):
    (tmp_path / "report.json").write_text("{}")
    assert_user_error(compare(tmp_path, es_mini_fp32.path.parent, tmp_path), "two reports, or two folders")
    assert_user_error(compare(es_mini_fp32.path, es_mini_fp32.path, tmp_path), "single artifact", "--recipes fp32")
    assert_user_error(compare(tmp_path / "nowhere", es_mini_fp32.path.parent, tmp_path), "nowhere", "does not exist")
    assert_user_error(compare("", "", tmp_path), "BASE=: is empty")


def test_samples_alternate_and_processes_are_fresh(es_mini_fp32):
    pair = Pair("fp32", es_mini_fp32.model, es_mini_fp32.model)
    timed = measure_pairs([pair], np.arange(1024) % 500, 1024, 2, 2, "latency")["fp32"]
    assert list(timed) == [
        "prefill 32",
        "prefill 128",
        "prefill 512",
        "decode at 32",
        "decode at 128",
        "decode at 512",
        "decode at 1023",
    ]
    assert all(len(item.ln_ratios) == 2 and item.base_ms > 0 < item.head_ms for item in timed.values())


@pytest.fixture(scope="module")
def int8(es_mini_fp32):
    """int8-dynamic beside fp32: the shortest steps, and so the noisiest."""
    folder = es_mini_fp32.path.parent
    result = stage("quantize", "--recipes", "int8-dynamic", "--output", folder.parent, timeout=3600)
    assert result.status == 0, result.stderr
    return artifact.open_artifact(folder / "int8-dynamic")


@pytest.mark.slow
def test_twenty_comparisons_of_the_same_artifact_raise_no_alarm(int8, tmp_path):
    copy = variant(int8, tmp_path / "head", renamed)
    alarms = []
    for _ in range(20):
        (tmp_path / "compare.md").unlink(missing_ok=True)
        result = compare(int8.path.parent, copy.path.parent, tmp_path, *QUICK, "--recipes", "int8-dynamic")
        assert result.status in (0, 1) and "Traceback" not in result.stderr, result.stderr
        assert len(verdicts(tmp_path)) == 2 + 7
        if result.status:
            alarms.append(result.stdout)
    assert not alarms


@pytest.mark.slow
def test_slower_is_caught(es_mini_fp32, tmp_path):
    head = variant(es_mini_fp32, tmp_path / "head", slower)
    result = compare(es_mini_fp32.path.parent, head.path.parent, tmp_path, *QUICK, "--recipes", "fp32")
    print(result.stdout)
    assert result.status == 1, result.stderr
    found = verdicts(tmp_path)
    assert found["fp32", "size"] == "ok" and found["fp32", "ln perplexity"].startswith("ok")
    assert any(
        verdict.startswith("regression")
        for (_, figure), verdict in found.items()
        if figure.startswith(("prefill", "decode"))
    )
