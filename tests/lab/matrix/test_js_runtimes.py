"""Our artifacts in JavaScript runtimes (Node, a real Chromium, transformers.js), and the demo's tokenizer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cuantiza.core.inputs.tokenizer import load_tokenizer
from cuantiza.core.run.runtime import Runtime
from cuantiza.core.store.artifact import Artifact, open_artifact

from helpers import CORPUS, ES_MINI, ROOT, SPANISH, stage

JS = ROOT / "js"
PROMPT = "Me gusta mucho el futbol"
TOKENS, PREFILL, GENERATE = 48, 16, 16
NO_CHROMIUM = "no Chromium; install one, or name it by CHROME_PATH"

pytestmark = [
    pytest.mark.skipif(not shutil.which("node"), reason="no node on PATH"),
    pytest.mark.skipif(not (JS / "node_modules").is_dir(), reason="no js/node_modules; run `make js`"),
]
needs_chromium = pytest.mark.skipif(
    not (os.environ.get("CHROME_PATH") or any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))),
    reason=NO_CHROMIUM,
)
SCRIPTS = ("node", "transformers", pytest.param("web", marks=needs_chromium))


@pytest.fixture(scope="module")
def artifacts(es_mini_fp32: Artifact) -> dict[str, Path]:
    """{name: folder} of fp32, fp32-ort (with ONNX Runtime's own operators) and int8-dynamic."""
    folder = es_mini_fp32.path.parent
    names = ("fp32-ort", "int8-dynamic")
    result = stage("quantize", "--recipes", *names, "--output", folder.parent)
    assert result.status == 0, result.stderr
    return {name: open_artifact(folder / name).path for name in ("fp32", *names)}


@pytest.fixture(scope="module")
def ids() -> list[int]:
    """The start token and the first TOKENS - 1 tokens of a document."""
    document = sorted(CORPUS.rglob("*.txt"))[0].read_text(encoding="utf-8")
    return [0, *load_tokenizer(ES_MINI).encode(document, add_special_tokens=False).ids[: TOKENS - 1]]


def run(script: str, folder: Path, ids: list[int], output: Path) -> subprocess.CompletedProcess:
    output.mkdir(parents=True, exist_ok=True)
    job = output / "job.json"
    fields = {
        "folder": str(folder),
        "target": "ort" if folder.name.endswith("-ort") else "portable",
        "ids": ids,
        "prefill": PREFILL,
        "prompt": PROMPT,
        "generate": GENERATE,
        "threads": 2,
        "output": str(output),
    }
    job.write_text(json.dumps(fields))
    return subprocess.run(
        ["node", str(JS / "runtimes" / f"{script}.mjs"), str(job)], capture_output=True, text=True, cwd=output
    )


def reference(folder: Path, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """ONNX Runtime's logits in Python: in one pass [T, V], and through the KV cache [T - PREFILL + 1, V]."""
    runtime = Runtime(folder / "model.onnx", 2)
    tokens = np.array([ids])
    cache = runtime.cache(1, len(ids))
    rows = [runtime.step(cache, tokens[:, :PREFILL])[0].copy()]
    rows += [runtime.step(cache, tokens[:, at : at + 1])[0].copy() for at in range(PREFILL, len(ids))]
    return runtime.forward(tokens)[0], np.stack(rows)


def greedy(folder: Path, prompt: list[int], count: int) -> list[int]:
    runtime = Runtime(folder / "model.onnx", 2)
    cache = runtime.cache(1, len(prompt) + count)
    tokens: list[int] = []
    step = np.array([prompt])
    for _ in range(count):
        tokens.append(int(runtime.step(cache, step)[0].argmax()))
        step = np.array([tokens[-1:]])
    return tokens


def spread(difference: np.ndarray) -> float:
    return float(np.sqrt((difference**2).mean()))


@pytest.mark.parametrize("name", ["fp32", "fp32-ort", "int8-dynamic"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_logits_are_those_of_python(script, name, artifacts, ids, tmp_path):
    done = run(script, artifacts[name], ids, tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    found = [np.fromfile(tmp_path / result[kind], "<f4").reshape(-1, 8192) for kind in ("whole", "cached")]
    expected = reference(artifacts[name], ids)
    original = reference(artifacts["fp32"], ids)
    for ours, theirs, unquantized in zip(expected, found, original, strict=True):
        assert theirs.shape == ours.shape
        if name == "int8-dynamic":
            # Values that lie between two integers may round either way. That changes far less than int8 itself does.
            assert spread(theirs - ours) < spread(ours - unquantized)
        else:
            np.testing.assert_allclose(theirs, ours, atol=1e-3)
    loops = script == "transformers"
    assert (result["generated"] is not None) == (result["prompt_ids"] is not None) == loops
    assert set(result["skipped"]) == (set() if loops else {"generated", "prompt_ids"})
    assert any(part[0].isdigit() for part in result["version"].split())


def test_transformers_js_generates_what_python_does(artifacts, ids, tmp_path):
    done = run("transformers", artifacts["int8-dynamic"], ids, tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    prompt = load_tokenizer(ES_MINI).encode(PROMPT, add_special_tokens=False).ids
    assert result["prompt_ids"] == prompt
    assert result["generated"] == greedy(artifacts["int8-dynamic"], [0, *prompt], GENERATE)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_file_that_is_no_model_ends_with_the_reason(script, artifacts, ids, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(artifacts["fp32"], folder)
    (folder / "model.onnx").write_bytes(b"no model")
    done = run(script, folder, ids, tmp_path / "out")
    assert done.returncode == 1
    assert "protobuf" in done.stderr.strip().splitlines()[-1].lower()
    assert not (tmp_path / "out" / "result.json").exists()


def test_the_tokenizer_of_the_demo_is_pythons():
    texts = [
        *SPANISH,
        "👩‍👩‍👧 ¿y tú? <|endoftext|> fin ",
        "it's l'été\r\n\u00a0no\u2003rompe",
        *(path.read_text(encoding="utf-8") for path in sorted(CORPUS.rglob("*.txt"))[:8]),
    ]
    script = """
        import { Tokenizer } from "@huggingface/tokenizers";
        import { readFileSync } from "node:fs";
        const [folder, read] = [process.argv[1], (name) => JSON.parse(readFileSync(name))];
        const tokenizer = new Tokenizer(read(`${folder}/tokenizer.json`), read(`${folder}/tokenizer_config.json`));
        const options = { skip_special_tokens: true, clean_up_tokenization_spaces: false };
        console.log(JSON.stringify(read(0).map((text) => {
          const { ids } = tokenizer.encode(text, { add_special_tokens: false });
          return [ids, tokenizer.decode(ids, options)];
        })));
    """
    done = subprocess.run(
        ["node", "--input-type=module", "-e", script, "--", str(ES_MINI)],
        cwd=JS,
        input=json.dumps(texts),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    tokenizer = load_tokenizer(ES_MINI)
    for text, (ids, back) in zip(texts, json.loads(done.stdout), strict=True):
        assert ids == tokenizer.encode(text, add_special_tokens=False).ids, text
        assert back == tokenizer.decode(ids), text
