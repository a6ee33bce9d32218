"""The matrix of runtimes: how cells are judged and printed, and that docs/data/runtimes.json is true on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cuantiza.core.inputs.corpus import Source, load_splits
from cuantiza.core.inputs.tokenizer import load_tokenizer
from cuantiza.core.machine.child import Failed
from cuantiza.core.onnx.genai_config import GENAI_CONFIG, genai_config
from cuantiza.core.store.artifact import open_artifact
from lab.matrix import matrix
from lab.matrix.__main__ import read_emulation
from lab.matrix.matrix import PAD, PREFILL, RECIPES, TOKENS, Cell, Difference, Generated, Reference
from lab.matrix.page import Footnotes, number, page, processors
from lab.matrix.programs import Program, programs, run
from lab.matrix.reasons import Reason, explain

from helpers import CORPUS, ROOT, SPANISH, assert_user_error, stage

DOCS = ROOT / "docs"
MATRIX = json.loads((DOCS / "data" / "runtimes.json").read_text(encoding="utf-8"))
CLAIMS = {(cell["recipe"], cell["runtime"]): cell for cell in MATRIX["cells"]}
MADE = ("fp32-ort", "int8-dynamic")
# Not openvino-default, whose precision is that of the processor. tests/lab/matrix/test_js_runtimes.py runs Node and the browser on more.
CASES = [(name, recipe) for name in ("ort", "genai", "openvino", "reference") for recipe in ("fp32", *MADE)]
CASES += [(name, recipe) for name in ("optimum", "transformers") for recipe in MADE]
CASES += [("node", "int8-dynamic"), ("web", "int8-dynamic")]
VOCABULARY = 50


@pytest.fixture(scope="module")
def folders(es_mini_fp32):
    """{name: folder} of fp32 and MADE."""
    parent = es_mini_fp32.path.parent
    result = stage("quantize", "--recipes", *MADE, "--output", parent.parent)
    assert result.status == 0, result.stderr
    return {name: open_artifact(parent / name).path for name in ("fp32", *MADE)}


@pytest.fixture(scope="module")
def job(es_mini_fp32):
    return matrix.make_job(es_mini_fp32.path, load_splits(Source(str(CORPUS)))[1], 2)


@pytest.fixture(scope="module")
def references(folders, job):
    return {name: matrix.make_reference(folder, job) for name, folder in folders.items()}


@pytest.fixture
def reference():
    """Random logits of a small vocabulary, and 16 steps whose second best logit is 0.5 below the best."""
    rng = np.random.default_rng(0)
    whole = rng.normal(0, 3, (TOKENS, VOCABULARY)).astype(np.float32)
    steps = np.zeros((matrix.GENERATE, VOCABULARY), np.float32)
    steps[:, 7], steps[:, 8] = 5, 4.5
    return Reference(whole, whole[PREFILL - 1 :], [7] * matrix.GENERATE, steps, [1, 2, 3])


@pytest.fixture
def judged(reference, tmp_path):
    """`judged(noise, **result)` gives the cell of a runtime whose logits are the reference's plus `noise`."""

    def judge(noise: float = 0.0, kl: float = 0.0, **result: object) -> Cell:
        rng = np.random.default_rng(1)
        files = {}
        for name in matrix.LOGITS:
            logits = reference.logits(name)
            (logits + noise * rng.normal(0, 1, logits.shape)).astype("<f4").tofile(tmp_path / f"{name}.f32")
            files[name] = f"{name}.f32"
        fields = {"version": "some 1.0", "skipped": {}, **files, **result}
        return matrix.compare_result("x", "some", fields, tmp_path, reference, Difference(0, 0, kl, 0, TOKENS))

    return judge


def test_every_recipe_stands_beside_its_twin():
    assert RECIPES[::2] == ("fp32", "int8-dynamic", "int8-static", "int8-weight", "int4-weight", "fp16", "bf16")
    assert [f"{name}-ort" for name in RECIPES[::2]] == list(RECIPES[1::2])
    assert {matrix.target(name) for name in RECIPES[::2]} == {"portable"}
    assert {matrix.target(name) for name in RECIPES[1::2]} == {"ort"}


def test_equal_logits_are_ok(judged):
    cell = judged()
    assert cell.status == "ok" and cell.reason is None
    assert cell.whole == Difference(0, 0, cell.whole.kl, TOKENS, TOKENS)
    assert cell.padded.positions == TOKENS - PAD and cell.cached.positions == TOKENS - PREFILL + 1


def test_sums_in_another_order_are_ok_and_more_is_not(judged):
    assert judged(2e-5).status == "ok"
    cell = judged(0.05)
    assert cell.status == "differs" and cell.reason.short == "other logits"
    # The same difference is fine if quantization itself changes the logits as much, and not if it changes far less.
    assert judged(0.05, kl=cell.whole.kl).status == "ok"
    assert judged(0.05, kl=cell.whole.kl / 4).status == "differs"


def test_wrong_positions_are_caught(judged, reference, tmp_path):
    np.roll(reference.whole, 1, axis=0).tofile(tmp_path / "rolled.f32")
    cell = judged(kl=0.02, whole="rolled.f32")
    assert cell.status == "differs" and cell.whole.kl > 1 and cell.whole.same_top < TOKENS / 2


@pytest.mark.parametrize("spoil", [lambda x: x[:-1], lambda x: np.where(x == x.max(), np.nan, x)])
def test_too_few_logits_and_nan_are_a_failure(judged, reference, tmp_path, spoil):
    spoil(reference.whole).astype("<f4").tofile(tmp_path / "spoilt.f32")
    cell = judged(whole="spoilt.f32")
    assert cell.status == "fails" and "whole" in cell.reason.message


def test_another_tokenizer_is_caught(judged):
    assert judged(prompt_ids=[1, 2, 3]).same_prompt is True
    cell = judged(prompt_ids=[1, 2])
    assert cell.same_prompt is False and cell.status == "differs" and cell.reason.short == "other tokens"


def test_another_text_is_ok_where_two_tokens_are_as_good(judged, reference):
    other = [7, 7, 8, *[7] * 13]
    assert matrix.parting(reference, reference.generated) == Generated(16, 16, None)
    assert matrix.parting(reference, other) == Generated(2, 16, 0.5)
    assert judged(generated=other).reason.short == "other text"
    assert judged(0.3, kl=10, generated=other).status == "ok"  # the noise is larger than the distance of the two logits
    assert judged(generated=[7] * 5).status == "differs"  # ends early


def test_what_is_known_of_a_failure():
    known = explain("NotImplementedError: Node type 'X' from domain 'com.microsoft' is unknown, known functions: [].")
    assert known.short == "operators of ONNX Runtime" and "-ort" in known.cure
    assert explain("Segmentation fault") == Reason("fails", "Segmentation fault", None)


def test_the_page_is_that_of_its_json():
    assert (DOCS / "runtimes.md").read_text(encoding="utf-8") == page(MATRIX, read_emulation(DOCS))


def test_the_page_claims_every_cell():
    assert [row["recipe"] for row in MATRIX["rows"]] == list(RECIPES)
    assert [item["name"] for item in MATRIX["runtimes"]] == list(programs())
    assert set(CLAIMS) == {(recipe, name) for recipe in RECIPES for name in programs()}
    for cell in MATRIX["cells"]:
        assert cell["status"] in ("ok", "differs", "fails")  # every cell was run
        assert ("reason" in cell) == (cell["status"] != "ok"), cell
        # Every failure is explained and has a cure.
        assert cell["status"] == "ok" or cell["reason"]["cure"], cell


def small(*cells: dict) -> dict:
    """A matrix of one recipe."""
    names = [cell["runtime"] for cell in cells]
    return {
        **{key: MATRIX[key] for key in ("schema", "machine", "date", "floats", "tokens", "prefill", "prompt")},
        "model": "m",
        "generated": 16,
        "deviation": 3.0,
        "rows": [{"recipe": "fp32", "target": "portable"}],
        "runtimes": [{"name": name, "title": name.upper(), "missing": None} for name in names],
        "cells": [{"recipe": "fp32", **cell} for cell in cells],
    }


def test_a_cell_for_each_way_to_end():
    numbers = {"rms": 0.0, "kl": 0.0, "same_top": 47, "positions": 48}
    loop = {"same": 16, "tokens": 16, "gap": None}
    text = page(
        small(
            {"runtime": "a", "status": "ok", "version": "a 1", "whole": numbers | {"maximum": 0.0213}, "cached": numbers | {"maximum": 0.0},
             "generated": loop, "generated_padded": loop | {"same": 3}, "same_prompt": True, "skipped": {}},
            {"runtime": "b", "status": "fails", "reason": {"short": "no such thing", "message": "a | b <x>", "cure": "Do so."}},
            {"runtime": "c", "status": "missing", "reason": {"short": "not installed", "message": "no c: run `make c`", "cure": None}},
            {"runtime": "d", "status": "fails", "reason": {"short": "no such thing", "message": "a | b <x>", "cure": "Do so."}},
        )
    )  # fmt: skip
    row = next(line for line in text.splitlines() if line.startswith("| `fp32` | portable | **ok**"))
    cells = [cell.strip() for cell in row.strip("|").split(" | ")]
    assert cells[2:] == [
        "**ok**<br>0.021 · 0<br>47 of 48",
        "**no**: no such thing[^1]",
        "not installed[^2]",
        "**no**: no such thing[^1]",
    ]
    assert "| `fp32` | portable | 16, 3 |" in text
    assert r"[^1]: a \| b &lt;x&gt; — Do so." in text and r"[^2]: no c: run \`make c\`" in text
    assert "[^3]" not in text


def test_footnotes_are_numbered_once():
    notes = Footnotes()
    assert [notes.mark(text) for text in "aba"] == ["[^1]", "[^2]", "[^1]"]
    assert notes.lines() == ["[^1]: a", "[^2]: b"]


def test_numbers_have_two_digits():
    assert [number(value) for value in (0, 2.34e-5, 0.0123, 0.71, 13.2)] == ["0", "2e-5", "0.012", "0.71", "13"]


def test_emulated_processors_are_a_table():
    rows = [
        {"processor": "old", "recipe": "int8", "option": "a.b=1", "tokens": 256, "delta_ln_ppl": -0.0000001, "max_logit_difference": 0.25, "note": None},
        {"processor": "old", "recipe": "int4", "option": None, "tokens": 256, "delta_ln_ppl": None, "max_logit_difference": None, "note": "it died"},
    ]  # fmt: skip
    about = {"old": {"about": "a processor", "qemu_cpu": "Old"}}
    lines = processors({"rows": rows, "processors": about}).splitlines()
    assert lines[2] == "| old | int8 | `a.b=1` | 256 | 0.00000 | 0.25 |  |"
    assert lines[3] == "| old | int4 |  | 256 |  |  | it died |"
    assert lines[-1] == "- **old**: a processor (`qemu -cpu Old`)"
    emulation = {"rows": rows, "processors": about, "windows": 4, "tokens_per_window": 64}
    assert "## Other processors" in page(MATRIX, emulation)
    assert "## Other processors" not in page(MATRIX)


def python(code: str) -> Program:
    return Program("some", "Some", (sys.executable, "-c", code))


def test_the_last_line_of_a_failure_is_its_reason(tmp_path):
    here = {"output": str(tmp_path), "threads": 1}
    with pytest.raises(Failed, match=r"^the reason$"):
        run(python("import sys; print('noise', file=sys.stderr); sys.exit('the reason')"), here)
    with pytest.raises(Failed, match=r"^died of SIGKILL: most often a lack of memory$"):
        run(python("import os; os.kill(os.getpid(), 9)"), here)
    answer = python("import sys, json, pathlib; job = json.load(open(sys.argv[-1])); pathlib.Path(job['output'], 'result.json').write_text('{\"a\": 1}')")  # fmt: skip
    assert run(answer, here) == {"a": 1}


def test_what_hangs_is_ended_with_all_that_it_started(tmp_path):
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
time.sleep(600)
"""
    with pytest.raises(Failed, match="gave no answer in 3 s"):
        run(python(code), {"output": str(tmp_path), "threads": 1}, limit=3)
    stat = Path("/proc", (tmp_path / "pid").read_text(), "stat")

    def alive() -> bool:
        try:
            return stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except OSError:  # gone, maybe while it was read
            return False

    for _ in range(300):
        if not alive():
            return
        time.sleep(0.1)  # SIGKILL was sent, but the kernel may need a moment
    pytest.fail("the child of the child lives on")


def test_a_runtime_that_is_not_here_says_how_to_install_it(monkeypatch, tmp_path, reference):
    monkeypatch.setenv("OPTIMUM_PYTHON", str(tmp_path / "bin/python"))
    program = programs()["optimum"]
    assert program.missing() == f"no {tmp_path / 'bin/python'}: run `make optimum`"
    cell = matrix.one_cell("fp32", tmp_path, program, {}, reference, Difference(0, 0, 0, 0, 0))
    assert cell.status == "missing" and "make optimum" in cell.reason.message
    assert replace(programs()["node"], needs=(tmp_path / "x",)).missing() in (
        f"no {tmp_path / 'x'}: install Node.js 20, run `make js`",
        "no node on PATH: install Node.js 20, run `make js`",
    )


def test_bad_options_are_one_line(tmp_path):
    assert_user_error(stage("lab.matrix", "--runtimes", "tvm"), "--runtimes tvm", "choose from ort, optimum")
    assert_user_error(stage("lab.matrix", "--threads", 0), "--threads 0")
    line = assert_user_error(
        stage("lab.matrix", "--artifacts", tmp_path, "--recipes", "bf16", "--output", tmp_path / "docs"), "fp32, bf16"
    )
    assert "make quantize" in line
    assert_user_error(stage("lab.matrix", "--reprint", "--output", tmp_path), "runtimes.json", "make runtimes")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "runtimes.json").write_text('{"schema": "other"}')
    assert_user_error(stage("lab.matrix", "--reprint", "--output", tmp_path), "is not a matrix of runtimes")
    assert not (tmp_path / "runtimes.md").exists()


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_what_the_matrix_claims_is_so(name, recipe, folders, job, references):
    program = programs()[name]
    if why := program.missing():
        pytest.skip(why)
    quantization = matrix.difference(references["fp32"].whole, references[recipe].whole)
    cell = matrix.one_cell(recipe, folders[recipe], program, job, references[recipe], quantization)
    claim = CLAIMS[recipe, name]
    assert cell.status == claim["status"], cell.reason
    assert (cell.reason and cell.reason.short) == claim.get("reason", {}).get("short")
    for part in ("whole", "cached", "padded", "generated", "generated_padded"):
        assert (getattr(cell, part) is not None) == (part in claim), part
    if cell.generated:
        assert cell.same_prompt and cell.generated.same == matrix.GENERATE


def test_the_page_is_made_by_one_command(folders, tmp_path):
    options = ("--artifacts", folders["fp32"].parent.parent, "--runtimes", "ort", "reference", "--output", tmp_path)
    result = stage("lab.matrix", *options, "--recipes", "fp32-ort")
    assert result.status == 0, result.stderr
    made = json.loads((tmp_path / "data" / "runtimes.json").read_text())
    statuses = {(cell["recipe"], cell["runtime"]): cell["status"] for cell in made["cells"]}
    assert statuses == {
        ("fp32", "ort"): "ok",
        ("fp32", "reference"): "ok",
        ("fp32-ort", "ort"): "ok",
        ("fp32-ort", "reference"): "fails",
    }
    assert (tmp_path / "runtimes.md").read_text() == page(made)
    (tmp_path / "runtimes.md").unlink()
    assert stage("lab.matrix", "--reprint", "--output", tmp_path).status == 0
    assert (tmp_path / "runtimes.md").read_text() == page(made)


def test_artifacts_of_the_target_ort_know_genai(folders):
    fields = json.loads((folders["fp32-ort"] / GENAI_CONFIG).read_text())
    decoder = fields["model"].pop("decoder")
    assert fields["model"] == {
        "type": "decoder",
        "vocab_size": 8192,
        "context_length": 1024,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    assert fields["search"]["past_present_share_buffer"] is True
    sizes = ("head_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    assert [decoder[size] for size in sizes] == [64, 256, 4, 4, 6]
    assert GENAI_CONFIG in open_artifact(folders["fp32-ort"]).manifest.files
    assert not (folders["int8-dynamic"] / GENAI_CONFIG).exists()


def test_special_tokens_of_a_genai_config():
    def tokens(config: dict, generation: dict) -> list:
        sizes = {"layers": 1, "heads": 1, "head_dim": 8, "vocabulary": 9, "positions": 10, "in_place": False}
        fields = genai_config(config, generation, **sizes)["model"]
        return [fields[f"{name}_token_id"] for name in ("bos", "eos", "pad")]

    assert tokens({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}, {}) == [1, 2, 3]
    assert tokens({"bos_token_id": 1, "eos_token_id": 2}, {"eos_token_id": [5, 6], "pad_token_id": None}) == [
        1,
        [5, 6],
        5,
    ]
    assert tokens({"eos_token_id": 2}, {}) == [2, 2, 2]
    assert tokens({"bos_token_id": 4, "eos_token_id": None}, {}) == [4, 4, 4]


def test_genai_reads_the_folder_and_its_tokenizer(folders):
    interpreter = programs()["genai"]
    if why := interpreter.missing():
        pytest.skip(why)
    script = """
import json, sys
import onnxruntime_genai as genai
tokenizer = genai.Tokenizer(genai.Model(sys.argv[1]))
texts = json.load(sys.stdin)
ids = [[int(token) for token in tokenizer.encode(text)] for text in texts]
print(json.dumps([ids, [tokenizer.decode(row) for row in ids]]))
"""
    texts = [
        *SPANISH,
        "fin <|endoftext|>",
        *(path.read_text(encoding="utf-8") for path in sorted(CORPUS.glob("*.txt"))[:8]),
    ]
    done = subprocess.run(
        [interpreter.command[0], "-c", script, str(folders["fp32-ort"])],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ids, back = json.loads(done.stdout.splitlines()[-1])
    tokenizer = load_tokenizer(folders["fp32-ort"])
    for text, found, decoded in zip(texts, ids, back, strict=True):
        assert found == tokenizer.encode(text, add_special_tokens=False).ids, text
        assert decoded == tokenizer.decode(found), text
