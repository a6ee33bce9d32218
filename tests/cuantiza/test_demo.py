"""The demo page, used like a visitor in a real Chromium, and its command, used like a user."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
import pytest

from cuantiza.core.inputs.tokenizer import load_tokenizer
from cuantiza.core.run.runtime import Runtime
from cuantiza.core.store.artifact import Artifact, open_artifact

from helpers import ROOT, assert_user_error, stage

JS = ROOT / "js"
PROMPT = "Me gusta mucho el futbol"

needs_node = pytest.mark.skipif(not shutil.which("node"), reason="no node on PATH")
needs_packages = pytest.mark.skipif(not (JS / "node_modules").is_dir(), reason="no js/node_modules; run `make js`")
needs_chromium = pytest.mark.skipif(
    not (os.environ.get("CHROME_PATH") or any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))),
    reason="no Chromium; install one, or name it by CHROME_PATH",
)


def in_browser(test):
    return needs_node(needs_packages(needs_chromium(test)))


@pytest.fixture(scope="module")
def int8(es_mini_fp32: Artifact) -> Path:
    """The folder of the int8-dynamic artifact."""
    folder = es_mini_fp32.path.parent
    result = stage("quantize", "--recipes", "int8-dynamic", "--output", folder.parent)
    assert result.status == 0, result.stderr
    return open_artifact(folder / "int8-dynamic").path


@contextmanager
def served(*command: object) -> Iterator[str]:
    """The address at which `python -m command` serves on this machine; Ctrl-C ends it with status 0."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        port = re.search(r"(?:127\.0\.0\.1:| port )(\d+)", line)
        assert port, line + process.stderr.read()
        yield f"http://127.0.0.1:{port[1]}/"
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    if command[0] == "cuantiza.demo":  # Python's own server prints a traceback where a browser closes a download midway
        assert "Traceback" not in errors, errors


def visit(url: str, folder: Path, **what: object) -> dict:
    """The observations of js/demo_check.mjs at `url`."""
    check = folder / "check.json"
    check.write_text(json.dumps({"url": url, **what}))
    done = subprocess.run(["node", str(JS / "demo_check.mjs"), str(check)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def greedy(artifact: Path, count: int) -> tuple[str, list[int], list[float]]:
    """(text, tokens, how far each token's logit is above the second largest), from ONNX Runtime in Python."""
    tokenizer = load_tokenizer(artifact)
    runtime = Runtime(artifact / "model.onnx", 2)
    prompt = [0, *tokenizer.encode(PROMPT, add_special_tokens=False).ids]
    cache = runtime.cache(1, len(prompt) + count)
    tokens: list[int] = []
    margins: list[float] = []
    step = np.array([prompt])
    for _ in range(count):
        logits = runtime.step(cache, step)[0]
        second, first = np.partition(logits, -2)[-2:]
        margins.append(float(first - second))
        tokens.append(int(logits.argmax()))
        step = np.array([tokens[-1:]])
    return tokenizer.decode(tokens), tokens, margins


def asks(**changes: object) -> dict:
    return {"prompt": PROMPT, "length": 24, "temperature": 0, "topK": 40, "seed": 1, **changes}


def assert_undisturbed(seen: dict) -> None:
    assert seen["console"] == []
    assert {urlsplit(url).hostname for url in seen["requests"]} == {"127.0.0.1"}
    assert seen["alert"] is None and seen["unlabelled"] == [] and seen["overflow"] <= 0


@in_browser
def test_the_page_continues_text_as_python_does(int8, es_mini_fp32, tmp_path):
    runs = [asks(), asks(temperature=0.8, length=16), asks(temperature=0.8, length=16, seed=2)]
    runs += [runs[1], asks(temperature=1.5, topK=1), asks(length=256, stopAfter=20)]
    with served("cuantiza.demo", "--artifact", int8, "--port", 0) as url:
        seen = visit(url, tmp_path, runs=runs, language="es", processors=4, reload=True)
    assert_undisturbed(seen)
    assert {run["focused"] for run in seen["runs"]} == {"go"}, "after the end, and after Stop"
    assert all(run["visible"] for run in seen["runs"])
    assert seen["reloaded"] == {name: str(value) for name, value in asks(length=256).items()} | {"title": seen["title"]}
    assert seen["isolated"] and seen["title"] == "Continúa el texto"
    first, drawn, other, again, narrow, stopped = seen["runs"]
    _, tokens, margins = greedy(int8, 24)
    # The browser's sums differ in their last bits, so either token may win if two logits are nearly equal.
    sure = next((at for at, margin in enumerate(margins) if margin < 0.1), 24)
    assert sure >= 12
    assert first["written"].startswith(load_tokenizer(int8).decode(tokens[:sure]))
    assert first["given"] == PROMPT and first["tokens"] == "24" and first["status"] == "Listo."
    assert float(first["perSecond"].replace(",", ".")) > 0 and int(first["first"].replace(".", "")) >= 0
    assert first["grown"] >= 20, "the text is to appear token by token"
    assert "int8-dynamic" in first["about"] and "2 hilos" in first["about"], "half of the processors"
    assert first["settings"] == ["24", "0,00", "40"] and narrow["settings"] == ["24", "1,50", "1"]
    assert drawn["written"] == again["written"] != other["written"]
    assert narrow["written"] == first["written"], "the likeliest token alone, however hot"
    assert stopped["status"] == "Parado." and 20 <= int(stopped["tokens"]) < 256


@in_browser
@pytest.mark.parametrize("viewport", [{"width": 1280, "height": 720}, {"width": 390, "height": 844}])
def test_a_long_prompt_leaves_the_continuation_in_sight(int8, tmp_path, viewport):
    """Of a long prompt the last words stand in front of the continuation; all of it is what the model is given."""
    words = " ".join(f"palabra{number}" for number in range(400))
    runs = [asks(prompt=prompt, length=8) for prompt in (words, "línea\n" * 60, "á" * 2000, PROMPT)]
    with served("cuantiza.demo", "--artifact", int8, "--port", 0) as url:
        seen = visit(url, tmp_path, runs=runs, language="en", viewport=viewport)
    long, lines, unbroken, short = seen["runs"]
    assert [run["visible"] for run in seen["runs"]] == [True] * 4
    assert long["given"].startswith("… palabra") and long["given"].endswith(" palabra399") and len(long["given"]) <= 301
    assert lines["given"] == "…" + "línea\n" * 5 and unbroken["given"] == "…" + "á" * 300
    assert short["given"] == PROMPT
    assert "were ignored" in long["status"], "the model was given all of it"


@in_browser
def test_fp32_in_english_on_a_phone(es_mini_fp32, tmp_path):
    with served("cuantiza.demo", "--artifact", es_mini_fp32.path, "--port", 0) as url:
        phone = {"width": 390, "height": 844}
        seen = visit(url, tmp_path, runs=[asks(length=16)], language="en-GB", viewport=phone, dark=True)
    assert_undisturbed(seen)
    assert seen["title"] == "Continue the text" and seen["runs"][0]["status"] == "Done."
    assert seen["runs"][0]["written"] == greedy(es_mini_fp32.path, 16)[0]


@in_browser
def test_a_built_folder_works_from_any_server(int8, tmp_path):
    site = tmp_path / "site"
    for _ in range(2):  # a second time replaces it
        result = stage("cuantiza.demo", "--artifact", int8, "--build", site)
        assert result.status == 0, result.stderr
    assert "Copyright (c) Microsoft" in (site / "licenses.txt").read_text(encoding="utf-8")
    assert "Apache License" in (site / "license-tokenizers.txt").read_text(encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with served("http.server", port, "--bind", "127.0.0.1", "--directory", site) as url:
        seen = visit(url, tmp_path, runs=[asks()], language="es")
        assert_undisturbed(seen)
        assert not seen["isolated"] and "1 hilo" in seen["runs"][0]["about"]
        assert seen["runs"][0]["tokens"] == "24"
        (site / "model.onnx").unlink()
        seen = visit(url, tmp_path, runs=[asks()], language="es")
    assert "model.onnx: HTTP 404" in seen["alert"] and seen["runs"][0]["written"] == ""


@in_browser
def test_a_browser_without_simd_is_told(int8, tmp_path):
    with served("cuantiza.demo", "--artifact", int8, "--port", 0) as url:
        seen = visit(url, tmp_path, noSimd=True, language="en")
    assert "WebAssembly SIMD" in seen["alert"] and seen["disabled"]
    assert not [url for url in seen["requests"] if url.endswith((".onnx", ".wasm"))]


@needs_node
def test_sampling():
    script = """
        import { generator, median, sample, top } from "./cuantiza/demo/web/sampling.js";
        const logits = Float32Array.from([0, Math.log(2), -5, Math.log(5), Math.log(2)]);
        const draw = (options, seed, count) => {
          const random = generator(seed);
          return Array.from({ length: count }, () => sample(logits, options, random));
        };
        console.log(JSON.stringify({
          top: top(logits, 3), all: top(logits, 9), greedy: draw({ temperature: 0, topK: 3 }, 1, 1),
          drawn: draw({ temperature: 1, topK: 4 }, 1, 20000), cold: draw({ temperature: 0.01, topK: 5 }, 1, 200),
          medians: [median([]), median([3]), median([9, 1, 2]), median([4, 1, 2, 9])],
        }));
    """
    done = subprocess.run(["node", "--input-type=module", "-e", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["top"] == [3, 1, 4] and found["all"] == [3, 1, 4, 0, 2]
    assert found["greedy"] == [3] and set(found["cold"]) == {3}
    shares = np.bincount(found["drawn"], minlength=5) / 20000
    np.testing.assert_allclose(shares, [0.1, 0.2, 0, 0.5, 0.2], atol=0.015)
    assert found["medians"] == [None, 3, 2, 3]


@needs_packages
def test_sigterm_ends_it_and_leaves_nothing(int8, tmp_path):
    command = [sys.executable, "-u", "-m", "cuantiza.demo", "--artifact", int8, "--port", "0"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert b"http://" in process.stdout.readline() and list(tmp_path.iterdir())
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors, list(tmp_path.iterdir())) == (128 + signal.SIGTERM, b"", [])


@needs_packages
def test_a_broken_name_is_not_found(int8):
    with served("cuantiza.demo", "--artifact", int8, "--port", 0) as url, pytest.raises(HTTPError, match="404"):
        urlopen(f"{url}%00")


def test_a_missing_artifact_is_one_line(tmp_path):
    assert_user_error(stage("cuantiza.demo", "--artifact", tmp_path / "nowhere"), "nowhere", "no manifest.json")
    assert_user_error(stage("cuantiza.demo", "--port", 70000), "--port 70000")


@needs_packages
def test_bad_places_are_one_line(es_mini_fp32, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_user_error(
            stage("cuantiza.demo", "--artifact", es_mini_fp32.path, "--port", port), f"--port {port}", "in use"
        )
    (tmp_path / "thesis.txt").write_text("mine")
    line = assert_user_error(stage("cuantiza.demo", "--artifact", es_mini_fp32.path, "--build", tmp_path), "not ours")
    assert "--build" in line and [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
