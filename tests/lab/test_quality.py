"""The page on quality beside peers: its figures are the report's, fp32 beside itself is exact, who wins follows from them."""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Source, load_splits
from cuantiza.core.machine import child
from cuantiza.core.store.artifact import Artifact, open_artifact
from cuantiza.eval.measure.engines import Subject
from cuantiza.eval.measure.quality import Task, make_task, measure_quality
from cuantiza.eval.measure.score import Scores
from lab.bench import ours
from lab.quality import page, rows, score
from lab.quality.__main__ import measure_row
from lab.quality.rows import Row

from helpers import CORPUS, ES_MINI, ROOT, stage

PYTHON = ROOT / ".venv-peers" / "bin" / "python"
ROW = {
    "name": "int8-static",
    "ours": True,
    "bits": 8,
    "how": "recipe `int8-static`",
    "bytes": 7_000_000,
    "version": "onnxruntime 1.2.3",
    "seconds": 12.3,
    "anonymous_bytes": 250_000_000,
    "perplexity": 66.1,
    "delta_ln_ppl": 0.0123,
    "delta_ln_ppl_stderr": 0.0011,
    "kl_divergence": 0.02,
    "kl_divergence_stderr": 0.001,
    "kl_divergence_p50": 0.01,
    "kl_divergence_p99": 0.1,
    "kl_divergence_p999": 0.2,
    "kl_divergence_max": 0.3,
    "rms_change_of_p": 0.0123,
    "top1_agreement": 0.95,
    "top1_agreement_stderr": 0.002,
    "kl_by_document": [2.0, 4.0, 6.0],
}
TOKENS = [100, 200, 300]
MODEL = {
    "model": "es-mini",
    "fp32": "a digest",
    "fp32_bytes": 28_000_000,
    "fp32_perplexity": 65.2,
    "corpus": "corpus/es",
    "document_tokens": TOKENS,
    "documents_in_split": 45,
    "tokens_sha256": "another digest",
    "window_tokens": 512,
    "calibration_windows": [32, 512],
    "cpu": "A processor",
    "threads": 2,
}


def peer(name: str, size: int, factor: float, **fields: object) -> dict:
    """A peer's row: `factor` times the KL of ROW on every document."""
    sums = [factor * value for value in ROW["kl_by_document"]]
    return (
        ROW
        | {"name": name, "ours": False, "bytes": size, "kl_by_document": sums, "kl_divergence": 0.02 * factor}
        | fields
    )


# --- measuring ---


@pytest.fixture(scope="module")
def task(es_mini_fp32: Artifact) -> Task:
    _, test = load_splits(Source(str(CORPUS)))
    return make_task(es_mini_fp32.path, test, 700, 128)


@pytest.fixture(scope="module")
def reference(es_mini_fp32: Artifact, tmp_path_factory: pytest.TempPathFactory) -> score.Reference:
    return score.Reference(es_mini_fp32, tmp_path_factory.mktemp("logits"), 1)


def our_row(item: Artifact) -> Row:
    return Row("fp32", "fp32", ours.__name__, Path(sys.executable), item.path, 32, "not quantized")


def test_fp32_beside_itself_loses_nothing(
    es_mini_fp32: Artifact, reference: score.Reference, task: Task, tmp_path: Path
) -> None:
    found = score.measure(our_row(es_mini_fp32), reference, task, 1, tmp_path)
    # Rounding can leave the KL of equal distributions at a few 1e-9 rather than at 0, never more.
    assert found["kl_divergence_max"] < 1e-8 and found["kl_divergence_p50"] < 1e-8
    assert found["delta_ln_ppl"] == found["rms_change_of_p"] == 0 and found["top1_agreement"] == 1
    assert found["perplexity"] == score.fp32_perplexity(reference, task)
    assert len(found["kl_by_document"]) == len(task.documents)


def test_the_figures_are_those_of_the_report(
    es_mini_fp32: Artifact, reference: score.Reference, task: Task, tmp_path: Path
) -> None:
    output = es_mini_fp32.path.parent.parent
    done = stage("quantize", "--model", ES_MINI, "--output", output, "--recipes", "bf16")
    assert done.status == 0, done.stderr
    item = open_artifact(output / "es-mini" / "bf16")
    found = score.measure(our_row(item), reference, task, 1, tmp_path)
    subjects = [Subject("fp32", "onnx", es_mini_fp32.model), Subject("bf16", "onnx", item.model)]
    report = measure_quality(subjects, task, 1)["bf16"]
    assert {name: found[name] for name in score.FIELDS} == {name: report[name] for name in score.FIELDS}
    assert found["kl_divergence"] > 0
    assert found["kl_divergence_p99"] <= found["kl_divergence_p999"] <= found["kl_divergence_max"]
    assert sum(found["kl_by_document"]) == pytest.approx(found["kl_divergence"] * report["tokens_scored"])


def test_the_tail_of_scores() -> None:
    document = np.array([0, 0, 1])
    base = Scores(document, -np.log([0.5, 0.2, 0.1]), np.zeros(3, bool))
    own = Scores(
        document, -np.log([0.4, 0.2, 0.3]), np.zeros(3, bool), np.array([0.1, 0.2, 0.6]), np.array([True, True, False])
    )
    found = score.tail(own, base)
    assert found["kl_divergence_max"] == 0.6
    assert found["rms_change_of_p"] == pytest.approx(np.sqrt((0.1**2 + 0 + 0.2**2) / 3))
    assert found["kl_by_document"] == pytest.approx([0.3, 0.6])


def test_a_library_that_is_not_installed_is_skipped(
    es_mini_fp32: Artifact, reference: score.Reference, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEERS_PYTHON", str(tmp_path / "no-python"))
    [row] = rows.select(rows.all_rows(es_mini_fp32.path.parent, tmp_path / "peers"), ["CTranslate2*"])
    args = argparse.Namespace(corpus=CORPUS, threads=1, work=tmp_path)
    found = measure_row(row, ES_MINI, args, tmp_path / "windows.npy", reference, task, tmp_path)
    assert found["skipped"] == "not installed: run `make peers`" and found["name"] == "CTranslate2 int8"


def test_logits_that_are_not_numbers_are_no_figures(tmp_path: Path) -> None:
    class Broken:
        def ask(self, *question: object) -> None:
            np.save(tmp_path / "logits.npy", np.array([[0.0, np.nan]], np.float32))

    with pytest.raises(child.Failed, match="gives logits that are not numbers"):
        score.Answers(Broken(), tmp_path / "logits.npy", 2).start("logits", np.array([0]))


def test_rows_are_named_once_and_selected_by_pattern() -> None:
    known = rows.all_rows(Path("artifacts"), Path("peers"))
    names = [row.name for row in known]
    assert len(set(names)) == len(names)
    assert [row.name for row in rows.select(known, ["llama.cpp Q4_0*"])] == ["llama.cpp Q4_0", "llama.cpp Q4_0 imatrix"]
    assert [row.is_ours for row in rows.select(known, ["int8-static", "ONNX Runtime dynamic"])] == [True, False]
    with pytest.raises(UserError, match="--rows nothing: matches none of"):
        rows.select(known, ["nothing"])


def test_the_list_of_peers_needs_no_library() -> None:
    code = "import sys; sys.path.insert(0, '.'); from lab.quality.peers import PEERS; print(len(PEERS))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout) > 10, done.stderr


# --- the page ---


def test_who_wins_follows_from_the_figures() -> None:
    small_and_good = peer("small and good", 6_000_000, 0.5)
    large_and_good = peer("large and good", 8_000_000, 0.1)
    found = [ROW, small_and_good, large_and_good, peer("small and bad", 5_000_000, 4.0), peer("large", 9_000_000, 3.0)]
    assert page.beaten(found, TOKENS) == [(ROW, [small_and_good])]
    # Nothing of ours is as small as the bad one either, so it stands alone; what a peer beats is left out.
    names = [row["name"] for row in page.unmatched(found, TOKENS)]
    assert names == ["small and bad", "small and good", "large and good"]
    assert page.beaten([ROW, large_and_good], TOKENS) == []
    assert page.unmatched([ROW, peer("larger and worse", 8_000_000, 2.0)], TOKENS) == []


def test_a_difference_within_its_error_is_no_win() -> None:
    """A KL that is lower on one document and higher on another by as much is not lower."""
    noisy = peer("noisy", 7_000_000, 1.0, kl_by_document=[3.0, 4.0, 4.9])
    assert not page.wins(noisy, ROW, TOKENS) and not page.wins(ROW, noisy, TOKENS)
    better = peer("better", 7_000_000, 1.0, kl_by_document=[1.9, 3.8, 5.7])
    assert page.wins(better, ROW, TOKENS) and not page.wins(better | {"bytes": 7_000_001}, ROW, TOKENS)


def test_what_is_measured_again_joins_the_rest(tmp_path: Path) -> None:
    path, order = tmp_path / "quality.json", ["int8-static", "A", "B"]
    first = page.join(path, MODEL | {"rows": [peer("B", 1, 1.0), ROW]}, order)
    assert [row["name"] for row in first["models"][0]["rows"]] == ["int8-static", "B"]
    path.write_text(json.dumps(first))
    again = page.join(path, MODEL | {"rows": [peer("A", 2, 1.0), peer("B", 3, 1.0)]}, order)
    assert [(row["name"], row["bytes"]) for row in again["models"][0]["rows"]] == [
        ("int8-static", 7_000_000),
        ("A", 2),
        ("B", 3),
    ]
    other = page.join(path, MODEL | {"model": "another", "rows": [ROW]}, order)
    assert [item["model"] for item in other["models"]] == ["es-mini", "another"]
    # Other tokens: the rows of before cannot stand beside these.
    shorter = page.join(path, MODEL | {"tokens_sha256": "x", "rows": [peer("A", 2, 1.0)]}, order)
    assert [row["name"] for row in shorter["models"][0]["rows"]] == ["A"]


def test_the_page_and_its_plot_are_made_of_the_json(tmp_path: Path) -> None:
    missing = {"name": "torchao 8da4w", "ours": False, "bits": 4, "how": "a way", "skipped": "not installed"}
    report = {
        "schema": page.SCHEMA,
        "models": [MODEL | {"rows": [ROW, peer("llama.cpp Q8_0", 6_500_000, 0.5), missing]}],
    }
    page.publish(copy.deepcopy(report), tmp_path / "quality-peers.json")
    text = (tmp_path / "quality-peers.md").read_text(encoding="utf-8")
    assert "## es-mini on corpus/es" in text and "600 tokens of 3 of the 45 test documents" in " ".join(text.split())
    line = "| 7.0 | 0.0123 ± 0.0011 | 0.020 ± 0.0010 | 0.010 | 0.10 | 0.20 | 0.30 | 1.23 | 95.0 ± 0.2 | 12 | 250 |"
    assert f"| `int8-static` {line}" in text
    assert "| `int8-static` | 7.0 | 0.020 ± 0.0010 | llama.cpp Q8_0 (6.5 MB, KL 0.010 ± 0.0010) |" in text
    assert "- torchao 8da4w: not installed" in text
    plot = (tmp_path / "figures" / "quality-peers-es-mini-corpus-es.svg").read_text(encoding="utf-8")
    assert ">int8-static<" in plot and ">llama.cpp Q8_0<" in plot and "torchao" not in plot


def test_the_projects_page_is_that_of_its_json(tmp_path: Path) -> None:
    data = tmp_path / "data" / page.JSON.name
    data.parent.mkdir()
    page.publish(json.loads(page.JSON.read_text(encoding="utf-8")), data)
    assert data.read_bytes() == page.JSON.read_bytes()
    made = [tmp_path / "quality-peers.md", *sorted((tmp_path / "figures").iterdir())]
    for file in made:
        assert file.read_bytes() == (ROOT / "docs" / file.relative_to(tmp_path)).read_bytes(), file.name


# --- the peers' own environment ---

# Writes a small random Llama as GGUF and reads it back as the maker of SmolLM2 does; prints the largest difference of a
# weight, and of the logits that llama.cpp computes from the file.
ROUND_TRIP = """
import json, sys
from pathlib import Path
import numpy as np, torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from lab.checkpoints import gguf_file
from lab.bench.peers.llama_cpp_gguf import Engine
from lab.checkpoints.smollm2 import convert

work, tokenizer = Path(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
config = LlamaConfig(vocab_size=8192, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0)
model = LlamaForCausalLM(config).eval()
model.save_pretrained(work / "model")
PreTrainedTokenizerFast(tokenizer_file=tokenizer).save_pretrained(work / "model")
gguf_file.write(work / "model", Path(tokenizer), work / "f32.gguf")
convert(work / "f32.gguf", work / "back")
again = AutoModelForCausalLM.from_pretrained(work / "back")
weights = zip(model.state_dict().items(), again.state_dict().values(), strict=True)
ids = np.arange(1, 33)
with torch.inference_mode():
    logits = model(torch.from_numpy(ids)[None]).logits[0].numpy()
print(json.dumps({
    "weights": max(float((one - other).abs().max()) for (_, one), other in weights),
    "config": json.loads((work / "back/config.json").read_text()).get("quantization_config"),
    "logits": float(abs(Engine("f32", work, 1).all_logits(ids) - logits).max()),
    "size": float(abs(logits).max()),
}))
"""


@pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-peers here; `make peers` creates it")
def test_a_llama_comes_back_from_gguf_as_it_was(tmp_path: Path) -> None:
    command = [PYTHON, "-c", ROUND_TRIP, tmp_path, ES_MINI / "tokenizer.json"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["weights"] == 0 and found["config"] is None
    assert found["logits"] < 0.01 * found["size"]  # keys and values are in f16 there


# Measures the importance of random inputs, and what it says of them computed otherwise.
IMPORTANCE = """
import json, sys
from pathlib import Path
import numpy as np, torch
from transformers import AutoModelForCausalLM
from lab.quality.peers.llama_cpp import importance

checkpoint = Path(sys.argv[1])
windows = np.random.default_rng(0).integers(0, 8000, (3, 16))
found = importance(checkpoint, windows)
model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
with torch.inference_mode():
    first = model.transformer.h[0].ln_1(model(torch.from_numpy(windows), output_hidden_states=True).hidden_states[0])
error = np.abs(found["blk.0.attn_qkv.weight"] - first.square().mean((0, 1)).numpy()).max()
print(json.dumps({"names": len(found), "error": float(error)}))
"""


@pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-peers here; `make peers` creates it")
def test_importance_is_the_mean_square_of_each_input() -> None:
    done = subprocess.run([PYTHON, "-c", IMPORTANCE, ES_MINI], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["names"] == 6 * 4 and found["error"] < 1e-4  # 4 linear layers in each of 6 layers, and no head


# Quantizes a small random GPT-2 (onnx_quantize: es-mini's fp32 graph) by every kind of a module; prints the largest
# error of the logits that its engine computes from the files, beside the standard deviation of fp32's.
FROM_FILES = """
import importlib, json, sys
from pathlib import Path
import numpy as np, torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

name, ours, checkpoint, work = sys.argv[1], *map(Path, sys.argv[2:5])
module = importlib.import_module(name)
if not checkpoint.exists():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=8192, n_positions=64, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(checkpoint)
model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
windows = np.random.default_rng(0).integers(0, 8192, (3, 32))
np.save(work / "calibration.npy", windows)
ids = windows[0, :20]
with torch.inference_mode():
    expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()
errors = {}
for kind in sys.argv[5:]:
    folder = work / kind
    folder.mkdir()
    more = () if "onnx_quantize" in name else (work / "calibration.npy",)
    module.prepare(kind, checkpoint, ours, folder, *more)
    assert all(file.is_file() for file in module.files(kind, folder))
    found = module.Engine(kind, folder, 1).all_logits(ids)
    errors[kind] = float(np.sqrt(np.mean((found - expected) ** 2)) / expected.std())
print(json.dumps(errors))
"""
# The root mean square of the error, as a share of the logits' standard deviation. Rounding to 8 bits leaves under 3 %.
KINDS = {
    "auto_round_int": {"int8": 0.03, "int4": 0.3},
    "neural_compressor_int": {"int8": 0.1, "gptq": 0.3, "awq": 0.3},
    "onnx_quantize_int": {"int8-weights": 0.03, "int4": 0.3},
}


@pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-peers here; `make peers` creates it")
@pytest.mark.parametrize("module", KINDS)
def test_logits_of_a_peers_files_are_nearly_fp32s(module: str, es_mini_fp32: Artifact, tmp_path: Path) -> None:
    checkpoint = ES_MINI if module.startswith("onnx") else tmp_path / "model"
    name = f"lab.quality.peers.{module}"
    command = [PYTHON, "-c", FROM_FILES, name, es_mini_fp32.path.parent, checkpoint, tmp_path, *KINDS[module]]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    if "ModuleNotFoundError" in done.stderr:
        pytest.skip(f"{done.stderr.splitlines()[-1]}; run `make peers` again")
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    for kind, bound in KINDS[module].items():
        assert 0 < errors[kind] < bound, (kind, errors)
