"""Every layout of GPT-2 checkpoints on disk, through the export stage and its parity check."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from cuantiza.core.inputs.gpt2_config import ACTIVATIONS
from cuantiza.core.inputs.model_config import start_token
from cuantiza.core.run.runtime import Runtime
from cuantiza.core.store.artifact import Artifact, open_artifact

from helpers import CORPUS, ES_MINI, SPANISH, copy_tokenizer, stage, tiny_gpt2

CONTRACT_FILES = {"model.onnx", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
# The config.json of datificate/gpt2-small-spanish has these fields; transformers 2.x wrote it in 2020.
CONFIG_2020 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 0,
    "embd_pdrop": 0.1,
    "eos_token_id": 0,
    "gradient_checkpointing": False,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 128,
    "n_embd": 32,
    "n_head": 2,
    "n_layer": 2,
    "n_positions": 128,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 8192,
}


def write_json(path: Path, fields: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fields, indent=2), encoding="utf-8")


def state_of_2020(model) -> dict[str, torch.Tensor]:
    """Make the state_dict that transformers 2.x and 3.x saved.

    It has the prefix, the head, and the mask of every layer as if it were a weight.
    """
    positions = model.config.n_positions
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    for layer in range(model.config.n_layer):
        state[f"transformer.h.{layer}.attn.bias"] = (
            torch.ones(positions, positions, dtype=torch.uint8).tril().view(1, 1, positions, positions)
        )
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return state


def write_2020(folder: Path, model, zipped: bool) -> None:
    write_json(folder / "config.json", CONFIG_2020)
    torch.save(state_of_2020(model), folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    copy_tokenizer(folder, ("vocab.json", "merges.txt"))
    write_json(folder / "tokenizer_config.json", {"model_max_length": 128})
    write_json(
        folder / "special_tokens_map.json", dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    )
    (folder / "tf_model.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64))
    (folder / "flax_model.msgpack").write_bytes(bytes(64))


def initializers(artifact: Artifact) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(artifact.model).graph.initializer}


def assert_weights(artifact: Artifact, model) -> None:
    """Assert that the file holds every parameter of `model` once, bit for bit, and no causal masks."""
    found = initializers(artifact)
    wanted = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    assert wanted.keys() == {name for name in found if name.endswith((".weight", ".bias"))}
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(found[name], tensor.float().numpy(), err_msg=name)


def assert_contract(artifact: Artifact) -> None:
    assert set(artifact.manifest.files) == CONTRACT_FILES
    assert {file.name for file in artifact.path.iterdir()} == CONTRACT_FILES | {"manifest.json"}
    parity = artifact.manifest.details["parity"]
    assert 0 <= max(parity["whole"], parity["cached"], parity["padded"]) <= 1e-4
    onnx.checker.check_model(str(artifact.model), full_check=True)


def assert_tokenizer(artifact: Artifact, checkpoint: Path) -> None:
    """Assert that tokenizer.json alone gives the ids of the checkpoint's tokenizer and decodes them to the text."""
    ours = Tokenizer.from_file(str(artifact.path / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(checkpoint)
    texts = [*SPANISH, *(file.read_text(encoding="utf-8") for file in sorted(CORPUS.glob("*.txt"))[:5])]
    for text in texts:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids, skip_special_tokens=False) == text
    # transformers can open the artifact's folder, with the same result.
    reopened = AutoTokenizer.from_pretrained(artifact.path)
    assert reopened(SPANISH[1])["input_ids"] == theirs(SPANISH[1])["input_ids"]
    assert reopened.eos_token == theirs.eos_token
    assert start_token(artifact.path) == 0


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_layout_of_2020(exported: Callable[..., Artifact], tmp_path: Path, zipped: bool) -> None:
    model, folder = tiny_gpt2(), tmp_path / "gpt2-small-spanish"
    write_2020(folder, model, zipped)
    artifact = exported(folder)
    assert_weights(artifact, model)
    assert_contract(artifact)
    assert_tokenizer(artifact, folder)
    # The tokenizer that is made from vocab.json and merges.txt equals the original one.
    made, whole = (Tokenizer.from_file(str(path / "tokenizer.json")) for path in (artifact.path, ES_MINI))
    assert [made.encode(text).ids for text in SPANISH] == [whole.encode(text).ids for text in SPANISH]
    assert json.loads((artifact.path / "config.json").read_text()) == CONFIG_2020
    generation = json.loads((artifact.path / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (0, 0)


def test_layout_of_2020_as_a_user_runs_it(tmp_path: Path) -> None:
    """In separate processes, a second run has nothing to do, and a changed weight is noticed."""
    folder, output = tmp_path / "gpt2-small-spanish", tmp_path / "artifacts"
    write_2020(folder, tiny_gpt2(), zipped=False)
    first = stage("export", "--model", folder, "--output", output)
    assert first.status == 0, first.stderr
    assert first.stderr.count("\n") == 2 and "parity" in first.stderr and "Warning" not in first.stderr
    built = (output / folder.name / "fp32" / "model.onnx").read_bytes()
    second = stage("export", "--model", folder, "--output", output)
    assert second.status == 0 and "up to date" in second.stderr
    write_2020(folder, tiny_gpt2(seed=1), zipped=True)
    third = stage("export", "--model", folder, "--output", output)
    assert third.status == 0 and "changed: checkpoint" in third.stderr, third.stderr
    artifact = open_artifact(output / folder.name / "fp32")
    assert artifact.model.read_bytes() != built
    assert_weights(artifact, tiny_gpt2(seed=1))


OWN_TOKENIZERS = {
    "as-trained": {},
    "prefix-space": {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    },
    "normalizer": {"normalizer": {"type": "NFC"}},
}


@pytest.mark.parametrize("name", OWN_TOKENIZERS)
def test_weights_and_tokenizer_json_alone(exported: Callable[..., Artifact], tmp_path: Path, name: str) -> None:
    """In this layout of PlanTL-GOB-ES/gpt2-base-bne, tokenizer.json decides, even where transformers would differ."""
    model, folder = tiny_gpt2(), tmp_path / "gpt2-base-bne"
    write_json(folder / "config.json", {key: value for key, value in CONFIG_2020.items() if key != "n_ctx"})
    torch.save(state_of_2020(model), folder / "pytorch_model.bin")
    fields = json.loads((ES_MINI / "tokenizer.json").read_text(encoding="utf-8")) | OWN_TOKENIZERS[name]
    write_json(folder / "tokenizer.json", fields)
    artifact = exported(folder)
    assert_weights(artifact, model)
    assert_contract(artifact)
    own, ours = (Tokenizer.from_file(str(path / "tokenizer.json")) for path in (folder, artifact.path))
    assert [ours.encode(text).ids for text in SPANISH] == [own.encode(text).ids for text in SPANISH]
    if name == "as-trained":
        assert_tokenizer(artifact, folder)


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_shards(exported: Callable[..., Artifact], tmp_path: Path, kind: str) -> None:
    model, folder = tiny_gpt2(), tmp_path / f"sharded-{kind}"
    copy_tokenizer(folder)
    if kind == "safetensors":
        model.save_pretrained(folder, max_shard_size="400KB")
    else:
        model.config.save_pretrained(folder)
        names, shards = list(state_of_2020(model).items()), 3
        index = {}
        for number in range(shards):
            part = dict(names[number::shards])
            file = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
            torch.save(part, folder / file)
            index |= dict.fromkeys(part, file)
        write_json(folder / "pytorch_model.bin.index.json", {"metadata": {"total_size": 1}, "weight_map": index})
    assert len(list(folder.glob(f"*-of-*.{kind}"))) >= 2
    artifact = exported(folder)
    assert_weights(artifact, model)


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_no_prefix(exported: Callable[..., Artifact], tmp_path: Path, kind: str) -> None:
    """OpenAI's own gpt2 has neither the prefix nor the head, and its masks are float buffers."""
    model, folder = tiny_gpt2(), tmp_path / f"bare-{kind}"
    copy_tokenizer(folder)
    model.config.save_pretrained(folder)
    state = {
        name.removeprefix("transformer."): tensor.float()
        for name, tensor in state_of_2020(model).items()
        if name != "lm_head.weight"
    }
    if kind == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert_weights(exported(folder), model)


def test_safetensors_is_preferred(exported: Callable[..., Artifact], tmp_path: Path) -> None:
    model, folder = tiny_gpt2(), tmp_path / "both"
    model.save_pretrained(folder)
    copy_tokenizer(folder)
    torch.save(state_of_2020(tiny_gpt2(seed=1)), folder / "pytorch_model.bin")
    assert_weights(exported(folder), model)


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=lambda dtype: str(dtype).removeprefix("torch.")
)
def test_dtypes(exported: Callable[..., Artifact], tmp_path: Path, dtype: torch.dtype, kind: str) -> None:
    """16-bit weights become float32 without a change of their values."""
    model, folder = tiny_gpt2().to(dtype), tmp_path / "model"
    if kind == "safetensors":
        model.save_pretrained(folder)
    else:
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    copy_tokenizer(folder)
    artifact = exported(folder)
    assert_weights(artifact, model)
    assert all(array.dtype == np.float32 for name, array in initializers(artifact).items() if name.endswith("weight"))


def test_untied_head(exported: Callable[..., Artifact], make_gpt2: Callable[..., Path]) -> None:
    artifact = exported(make_gpt2("untied", tie_word_embeddings=False))
    model = tiny_gpt2(tie_word_embeddings=False)
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    assert_weights(artifact, model)
    assert_contract(artifact)


def test_tied_embedding_is_stored_once(exported: Callable[..., Artifact], tiny_folder: Path) -> None:
    artifact = exported(tiny_folder)
    parameters = sum(parameter.numel() * 4 for parameter in tiny_gpt2().parameters())
    assert parameters < artifact.model.stat().st_size < parameters + 50_000


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(exported: Callable[..., Artifact], make_gpt2: Callable[..., Path], activation: str) -> None:
    exported(make_gpt2(activation.replace("_", "-"), activation_function=activation))


SHAPES = {
    "scores-not-scaled": {"scale_attn_weights": False},
    "scores-scaled-by-layer": {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3},
    "both": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    "upcast": {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    "one-layer": {"n_layer": 1},
    "one-head": {"n_head": 1, "n_embd": 40},
    "head-width-1": {"n_head": 32},
    "inner-given": {"n_inner": 48},
    "inner-narrow": {"n_inner": 1},
    "16-positions": {"n_positions": 16},
    "1-position": {"n_positions": 1},
    "epsilon": {"layer_norm_epsilon": 0.3},
    "odd-vocabulary": {"vocab_size": 8209},
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(exported: Callable[..., Artifact], make_gpt2: Callable[..., Path], name: str) -> None:
    artifact = exported(make_gpt2(name, **SHAPES[name]))
    assert_contract(artifact)


def test_window_is_the_models_own(exported: Callable[..., Artifact], make_gpt2: Callable[..., Path]) -> None:
    """All 16 positions can be used. The 17th is refused, because its logits would be garbage."""
    artifact = exported(make_gpt2("window", n_positions=16))
    runtime = Runtime(artifact.model)
    assert runtime.forward(np.ones((1, 16), np.int64)).shape == (1, 16, 8192)
    with pytest.raises(Exception, match="out of data bounds"):
        runtime.forward(np.ones((1, 17), np.int64))


@pytest.mark.parametrize("opset", [18, 20, 21, 23])
def test_opsets(exported: Callable[..., Artifact], make_gpt2: Callable[..., Path], opset: int) -> None:
    for activation in ("gelu_new", "gelu"):
        artifact = exported(
            make_gpt2(f"opset-{activation.replace('_', '-')}", activation_function=activation), "--opset", opset
        )
        assert_contract(artifact)
        proto = onnx.load(artifact.model)
        assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", opset)]
        assert ("Gelu" in {node.op_type for node in proto.graph.node}) == (opset >= 20)


def test_contract_of_the_embedded_model(es_mini_fp32: Artifact) -> None:
    """Inputs and outputs have the names, types and shapes that optimum, transformers.js and onnxruntime-genai use."""
    assert_contract(es_mini_fp32)
    graph = onnx.load(es_mini_fp32.model).graph

    def described(values) -> dict[str, tuple]:
        return {
            value.name: (
                value.type.tensor_type.elem_type,
                [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
            )
            for value in values
        }

    new, past, whole = "sequence_length", "past_sequence_length", "past_sequence_length + sequence_length"
    wanted_inputs = {
        "input_ids": (7, ["batch_size", new]),
        "attention_mask": (7, ["batch_size", whole]),
        "position_ids": (7, ["batch_size", new]),
        "num_logits_to_keep": (7, []),  # optional, because an initializer gives its default
    }
    assert onnx.numpy_helper.to_array(next(w for w in graph.initializer if w.name == "num_logits_to_keep")) == 0
    wanted_outputs = {"logits": (1, ["batch_size", new, 8192])}
    for layer in range(6):
        for kv in ("key", "value"):
            wanted_inputs[f"past_key_values.{layer}.{kv}"] = (1, ["batch_size", 4, past, 64])
            wanted_outputs[f"present.{layer}.{kv}"] = (1, ["batch_size", 4, whole, 64])
    assert described(graph.input) == wanted_inputs
    assert described(graph.output) == wanted_outputs
    assert {node.domain for node in graph.node} == {""}


def test_same_bytes_again(es_mini_fp32: Artifact, exported: Callable[..., Artifact]) -> None:
    """An export in another process to another folder gives the same file."""
    assert exported(ES_MINI).digest == es_mini_fp32.digest


def test_padding_and_cache_do_not_change_a_row(es_mini_fp32: Artifact) -> None:
    """The logits of a text are the same alone, in a padded batch, and in two pieces with the KV cache."""
    runtime = Runtime(es_mini_fp32.model)
    rng = np.random.default_rng(0)
    long, short = rng.integers(0, 8192, 24), rng.integers(0, 8192, 9)
    batch, mask = np.stack([long, np.concatenate([np.full(15, 4242), short])]), np.ones((2, 24), np.int64)
    mask[1, :15] = 0
    together = runtime.forward(batch, mask)
    np.testing.assert_allclose(together[0], runtime.forward(long[None])[0], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(together[1, 15:], runtime.forward(short[None])[0], rtol=1e-5, atol=1e-4)
    _, past = runtime.extend(batch[:, :17], runtime.empty_past(2), mask[:, :17])
    logits, _ = runtime.extend(batch[:, 17:], past, mask)
    np.testing.assert_allclose(logits, together[:, 17:], rtol=1e-5, atol=1e-4)


def test_name_of_the_folder(exported: Callable[..., Artifact], tiny_folder: Path, tmp_path: Path) -> None:
    """A folder with spaces, accents and a dot, given with a trailing slash, is published under its own name."""
    folder = tmp_path / "mi modelo (año 2.0)"
    shutil.copytree(tiny_folder, folder)
    artifact = exported(folder)
    assert artifact.path.parent.name == folder.name and artifact.manifest.model == folder.name
