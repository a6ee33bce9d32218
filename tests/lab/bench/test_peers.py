"""Each other library's row agrees with PyTorch, with and without the KV cache, and uses only the threads it gets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from lab.bench.peers import PEERS, Peer
from lab.checkpoints.random import checkpoint
from lab.checkpoints.shapes import LlamaShape

from helpers import ES_MINI, ROOT, stage

TEXT = (
    "El niño se marchó tímido hacia la plaza del pueblo, donde su abuela vendía naranjas y contaba historias de un "
    "tiempo en que los ríos hablaban con las montañas y nadie tenía prisa por llegar a ninguna parte. La ciudad "
    "amaneció cubierta de niebla; los tranvías avanzaban despacio entre los puestos del mercado y las campanas de la "
    "catedral anunciaban otra mañana de invierno sin noticias de los barcos que habían salido hacia el sur."
)
# Largest root mean square error of the logits, relative to their standard deviation; fp32 also has the absolute bound
# 1e-3.
SPREAD = {"fp32": 3e-3, "int8": 0.12, "int8 head": 0.12, "int4": 0.3}
# Each peer is tried on es-mini. onnxruntime-genai's builder does not know GPT-2. It, and those of which the files depend
# on the architecture by code of ours, are tried on these random models too.
_SMALL = {"layers": 2, "width": 128, "heads": 4, "vocabulary": 8192, "positions": 256}
_MORE = {"key_heads": 2, "head_width": 32, "hidden": 256, "rope_theta": 1e4}
LLAMAS = {kind: LlamaShape(f"tiny-{kind}", **_SMALL, **_MORE, model_type=kind) for kind in ("llama", "qwen3")}
CASES = [(peer, "es-mini") for peer in PEERS if not peer.kind.startswith("builder")]
CASES += [
    (peer, kind)
    for kind in LLAMAS
    for peer in PEERS
    if peer.module.endswith(("llama_cpp_gguf", "ort_genai", "openvino_int8", "openvino_genai_int8"))
    and peer.kind != "q4_k_m"
]
# onnxruntime-genai can run any of our artifacts. Here it runs one without calibration, which must agree as fp32 does.
QUICK = {"int8-weight-ort": ("fp32-ort", "fp32")}
# Prepares a row, runs it on one thread, and saves logits [2, V] with and without the KV cache, alone and in a batch.
PROBE = """
import importlib, json, sys, time
from pathlib import Path
import numpy as np

module, kind, checkpoint, ours, folder, ids, result = sys.argv[1:]
module, folder, ids = importlib.import_module(module), Path(folder), np.load(ids)
module.prepare(kind, Path(checkpoint), Path(ours), folder)
engine = module.Engine(kind, folder, 1)

def cached(ids, first):
    engine.start(len(ids), ids.shape[1] + 4)
    logits = engine.feed(ids[:, :first])
    for at in range(first, ids.shape[1]):
        logits = engine.feed(ids[:, at : at + 1])
    return np.array(logits)

wall, work = time.perf_counter(), time.process_time()
if getattr(engine, "steps", True):
    found = {
        "whole": np.concatenate([cached(row, 40) for row in np.split(ids, 2)]),
        "cached": np.concatenate([cached(row, 30) for row in np.split(ids, 2)]),
        "batch": cached(ids, 40),
        "cached batch": cached(ids, 30),
    }
    while time.perf_counter() - wall < 0.5:
        cached(ids, 30)
else:
    batches = np.split(ids, len(ids) // getattr(engine, "max_batch", len(ids)))
    found = {"whole": engine.logits(ids)} if hasattr(engine, "logits") else {}
    found |= {"tokens": np.concatenate([engine.generate(batch, 5) for batch in batches])}
    found |= {"times": engine.times(batches[0], 5)}
    while time.perf_counter() - wall < 0.5:
        engine.generate(batches[0], 5)
busy = (time.process_time() - work) / (time.perf_counter() - wall)
time.sleep(0.2)
work = time.process_time()
time.sleep(0.3)
idle = (time.process_time() - work) / 0.3
np.savez(result, **found)
sizes = {str(file.relative_to(folder)): file.stat().st_size for file in module.files(kind, folder)}
print(json.dumps({"busy": busy, "idle": idle, "sizes": sizes, "version": module.version()}))
"""


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token ids int64 [2, 40], as a file."""
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    tokens = Tokenizer.from_file(str(ES_MINI / "tokenizer.json")).encode(TEXT).ids
    np.save(path, np.array(tokens[:80], np.int64).reshape(2, 40))
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoints, by the names of CASES."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {"es-mini": ES_MINI} | {kind: checkpoint(shape, folder) for kind, shape in LLAMAS.items()}


@pytest.fixture(scope="module")
def expected(ids: Path, models: dict[str, Path]) -> dict[str, np.ndarray]:
    """PyTorch's float32 logits [2, V] of every checkpoint for the last token of each sequence."""
    found = {}
    for name, folder in models.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            found[name] = model(torch.from_numpy(np.load(ids))).logits[:, -1].numpy()
    return found


@pytest.fixture(scope="module")
def artifacts(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of every checkpoint's artifacts, including the one that onnxruntime-genai runs here."""
    output = tmp_path_factory.mktemp("artifacts")
    for folder in models.values():
        for command in ("export",), ("quantize", "--recipes", "fp32-ort"):
            result = stage(*command, "--model", folder, "--output", output)
            assert result.status == 0, result.stderr
    return {name: output / folder.name for name, folder in models.items()}


@pytest.mark.parametrize(("peer", "name"), CASES, ids=lambda value: value.name if isinstance(value, Peer) else value)
def test_a_peer_agrees_with_pytorch(
    peer: Peer,
    name: str,
    ids: Path,
    models: dict[str, Path],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    python = ROOT / f".venv-{peer.environment}" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no .venv-{peer.environment} here; `make peers` creates it")
    kind, precision = QUICK.get(peer.kind, (peer.kind, peer.precision))
    expected, artifacts = request.getfixturevalue("expected")[name], request.getfixturevalue("artifacts")[name]
    folder = tmp_path / "row"
    folder.mkdir()
    arguments = [peer.module, kind, models[name], artifacts, folder, ids, tmp_path / "found.npz"]
    done = subprocess.run(
        [python, "-c", PROBE, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    found = dict(np.load(tmp_path / "found.npz"))

    tokens, times = found.pop("tokens", None), found.pop("times", None)
    for way, logits in found.items():
        error = logits - expected
        assert logits.shape == expected.shape and logits.dtype == np.float32
        assert np.sqrt(np.mean(error**2)) < SPREAD[precision] * expected.std(), way
        if precision == "fp32" and peer.cache_bytes == 4:
            assert abs(error).max() < 1e-3, way
    if tokens is not None:
        assert tokens.shape == (2, 5)
        assert [*tokens[:, 0]] == [*expected.argmax(axis=-1)]
        assert len(times) == 5 and times[0] > 0 and (np.diff(times) > 0).all()
    assert answer["sizes"] and min(answer["sizes"].values()) > 0
    assert name != "es-mini" or precision != "int8" or sum(answer["sizes"].values()) < 17e6  # es-mini is 28 MB in fp32
    assert answer["busy"] < 1.2, "more than the one thread that it was given"
    assert answer["idle"] < 0.2, "threads that spin on"
    assert any(digit.isdigit() for digit in answer["version"])


def test_the_list_of_peers_needs_no_library() -> None:
    code = "import sys; sys.path.insert(0, '.'); from lab.bench.peers import PEERS; print(len(PEERS))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == str(len(PEERS)), done.stderr
    assert len({peer.name for peer in PEERS}) == len({(peer.module, peer.kind) for peer in PEERS}) == len(PEERS)
