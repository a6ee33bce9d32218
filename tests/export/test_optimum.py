"""`--exporter optimum`: real exports where optimum's environment exists, and what is refused without it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors import safe_open

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.model_config import max_positions
from cuantiza.core.inputs.model_types import OPTIMUM_TYPES
from cuantiza.core.run.runtime import Runtime
from cuantiza.core.store.artifact import Artifact
from cuantiza.export.optimum import _legacy_config, _share_weights

from helpers import ES_MINI, ROOT, Result, assert_nothing_published, assert_user_error, copy_tokenizer

PYTHON = ROOT / ".venv-optimum" / "bin" / "python"
needs_optimum = pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-optimum here; `make optimum` creates it")
TINY = {
    "vocab_size": 8192,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = TINY | {"num_key_value_heads": 2, "intermediate_size": 64}


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """`make_model(type, **config)` writes a random checkpoint, no weight at its initial 0 or 1; returns its folder."""

    def make(kind: str, **config: object) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(tmp_path / kind)
        copy_tokenizer(tmp_path / kind)
        return tmp_path / kind

    return make


@pytest.fixture
def optimum(monkeypatch: pytest.MonkeyPatch, exported: Callable[..., Artifact]) -> Callable[..., Artifact]:
    """`optimum(folder, *options)` exports a checkpoint with --exporter optimum and returns the verified artifact."""
    monkeypatch.setenv("OPTIMUM_PYTHON", str(PYTHON))
    return lambda folder, *options: exported(folder, "--exporter", "optimum", *options)


def parameters(folder: Path) -> int:
    """Count the parameters in folder/model.safetensors, which holds tied ones once."""
    with safe_open(folder / "model.safetensors", framework="np") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def names(values: list[ir.Value]) -> list[str]:
    return [value.name for value in values]


@needs_optimum
def test_gpt2_stores_its_tied_embedding_once(optimum: Callable[..., Artifact]) -> None:
    artifact = optimum(ES_MINI)
    assert set(artifact.manifest.files) == {
        "model.onnx",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert artifact.model.stat().st_size <= 1.02 * 4 * parameters(ES_MINI)
    graph = ir.load(artifact.model).graph
    cache = [f"{layer}.{kv}" for layer in range(6) for kv in ("key", "value")]
    assert names(graph.inputs) == [
        "input_ids",
        "attention_mask",
        "position_ids",
        *(f"past_key_values.{name}" for name in cache),
    ]
    assert names(graph.outputs) == ["logits", *(f"present.{name}" for name in cache)]
    assert graph.opset_imports == {"": 21}
    tables = [
        name for name, weight in graph.initializers.items() if sorted(weight.const_value.shape.numpy()) == [256, 8192]
    ]
    assert tables == ["transformer.wte.weight"]


@needs_optimum
def test_grouped_queries_and_a_rope_of_transformers_5(
    make_model: Callable[..., Path], optimum: Callable[..., Artifact]
) -> None:
    folder = make_model("llama", **GROUPED, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    assert json.loads((folder / "config.json").read_text())["rope_parameters"]["rope_theta"] == 500.0
    artifact = optimum(folder)  # parity holds only if the RoPE base of 500 reached the graph
    graph = ir.load(artifact.model).graph
    shapes = {value.name: [str(axis) for axis in value.shape] for value in (*graph.inputs, *graph.outputs)}
    assert shapes["past_key_values.1.value"] == ["batch_size", "2", "past_sequence_length", "8"]
    assert shapes["present.1.key"] == ["batch_size", "2", "past_sequence_length + sequence_length", "8"]
    assert shapes["logits"] == ["batch_size", "sequence_length", "8192"]
    assert "model.layers.1.mlp.down_proj.weight" in graph.initializers


@needs_optimum
@pytest.mark.parametrize("opset", [18, 24])
def test_bloom_takes_no_positions_and_every_opset(
    make_model: Callable[..., Path], optimum: Callable[..., Artifact], opset: int
) -> None:
    fields = {key: TINY[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "hidden_size")}
    folder = make_model("bloom", **fields, n_layer=2, n_head=4)
    artifact = optimum(folder, "--opset", opset)
    graph = ir.load(artifact.model).graph
    assert "position_ids" not in names(graph.inputs) and graph.opset_imports == {"": opset}
    assert artifact.model.stat().st_size <= 4 * parameters(folder) + 200_000


@needs_optimum
def test_chunks_after_a_padded_past(make_model: Callable[..., Path], optimum: Callable[..., Artifact]) -> None:
    """A case that parity does not cover: several tokens at once, after a padded past longer than the layer's window."""
    from transformers import AutoModelForCausalLM

    folder = make_model("mistral", **GROUPED, sliding_window=16)
    runtime = Runtime(optimum(folder).model)
    ids = np.random.default_rng(0).integers(1, 8192, (2, 100))
    mask = np.stack([np.arange(100) >= skipped for skipped in (0, 60)]).astype(np.int64)
    past, chunks = runtime.empty_past(2), []
    for begin, end in ((0, 50), (50, 51), (51, 100)):
        logits, past = runtime.extend(ids[:, begin:end], past, mask[:, :end])
        chunks.append(logits)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        positions = torch.from_numpy(np.maximum(mask.cumsum(axis=1) - 1, 0))
        wanted = model(
            input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), position_ids=positions
        ).logits.numpy()
    np.testing.assert_allclose(np.concatenate(chunks, axis=1)[mask == 1], wanted[mask == 1], rtol=1e-5, atol=1e-4)


@needs_optimum
def test_a_list_of_ends_and_a_pad_beyond_the_vocabulary(
    make_model: Callable[..., Path], optimum: Callable[..., Artifact]
) -> None:
    folder = make_model("qwen2", **GROUPED)
    config = json.loads((folder / "config.json").read_text())
    ids = {"bos_token_id": None, "eos_token_id": [0, 5], "pad_token_id": 8192}
    (folder / "config.json").write_text(json.dumps(config | ids))
    (folder / "generation_config.json").unlink()
    artifact = optimum(folder)
    fields = json.loads((artifact.path / "config.json").read_text())
    assert (fields["bos_token_id"], fields["eos_token_id"], fields.get("pad_token_id")) == (0, [0, 5], None)
    (line,) = artifact.manifest.details["warnings"]
    assert "pad_token_id" in line and "8192" in line


def test_ids_are_decided_before_the_export(refused: Callable[..., str], tmp_path: Path) -> None:
    """An interpreter that cannot export anything is not even started."""
    folder = with_config(tmp_path / "m", model_type="llama", eos_token_id=9000)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "special_tokens_map.json").unlink()
    words = {"type": "WordLevel", "vocab": {"hola": 0, "mundo": 1}, "unk_token": "hola"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": words}))
    refused(folder, sys.executable, "config.json", "bos_token_id", "9000")


@pytest.mark.parametrize("vocabulary", [None, "8192", 0])
def test_the_size_of_the_vocabulary_is_needed(refused: Callable[..., str], tmp_path: Path, vocabulary: object) -> None:
    folder = with_config(tmp_path / "m", model_type="llama", vocab_size=vocabulary)
    refused(folder, sys.executable, "config.json", f"vocab_size is {vocabulary!r}")


@needs_optimum
def test_weights_of_another_shape_are_one_line(make_model: Callable[..., Path], refused: Callable[..., str]) -> None:
    folder = make_model("llama", **GROUPED)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    refused(folder, str(PYTHON), str(folder), "optimum's exporter failed (")


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, export_here: Callable[..., Result], tmp_path: Path) -> Callable[..., str]:
    """`refused(folder, python, *fragments)` returns the one line that the user sees; nothing is published."""

    def call(folder: Path, python: str, *fragments: str) -> str:
        monkeypatch.setenv("OPTIMUM_PYTHON", python)
        result = export_here("--model", folder, "--exporter", "optimum", "--output", tmp_path / "out")
        assert_nothing_published(tmp_path / "out")
        return assert_user_error(result, *fragments)

    return call


def with_config(folder: Path, **fields: object) -> Path:
    copy_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 8192, "eos_token_id": 0, **fields}))
    return folder


def test_unknown_architecture_is_refused_with_the_list(refused: Callable[..., str], tmp_path: Path) -> None:
    line = refused(with_config(tmp_path / "xglm", model_type="xglm"), "/nowhere/python", "config.json", "'xglm'")
    assert all(kind in line for kind in OPTIMUM_TYPES)


def test_missing_interpreter_is_one_line(refused: Callable[..., str], tmp_path: Path) -> None:
    refused(
        with_config(tmp_path / "m", model_type="llama"),
        "/nowhere/python",
        "OPTIMUM_PYTHON=/nowhere/python",
        "make optimum",
    )


def test_interpreter_without_optimum_is_one_line(refused: Callable[..., str], make_gpt2: Callable[..., Path]) -> None:
    refused(make_gpt2(), sys.executable, f"OPTIMUM_PYTHON={sys.executable}", "no optimum-onnx", "make optimum")


def test_damaged_weights_are_named(refused: Callable[..., str], make_gpt2: Callable[..., Path]) -> None:
    folder = make_gpt2()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(folder, sys.executable, "model.safetensors", "cut short")


@pytest.mark.parametrize("rope", [{"rope_type": "dynamic", "factor": 2.0}, {"type": "longrope"}])
def test_length_dependent_rope_is_refused(refused: Callable[..., str], tmp_path: Path, rope: dict) -> None:
    refused(
        with_config(tmp_path / "m", model_type="llama", rope_scaling=rope), "/nowhere/python", "changes with the length"
    )


@pytest.mark.parametrize(
    ("kind", "rope", "legacy"),
    [
        ("llama", {"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5}),
        (
            "phi",
            {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.4},
            {"rope_theta": 1e4, "partial_rotary_factor": 0.4},
        ),
        (
            "gpt_neox",
            {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
            {"rotary_emb_base": 1e4, "rotary_pct": 0.25},
        ),
        (
            "llama",
            {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        ),
        (
            "gemma3_text",
            {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
        ),
    ],
)
def test_rope_of_transformers_5_in_the_words_of_4(kind: str, rope: dict, legacy: dict) -> None:
    assert (
        _legacy_config({"model_type": kind, "rope_parameters": rope}, Path("config.json"))
        == {"model_type": kind} | legacy
    )


def test_a_rope_for_each_layer_type_is_refused() -> None:
    rope = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}}
    with pytest.raises(UserError, match="each type of layer"):
        _legacy_config({"model_type": "llama", "rope_parameters": rope}, Path("config.json"))


@pytest.mark.parametrize(
    ("fields", "positions"),
    [
        ({"n_positions": 2048}, 2048),
        ({"max_position_embeddings": 512}, 512),
        ({"max_seq_len": 64}, 64),
        ({}, 1024),
        ({"n_positions": None}, 1024),
        ({"n_positions": True, "max_position_embeddings": 256.0}, 256),
        ({"max_position_embeddings": 1e300}, 1024),
    ],
)
def test_positions_under_every_name(fields: dict, positions: int) -> None:
    assert max_positions(fields) == positions


def test_equal_and_transposed_weights_are_stored_once() -> None:
    table = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    arrays = {
        "table": table,
        "same": table.copy(),
        "head": table.T.copy(),
        "other": table.T + 1,
        "zeros": np.zeros(4, np.float32),
    }
    arrays["zeros2"] = arrays["zeros"].copy()
    weights = {name: ir.val(name, const_value=ir.tensor(array, name=name)) for name, array in arrays.items()}
    ids, x = ir.val("ids", ir.DataType.INT64, [None]), ir.val("x", ir.DataType.FLOAT, [None, 4])
    nodes = [
        ir.node("Gather", [weights["table"], ids]),
        ir.node("Gather", [weights["same"], ids]),
        ir.node("MatMul", [x, weights["head"]]),
        ir.node("MatMul", [x, weights["other"]]),
        ir.node("Add", [x, weights["zeros"]]),
        ir.node("Add", [x, weights["zeros2"]]),
    ]
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([ids, x], outputs, nodes=nodes, initializers=list(weights.values()), opset_imports={"": 21})
    _share_weights(graph)
    assert sorted(graph.initializers) == ["other", "table", "zeros", "zeros2"]
    assert outputs[1].producer().inputs[0] is weights["table"]
    transpose = outputs[2].producer().inputs[1].producer()
    assert transpose.op_type == "Transpose" and transpose.inputs[0] is weights["table"]
