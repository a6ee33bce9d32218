"""The file formats that users give to the stages, each with the code that reads it.

A Format writes valid files into a folder, generates broken contents for one of them, and reads the folder as a stage
would.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from cuantiza.core.inputs.corpus import Source, load_splits
from cuantiza.core.inputs.model_config import max_positions, read_config, start_token
from cuantiza.core.inputs.tokenizer import encode, load_tokenizer
from cuantiza.core.onnx import file as onnx_file
from cuantiza.core.store import artifact
from lab.checkpoints.shapes import Shape
from lab.fuzz.binary import broken_bin, broken_onnx, broken_safetensors
from lab.fuzz.hostile import broken_bytes, broken_json

TINY = Shape("tiny", layers=1, width=8, heads=2, vocabulary=16, positions=8)


@dataclass(frozen=True)
class Format:
    """`prepare` fills an empty folder with valid files. `cases` turns the valid content of `file` into broken contents.
    `read` reads the folder as a stage does."""

    name: str
    file: str
    prepare: Callable[[Path], None]
    cases: Callable[[bytes], st.SearchStrategy[bytes]]
    read: Callable[[Path], object]


def _checkpoint(folder: Path) -> None:
    fields = {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 8, "vocab_size": 16}
    fields |= {"bos_token_id": 0, "eos_token_id": 0, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
    (folder / "config.json").write_text(json.dumps(fields))


def _arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in TINY.tensors()}


def _safetensors(folder: Path) -> None:
    from safetensors.numpy import save_file

    _checkpoint(folder)
    save_file(_arrays(), folder / "model.safetensors")


def _bin(folder: Path) -> None:
    import torch

    _checkpoint(folder)
    state = {name: torch.from_numpy(array) for name, array in _arrays().items()}
    torch.save(state, folder / "pytorch_model.bin")


def _read_checkpoint(folder: Path) -> None:
    from cuantiza.core.inputs.gpt2_config import parse_config
    from cuantiza.core.inputs.weights.checkpoint import read_checkpoint
    from cuantiza.export.graphs.gpt2 import build

    fields = read_config(folder)
    config = parse_config(fields, folder / "config.json")
    start_token(folder), max_positions(fields)
    model = build(config, read_checkpoint(folder).weights, 21, folder)
    for value in model.graph.initializers.values():
        value.const_value.numpy()


def _onnx(folder: Path) -> None:
    from cuantiza.core.inputs.gpt2_config import parse_config
    from cuantiza.core.inputs.weights.checkpoint import read_checkpoint
    from cuantiza.export.graphs.gpt2 import build

    _safetensors(folder)
    config = parse_config(read_config(folder), folder / "config.json")
    onnx_file.save(build(config, read_checkpoint(folder).weights, 21, folder), folder)


def _read_onnx(folder: Path) -> None:
    from cuantiza.quantize.rewrite.find import find_embeddings, find_projections, left_in_float

    model = onnx_file.load(folder / "model.onnx")
    find_projections(model.graph), find_embeddings(model.graph), left_in_float(model.graph)


def _tokenizer(folder: Path) -> None:
    # The vocabulary is small so that random damage hits the structure, not just one of 8,000 tokens.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {piece: number for number, piece in enumerate(["<|endoftext|>", "a", "h", "l", "o", "Ġ", "Ã", "ho"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("h", "o")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def _read_tokenizer(folder: Path) -> None:
    encode(load_tokenizer(folder), ("¡hola, año!",))


def _artifact(folder: Path) -> None:
    (folder / "work").mkdir()
    for name in ("model.onnx", "config.json"):
        (folder / "work" / name).write_bytes(b"{}")
    fields = {"recipe": {"type": "fp32"}, "inputs": {"a": 1}, "versions": {}, "details": {}}
    artifact.publish(folder / "work", folder / "fp32", name="fp32", model="m", parent=None, calibration=None, **fields)


def _read_artifact(folder: Path) -> None:
    artifact.rebuild_reason(folder / "fp32", {"a": 1})
    opened = artifact.open_artifact(folder / "fp32")
    for name in opened.manifest.files:
        assert (opened.path / name).resolve().parent == opened.path.resolve(), f"{name} leaves the folder"


def _corpus(suffix: str) -> Callable[[Path], None]:
    documents = [f"Documento {number}: el año que viene, ¿qué?" for number in range(6)]

    def prepare(folder: Path) -> None:
        if suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.table({"text": documents}), folder / "corpus.parquet")
        elif suffix == ".jsonl":
            lines = (json.dumps({"text": text}, ensure_ascii=False) for text in documents)
            (folder / "corpus.jsonl").write_text("\n".join(lines))
        else:
            (folder / "corpus.txt").write_text("\n<|endoftext|>\n".join(documents))

    return prepare


def _index(folder: Path) -> None:
    from cuantiza.core.inputs.corpus import write_index

    for number in range(4):
        (folder / f"{number}.txt").write_text(f"Documento {number}, el año que viene.")
    write_index(folder)


def _read_corpus(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        load_splits.cache_clear()
        load_splits(Source(str(folder / name)))

    return read


def _recipe(folder: Path) -> None:
    from cuantiza.quantize.recipes.registry import RECIPES, to_json

    (folder / "mine.json").write_text(json.dumps(to_json(RECIPES["int8-static"])))


def _read_recipe(folder: Path) -> None:
    from cuantiza.quantize.recipes.registry import get_recipe

    name, recipe = get_recipe(str(folder / "mine.json"))
    assert "/" not in name and dataclasses.is_dataclass(recipe)


def _report(folder: Path) -> None:
    from cuantiza.eval.report.schema import SCHEMA, Measured

    def row(name: str, nats: float) -> dict:
        timing = {"samples_per_round": [1] * 6, "samples_ns": [1000 + number for number in range(6)]}
        timing |= dict.fromkeys(("p50_ms", "p90_ms", "tokens_per_second", "speedup", "speedup_min", "speedup_max"), 1.0)
        latency = {"prefill": [{"tokens": 32, **timing}], "decode": [{"position": 32, **timing}], "load_ms": 1.0}
        figures = [key for key, field in Measured.model_fields.items() if "float" in str(field.annotation)]
        counts = {"bytes": 1000, "model_bytes": 900, "tokens_scored": 27, "peak_rss_bytes": 9000}
        text = {"name": name, "llama_cpp": None, "continuation": "c", "load_samples_ns": [1000]}
        nll = {"nll_by_document": [nats, 2 * nats, nats]}
        return dict.fromkeys(figures, 0.5) | text | counts | nll | latency

    machine = {"cpu": "a", "processors": 2, "threads": 2, "memory_bytes": 10**9, "system": "Linux"}
    corpus = {
        "source": "c",
        "split": "test",
        "sha256": "ab",
        "documents": 3,
        "documents_in_split": 3,
        "bytes": 9,
        "words": 9,
    }
    settings = {"onnx": [], "torch": False, "corpus": "ab", "tokens": 9, "window": 9, "rounds": 6, "code": "ab"}
    settings |= {"machine": machine, "versions": {"onnxruntime": "1"}}

    report = {
        "schema": SCHEMA,
        "model": "m",
        "corpus": corpus | {"document_tokens": [9, 9, 9], "tokens_sha256": "ab", "window_tokens": 9},
        "machine": machine,
        "versions": {"onnxruntime": "1"},
        "rounds": 6,
        "prompt": "p",
        "inputs": settings | {"artifacts": [["fp32", "a"], ["q", "b"]]},
        "artifacts": [row("fp32", 9.0), row("q", 9.5)],
    }
    for name in ("base", "report"):
        (folder / f"{name}.json").write_text(json.dumps(report))


def _compare_report(folder: Path) -> None:
    """Compare the report with a valid base against a budget, and render the comparison's page."""
    from cuantiza.eval.compare.budgets import Budget, Budgets
    from cuantiza.eval.compare.decide import Comparison, compare_reports
    from cuantiza.eval.compare.page import markdown
    from cuantiza.eval.compare.reports import read_side

    base, head = read_side(folder / "base.json"), read_side(folder / "report.json")
    checks, new = compare_reports(base, head, Budgets(Budget(0.01, 0.01, 0.1), {}), None, True)
    markdown(Comparison(head.report.model, "base", "head", "", checks, new, []))


def _budgets(folder: Path) -> None:
    text = "quality = 0.01\nsize = 2\nlatency = 10\n[recipes.int8-dynamic]\nlatency = 20\n"
    (folder / "budgets.toml").write_text(text)


def _read_budgets(folder: Path) -> None:
    from cuantiza.eval.compare.budgets import read_budgets

    read_budgets(folder / "budgets.toml").of("int8-dynamic")


def _shards(folder: Path) -> None:
    _safetensors(folder)
    shutil.move(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(_arrays(), "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _link(prepare: Callable[[Path], None]) -> Callable[[Path], None]:
    """Add a symbolic link to the prepared files that leads out of the folder."""

    def linked(folder: Path) -> None:
        prepare(folder)
        (folder / "link").symlink_to("/etc/passwd")

    return linked


FORMATS = {
    item.name: item
    for item in (
        Format("config.json", "config.json", _safetensors, broken_json, _read_checkpoint),
        Format("safetensors", "model.safetensors", _safetensors, broken_safetensors, _read_checkpoint),
        Format("safetensors index", "model.safetensors.index.json", _shards, broken_json, _read_checkpoint),
        Format("pytorch_model.bin", "pytorch_model.bin", _bin, broken_bin, _read_checkpoint),
        Format("ONNX", "model.onnx", _link(_onnx), broken_onnx, _read_onnx),
        Format("tokenizer.json", "tokenizer.json", _tokenizer, broken_json, _read_tokenizer),
        Format("manifest.json", "fp32/manifest.json", _artifact, broken_json, _read_artifact),
        Format("corpus .txt", "corpus.txt", _corpus(".txt"), broken_bytes, _read_corpus("corpus.txt")),
        Format("corpus .jsonl", "corpus.jsonl", _corpus(".jsonl"), broken_bytes, _read_corpus("corpus.jsonl")),
        Format("corpus .parquet", "corpus.parquet", _corpus(".parquet"), broken_bytes, _read_corpus("corpus.parquet")),
        Format("corpus index", "index.json", _index, broken_json, _read_corpus("")),
        Format("recipe", "mine.json", _recipe, broken_json, _read_recipe),
        Format("report.json", "report.json", _report, broken_json, _compare_report),
        Format("budgets.toml", "budgets.toml", _budgets, broken_bytes, _read_budgets),
    )
}
