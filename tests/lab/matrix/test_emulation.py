"""Emulated processors: comparisons, refused options, and the int8 matmul that x86 without VNNI computes wrongly."""

import json
import platform
import shutil

import numpy as np
import pytest

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Source, load_splits
from cuantiza.core.machine.child import Failed
from cuantiza.core.run.exact_int8 import EXACT, exact_products, probe, saturates
from lab.matrix.emulation import qemu as emulation
from lab.matrix.emulation.__main__ import Outcome, notes, row, token_windows
from lab.matrix.emulation.qemu import PROCESSORS

from helpers import CORPUS, ES_MINI, ROOT, assert_user_error, stage

needs_x86 = pytest.mark.skipif(
    platform.machine() != "x86_64" or not (shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")),
    reason="no qemu-x86_64 on an x86-64 machine (Debian: apt-get install qemu-user)",
)
OPTION = "session.x64quantprecision=1"


def outcome(value=0.0):
    return Outcome({"whole": np.full((1, 3, 4), value, np.float32), "cached": np.zeros((2, 4), np.float32)})


def test_difference_is_paired_and_in_nats_a_token():
    rng = np.random.default_rng(0)
    windows = rng.integers(0, 7, (3, 5))
    here = {"whole": rng.normal(size=(3, 5, 7)).astype(np.float32), "cached": np.zeros((2, 7), np.float32)}
    there = {"whole": here["whole"].copy(), "cached": here["cached"] + np.float32(0.5)}
    there["whole"][0, 2, 3] += 2
    there["whole"][2, 4] += rng.normal(
        size=7
    )  # the last token's logits predict nothing, but they still count as logits

    def nll(logits):
        p = np.exp(logits.astype(np.float64))
        p /= p.sum(axis=-1, keepdims=True)
        return [-np.mean([np.log(p[w, t, windows[w, t + 1]]) for t in range(4)]) for w in range(3)]

    changes = np.array(nll(there["whole"])) - nll(here["whole"])
    found = emulation.difference(here, there, windows)
    assert found.delta_ln_ppl == pytest.approx(changes.mean(), abs=1e-6) and abs(found.delta_ln_ppl) > 1e-3
    assert found.delta_ln_ppl_stderr == pytest.approx(changes.std(ddof=1) / 3**0.5, abs=1e-6)
    assert found.max_logit_difference == pytest.approx(max(2, np.abs(there["whole"][2] - here["whole"][2]).max()))
    assert found.max_logit_difference_cached == 0.5
    one = emulation.difference({k: v[:1] for k, v in here.items()}, {k: v[:1] for k, v in there.items()}, windows[:1])
    assert one.delta_ln_ppl_stderr is None


def test_clipping_is_what_the_option_changes():
    plain, exact = outcome(1.0), outcome()
    assert [(option, note) for option, _, note in notes(plain, exact)] == [
        (None, "sums of u8·s8 products were clipped to 16 bits"),
        (OPTION, None),
    ]
    assert [(option, note) for option, _, note in notes(plain, outcome(1.0))] == [
        (None, "no sum was clipped: the option changes nothing")
    ]
    assert notes(plain, None) == [(None, plain, None)]


def test_a_run_that_failed_says_why_and_claims_nothing():
    failed = Outcome(None, "unknown operator")
    (first, second) = notes(outcome(), failed)
    assert first[2] == "not known whether sums were clipped" and "unknown operator" in second[2]
    written = row("haswell", "int8-static", OPTION, 64, None, second[2])
    assert written["delta_ln_ppl"] is None and written["max_logit_difference"] is None
    assert notes(failed, None) == [(None, failed, "unknown operator")]


def test_windows_begin_documents_and_are_full():
    documents = load_splits(Source(str(CORPUS)))[1].documents
    windows = token_windows(ES_MINI, documents, 3, 32)
    assert windows.shape == (3, 32) and windows.dtype == np.int64
    assert (windows[:, 0] == 0).all() and len({tuple(window) for window in windows}) == 3
    with pytest.raises(UserError, match=r"--windows 9999: only \d+ test documents"):
        token_windows(ES_MINI, documents, 9999, 32)
    with pytest.raises(UserError, match="--tokens 99999: the model has"):
        token_windows(ES_MINI, documents, 1, 99999)


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--tokens", "3"], ("--tokens 3", "give 10 or more")),
        (["--threads", "0"], ("--threads 0",)),
        (["--processors", "haswell", "--artifacts", "/nowhere"], ("/nowhere", "make export quantize")),
        (["--processors", "haswell", "--recipes", "none"], ("none", "no manifest.json")),
    ],
)
def test_bad_options_are_one_line(arguments, fragments, tmp_path):
    if "haswell" in arguments and not shutil.which("qemu-x86_64"):
        pytest.skip("no qemu-x86_64: refused for that first")
    output = tmp_path / "result.json"
    assert_user_error(stage("lab.matrix.emulation", "--output", output, *arguments), *fragments)
    assert not list(tmp_path.iterdir())


def test_a_missing_emulator_is_named_with_what_installs_it(tmp_path):
    result = stage("lab.matrix.emulation", "--processors", "cortex-a72", env={"PATH": str(tmp_path)})
    assert_user_error(result, "cortex-a72", "no qemu-aarch64", "apt-get install qemu-user")


def test_a_system_that_could_not_be_made_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        raise UserError("aarch64: could not install aarch64 wheels")

    monkeypatch.setattr(emulation, "emulator", lambda _: "qemu-aarch64")
    monkeypatch.setattr(emulation, "_unpack_system", lambda _, system: system.mkdir())
    monkeypatch.setattr(emulation, "_install", refuse)
    with pytest.raises(UserError, match="wheels"):
        emulation.command(PROCESSORS["cortex-a72"], tmp_path / "systems")
    assert not [*tmp_path.iterdir()]


def test_every_aarch64_processor_has_a_cpuinfo_of_its_own():
    for processor in PROCESSORS.values():
        assert (processor.machine == "aarch64") == processor.part.startswith("0x"), processor


def test_the_option_makes_products_exact_on_this_processor():
    assert not saturates(probe(), EXACT)
    assert not saturates(probe(), exact_products())


@needs_x86
def test_x86_without_vnni_clips_and_the_option_cures_it(tmp_path):
    np.save(tmp_path / "windows.npy", np.zeros((1, 1), np.int64))
    job = {"windows": str(tmp_path / "windows.npy"), "cached": 0, "threads": 1, "runs": []}
    found = emulation.run(emulation.command(PROCESSORS["haswell"], tmp_path), job, tmp_path)
    assert found["machine"] == "x86_64"
    assert found["saturates"] and not found["saturates_with_option"]


@needs_x86
def test_a_driver_that_fails_says_so_in_one_line(tmp_path):
    np.save(tmp_path / "windows.npy", np.zeros((1, 4), np.int64))
    bad = tmp_path / "model.onnx"
    bad.write_bytes(b"no model")
    runs = [{"model": str(bad), "options": {}, "output": str(tmp_path / "logits.npz")}]
    job = {"windows": str(tmp_path / "windows.npy"), "cached": 1, "threads": 1, "runs": runs}
    with pytest.raises(Failed, match="ONNXRuntimeError") as error:
        emulation.run(emulation.command(PROCESSORS["haswell"], tmp_path), job, tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "logits.npz").exists()


@needs_x86
def test_without_vnni_our_int8_is_right_and_another_tools_needs_the_option(es_mini_fp32, tmp_path):
    artifacts = tmp_path / "artifacts"
    shutil.copytree(es_mini_fp32.path.parent, artifacts / "es-mini")
    made = stage("quantize", "--recipes", "int8-dynamic", "ort-dynamic", "--output", artifacts)
    assert made.status == 0, made.stderr
    options = ["--processors", "haswell", "--windows", 1, "--tokens", 16, "--output", tmp_path / "result.json"]
    where = [
        "--artifacts",
        artifacts / "es-mini",
        "--recipes",
        "int8-dynamic",
        "ort-dynamic",
        "--folder",
        tmp_path / "systems",
    ]
    result = stage("lab.matrix.emulation", *where, *options, timeout=3600)
    assert result.status == 0, result.stderr
    report = json.loads((tmp_path / "result.json").read_text())
    ours, clipped, cured = report["rows"]
    assert report["processors"]["haswell"]["saturates"]
    assert clipped["option"] is None and "clipped" in clipped["note"] and cured["option"] == OPTION
    assert ours["recipe"] == "int8-dynamic" and "no sum was clipped" in ours["note"]
    # Between any two processors a value may round to another integer, which moves a logit by some tenths at most.
    assert max(ours["max_logit_difference"], ours["max_logit_difference_cached"]) < 0.5
    assert clipped["max_logit_difference"] > cured["max_logit_difference"]
    assert not (tmp_path / "systems").exists()  # x86-64 needs no system of its own


@pytest.mark.skipif(
    not emulation.aarch64_system(ROOT / ".emulation").is_dir() or not shutil.which("qemu-aarch64"),
    reason="no aarch64 system in .emulation, or no qemu-aarch64: `python -m lab.matrix.emulation` makes one",
)
def test_aarch64_without_dot_product_is_exact(tmp_path):
    np.save(tmp_path / "windows.npy", np.zeros((1, 1), np.int64))
    job = {"windows": str(tmp_path / "windows.npy"), "cached": 0, "threads": 1, "runs": []}
    prefix = emulation.command(PROCESSORS["cortex-a72"], ROOT / ".emulation")
    found = emulation.run(prefix, job, tmp_path)
    assert found["machine"] == "aarch64" and "asimddp" not in found["features"] and not found["saturates"]
