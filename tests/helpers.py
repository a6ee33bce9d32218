"""What tests call: small real checkpoints, the stages as a user runs them, and what an error looks like."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cuantiza.core import contract
from cuantiza.core.inputs.weights.pytorch import call_once_alone
from cuantiza.core.onnx import file as onnx_file
from cuantiza.core.store import artifact

if TYPE_CHECKING:
    import onnx_ir as ir

    from cuantiza.core.run.runtime import Runtime

ROOT = Path(__file__).resolve().parent.parent
ES_MINI = ROOT / "models" / "es-mini"
CORPUS = ROOT / "corpus" / "es"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
SPANISH = (
    "¿Dónde está el camión? ¡Qué vergüenza, Ñuñoa!",
    "Dijo: «Aquí no se fía», y el niño —pálido, tímido— se marchó… 1987, 3,5 % y 20 °C.",
    "PINGÜINO averigüéis\n\n  dos espacios\ty un tabulador; crème brûlée, 日本, 🦎 e\u0301",
)


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    status: int
    stdout: str
    stderr: str


def stage(*args: object, env: dict[str, str] | None = None, timeout: float = 300, **kwargs) -> Result:
    """`python -m args[0] args[1:]` from the repository root, as a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, args)],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        **kwargs,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def assert_user_error(result: Result, *fragments: str) -> str:
    """The user sees one line `error: ...` with `fragments` in it, status 2, and no traceback. Gives that line."""
    assert "Traceback" not in result.stderr, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and result.status == 2, (result.status, result.stderr)
    assert result.stderr.rstrip().splitlines()[-1] == lines[0], result.stderr
    for fragment in fragments:
        assert fragment in lines[0], f"{fragment!r} is not in {lines[0]!r}"
    return lines[0]


def assert_nothing_published(output: Path) -> None:
    """No artifact and no work in progress anywhere below `output`."""
    left = (
        [path for path in output.rglob("*") if path.is_file() and path.name != ".cuantiza.lock"]
        if output.is_dir()
        else []
    )
    assert not left, left
    assert not list(output.rglob(".tmp-*"))


def tiny_gpt2(seed: int = 0, **overrides: object):
    """A random GPT2LMHeadModel: 2 layers, width 32, es-mini's vocabulary.

    No weight keeps its initial 0 or 1: a graph that forgot a bias or a scale would pass otherwise.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    fields = {
        "vocab_size": 8192,
        "n_positions": 128,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **overrides,
    }
    call_once_alone()
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2)
            if ".ln_" in name and name.endswith("weight"):
                parameter.add_(1)
    return model


def tiny_llama(kind: str = "llama", seed: int = 0, **overrides: object):
    """A random model of type `kind`, which has a graph here: 4 layers of width 32, 4 heads of 6 over 2 of keys.

    No weight keeps its initial 0 or 1, as in `tiny_gpt2`, and head_dim is not the width over the heads. Types that know
    no head_dim or shared keys have 4 heads of 8.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {
        "vocab_size": 8192,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        **overrides,
    }
    call_once_alone()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def saved(model, folder: Path) -> Path:
    """Write the checkpoint of `model` to `folder`, as transformers does; gives the folder."""
    model.save_pretrained(folder)
    return folder


def differences(model, runtime: Runtime, tokens: int = 40) -> list[float]:
    """The largest |Δ logit| of `runtime` to the PyTorch `model`, in a batch that is padded on the left.

    First in one pass, then in pieces of 3 and 1 tokens through the cache.
    """
    import torch

    ids = np.random.default_rng(0).integers(0, 8192, (2, tokens))
    mask = np.stack([np.arange(tokens) >= skipped for skipped in (0, tokens // 3)]).astype(np.int64)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        feeds = {name: torch.from_numpy(array) for name, array in contract.token_feeds(ids, mask).items()}
        wanted = model(**feeds).logits.numpy()
    past, pieces, start = runtime.empty_past(2), [], 0
    while start < tokens:
        end = min(start + (3 if start % 2 else 1), tokens)
        logits, past = runtime.extend(ids[:, start:end], past, mask[:, :end])
        pieces.append(logits)
        start = end
    found, real = [runtime.forward(ids, mask), np.concatenate(pieces, axis=1)], mask.astype(bool)
    return [float(np.abs(logits - wanted)[real].max()) for logits in found]


def copy_tokenizer(folder: Path, names: tuple[str, ...] = TOKENIZER_FILES) -> None:
    """Give `folder` files of es-mini's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(ES_MINI / name, folder / name)


def report_row(name: str, **changes: object) -> dict:
    """A row of report.json with every field, as a recipe that changes nothing has them."""
    timing = {"p50_ms": 2.0, "p90_ms": 2.2, "tokens_per_second": 500.0, "samples_per_round": [3]}
    timing |= {"speedup": 1.0, "speedup_min": 0.9, "speedup_max": 1.1, "samples_ns": [1_900_000, 2_000_000, 2_200_000]}
    quality = {"tokens_scored": 100, "perplexity": 65.0, "perplexity_stderr": 3.0, "bits_per_byte": 1.6}
    quality |= {"word_perplexity": 900.0, "byte_perplexity": 3.1, "delta_ln_ppl": 0.0, "delta_ln_ppl_stderr": 0.0}
    quality |= dict.fromkeys(("kl_divergence", "kl_divergence_stderr", "kl_divergence_p50", "kl_divergence_p99"), 0.0)
    quality |= {"top1_agreement": 1.0, "top1_agreement_stderr": 0.0, "nll_by_document": [210.0, 207.0]}
    latency = {"load_ms": 20.0, "load_samples_ns": [20_000_000], "peak_rss_bytes": 10**8}
    latency |= {"prefill": [{"tokens": 512, **timing}], "decode": [{"position": 128, **timing}]}
    alone = {"llama_cpp": None, "continuation": " y el perro", "key_error": None}
    return {"name": name, "bytes": 1_000_000, "model_bytes": 900_000, **quality, **alone, **latency, **changes}


def report_fields(rows: list[dict], **changes: object) -> dict:
    """The content of a report.json with `rows`, the first of which is the baseline."""
    machine = {"cpu": "a CPU", "processors": 2, "threads": 2, "memory_bytes": 2**34, "system": "Linux"}
    versions = {"python": "3.11", "onnxruntime": "1.32.0"}
    corpus = {"source": "corpus/es", "split": "test", "sha256": "0" * 64, "documents": 2, "documents_in_split": 45}
    corpus |= {"bytes": 400, "words": 70, "document_tokens": [50, 50], "tokens_sha256": "ab" * 32, "window_tokens": 512}
    inputs = {"artifacts": [[row["name"], "0" * 64] for row in rows], "onnx": [], "torch": False, "corpus": "0" * 64}
    inputs |= {"tokens": 100, "window": 512, "rounds": 3, "machine": machine, "code": "0" * 64, "versions": versions}
    fields = {"schema": "cuantiza/report/1", "model": "es-mini", "corpus": corpus, "machine": machine}
    fields |= {"versions": versions, "rounds": 3, "prompt": "Me gusta mucho el futbol", "inputs": inputs}
    return fields | {"artifacts": rows} | changes


def edit_config(folder: Path, **changes: object) -> None:
    """Change fields of a checkpoint's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict], None]) -> None:
    """Change the tensors of a checkpoint's model.safetensors."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def variant(source: artifact.Artifact, folder: Path, change: Callable[[ir.Model], None]) -> artifact.Artifact:
    """An artifact at folder/<recipe> whose graph is `source`'s with `change` made to it."""
    model = onnx_file.load(source.model)
    change(model)
    work = folder / "work"
    work.mkdir(parents=True)
    artifact.copy_companions(source.path, work)
    onnx_file.save(model, work)
    told = source.manifest
    return artifact.publish(
        work,
        folder / told.name,
        name=told.name,
        model=told.model,
        recipe=told.recipe,
        inputs=told.inputs,
        parent=told.parent,
        calibration=told.calibration,
        versions=told.versions,
        details=told.details,
    )
