"""The graph of Llama and its relatives gives PyTorch's logits: whole, through the KV cache, and in a padded batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import AutoModelForCausalLM

from cuantiza.core import contract
from cuantiza.core.errors import UserError
from cuantiza.core.inputs.model_config import read_config
from cuantiza.core.inputs.model_types import GRAPH_TYPES
from cuantiza.core.inputs.weights.checkpoint import read_by_names
from cuantiza.core.onnx import file as onnx_file
from cuantiza.core.run.runtime import Runtime
from cuantiza.core.store.artifact import Artifact
from cuantiza.export.graphs import classic_config, llama, llama_weights
from cuantiza.export.graphs.architectures import ARCHITECTURES
from cuantiza.export.graphs.llama_config import FAMILIES, parse_llama

from helpers import differences, edit_config, edit_weights, saved, tiny_llama

BIASES = {"attention_bias": True, "mlp_bias": True}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SLIDING = ["sliding_attention", "full_attention"] * 2
CASES = {
    "plain": ("llama", {}),
    "biases": ("llama", BIASES),
    "a head of keys for each of queries": ("llama", {"num_key_value_heads": 4}),
    "one head of keys for all": ("llama", {"num_key_value_heads": 1}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 500.0}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "yarn": ("qwen2", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral with a window": ("mistral", {"sliding_window": 7}),
    "ministral": ("ministral", {"sliding_window": 7, "layer_types": SLIDING}),
    "qwen2": ("qwen2", {}),
    "qwen2 with a window": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.3,
            "logits_scaling": 2.5,
            **BIASES,
        },
    ),
    "arcee": ("arcee", {"hidden_act": "relu2"}),
    "ernie4_5": ("ernie4_5", {"use_bias": True}),
    "glm": ("glm", {"attention_bias": True, "head_dim": 12}),
    "glm4": ("glm4", {"head_dim": 12}),
    "helium": ("helium", {"head_dim": 8}),
    "phi3": ("phi3", {"sliding_window": 7, "hidden_size": 48, "partial_rotary_factor": 0.5}),
    "seed_oss": ("seed_oss", {"attention_bias": True, "attention_out_bias": True}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"sliding_window": 7, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 1.0}),
    "gemma3_text": ("gemma3_text", {"sliding_window": 7, "layer_types": SLIDING, "query_pre_attn_scalar": 20}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 7, "layer_types": SLIDING}),
}
TOKENS = 40


def build(folder: Path, opset: int = 21) -> ir.Model:
    fields = read_config(folder)
    checkpoint = read_by_names(folder, fields, llama_weights.EMBEDDING)
    return llama.build(parse_llama(fields, folder / "config.json"), checkpoint.weights, opset, folder)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_pytorchs(case: str, tmp_path: Path) -> None:
    kind, fields = CASES[case]
    model = tiny_llama(kind, **fields)
    onnx_file.save(build(saved(model, tmp_path / "checkpoint")), tmp_path)
    assert max(differences(model, Runtime(tmp_path / "model.onnx"))) < 1e-4


def test_a_mistral_file_with_types_of_layers_is_ministrals(tmp_path: Path) -> None:
    """So transformers reads it: only some of the layers slide."""
    folder = saved(tiny_llama("mistral", sliding_window=7), tmp_path / "checkpoint")
    edit_config(folder, layer_types=SLIDING)
    onnx_file.save(build(folder), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(model).__name__ == "MinistralForCausalLM"
    assert max(differences(model, Runtime(tmp_path / "model.onnx"))) < 1e-4


def test_a_tied_matrix_under_the_heads_name_alone(tmp_path: Path) -> None:
    """Of two names of one tensor, safetensors' save_model keeps the first of the alphabet."""
    model = tiny_llama("llama", tie_word_embeddings=True)
    folder = saved(model, tmp_path / "checkpoint")
    edit_weights(folder, lambda weights: weights.update({"lm_head.weight": weights.pop("model.embed_tokens.weight")}))
    onnx_file.save(build(folder), tmp_path)
    assert max(differences(model, Runtime(tmp_path / "model.onnx"))) < 1e-4


def test_yarn_without_a_factor_has_that_of_the_lengths(tmp_path: Path) -> None:
    length = tiny_llama().config.max_position_embeddings
    model = tiny_llama("llama", rope_parameters=YARN | {"factor": length / 32})
    edit_config(folder := saved(model, tmp_path / "checkpoint"), rope_parameters=YARN | {"factor": None})
    onnx_file.save(build(folder), tmp_path)
    assert max(differences(model, Runtime(tmp_path / "model.onnx"))) < 1e-4


def test_a_window_that_no_layer_uses(tmp_path: Path) -> None:
    config = tiny_llama("qwen2").config.to_dict() | {"use_sliding_window": False, "sliding_window": 0}
    assert not any(layer.window for layer in parse_llama(config, tmp_path).layers)


def test_every_family_has_a_case() -> None:
    assert {kind for kind, _ in CASES.values()} == {*FAMILIES}
    assert {"gpt2", *FAMILIES, *classic_config.FAMILIES} == {*ARCHITECTURES} == {*GRAPH_TYPES}


@pytest.mark.parametrize("opset", [18, 19, 23])
def test_every_opset(opset: int, tmp_path: Path) -> None:
    model = tiny_llama("gemma2", sliding_window=7)
    onnx_file.save(build(saved(model, tmp_path / "checkpoint"), opset), tmp_path)
    assert max(differences(model, Runtime(tmp_path / "model.onnx"))) < 1e-4


@pytest.mark.parametrize("case", ["plain", "llama3", "yarn", "mistral with a window"])
def test_positions_far_beyond_the_trained_ones(case: str, tmp_path: Path) -> None:
    """The last tokens of a long text, which the cache holds: the file has no table that could end."""
    kind, fields = CASES[case]
    model = tiny_llama(kind, **fields)
    onnx_file.save(build(saved(model, tmp_path / "checkpoint")), tmp_path)
    assert max(differences(model, Runtime(tmp_path / "model.onnx"), tokens=300)) < 1e-4


@pytest.mark.parametrize("case", ["plain", "llama3", "yarn"])
def test_the_last_positions_of_131072(case: str, tmp_path: Path) -> None:
    """There, a frequency of other bits than PyTorch's would turn by another angle."""
    kind, fields = CASES[case]
    model = tiny_llama(kind, **fields)
    onnx_file.save(build(saved(model, tmp_path / "checkpoint")), tmp_path)
    ids = np.random.default_rng(0).integers(0, 8192, (1, TOKENS))
    positions = np.arange(131_072 - TOKENS, 131_072)[None]
    feeds = contract.token_feeds(ids, np.ones_like(ids)) | {"position_ids": positions}
    feeds |= {name: np.zeros((1, 2, 0, 6), np.float32) for name in contract.past_names(4)}
    logits = Runtime(tmp_path / "model.onnx").session.run([contract.LOGITS], feeds)[0]
    with torch.inference_mode():
        wanted = model(torch.from_numpy(ids), position_ids=torch.from_numpy(positions)).logits.numpy()
    assert np.abs(logits - wanted).max() < 1e-4


def test_the_file_does_not_grow_with_the_positions(tmp_path: Path) -> None:
    sizes = []
    for positions in (128, 131_072):
        folder = tmp_path / str(positions)
        onnx_file.save(build(saved(tiny_llama(max_position_embeddings=positions), folder / "checkpoint")), folder)
        sizes.append((folder / "model.onnx").stat().st_size)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("glm", "glm4", "phi3")])  # they join matrices
def test_shapes_are_the_weights_of_transformers(case: str, tmp_path: Path) -> None:
    kind, fields = CASES[case]
    model = tiny_llama(kind, **fields)
    config = parse_llama(read_config(saved(model, tmp_path)), tmp_path)
    stored = {name.removeprefix("model."): tuple(weight.shape) for name, weight in model.named_parameters()}
    assert llama_weights.shapes(config) == stored
    assert llama.size(config).parameters == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("keep", [1, 3, -TOKENS])
def test_only_the_logits_that_were_asked_for(keep: int, tmp_path: Path) -> None:
    onnx_file.save(build(saved(tiny_llama(), tmp_path / "checkpoint")), tmp_path)
    runtime = Runtime(tmp_path / "model.onnx")
    ids = np.random.default_rng(0).integers(0, 8192, (2, TOKENS))
    feeds = contract.token_feeds(ids, np.ones_like(ids))
    feeds |= {name: np.zeros((2, 2, 0, 6), np.float32) for name in contract.past_names(4)}
    whole = runtime.session.run(None, feeds)
    part = runtime.session.run(None, feeds | {contract.KEEP: np.array(keep, np.int64)})
    start = TOKENS - keep if keep > 0 else -keep
    assert part[0].shape == (2, TOKENS - start, 8192)
    np.testing.assert_allclose(part[0], whole[0][:, start:], atol=1e-5)
    for ours, all_of_them in zip(part[1:], whole[1:], strict=True):
        np.testing.assert_array_equal(ours, all_of_them)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_half_precision_and_shards_and_no_prefix(dtype: torch.dtype, prefix: str, tmp_path: Path) -> None:
    """What is stored in 16 bits is computed in 32; a checkpoint of the backbone alone has no prefix."""
    model = tiny_llama(tie_word_embeddings=True).to(dtype)
    (model if prefix else model.model).save_pretrained(tmp_path / "checkpoint", max_shard_size="200KB")
    assert len([*(tmp_path / "checkpoint").glob("*.safetensors")]) > 1
    onnx_file.save(build(tmp_path / "checkpoint"), tmp_path)
    # `model.float()` would keep rotary frequencies that were rounded to 16 bits.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)
    assert max(differences(loaded, Runtime(tmp_path / "model.onnx"))) < 1e-4


def test_the_artifact_of_a_checkpoint(exported: Callable[..., Artifact], make_llama: Callable[..., Path]) -> None:
    artifact = exported(make_llama("qwen3", tie_word_embeddings=True))
    parity = artifact.manifest.details["parity"]
    assert max(parity[case] for case in ("whole", "cached", "padded", "padded_cached")) <= 1e-4
    graph = ir.load(artifact.model).graph
    shapes = {value.name: [str(axis) for axis in value.shape] for value in (*graph.inputs, *graph.outputs)}
    assert shapes["past_key_values.1.value"] == ["batch_size", "2", "past_sequence_length", "6"]
    assert shapes["present.1.key"] == ["batch_size", "2", "past_sequence_length + sequence_length", "6"]
    assert shapes["logits"] == ["batch_size", "sequence_length", "8192"]
    assert {*graph.opset_imports} == {""}  # standard operators alone
    assert [name for name in graph.initializers if "lm_head" in name] == []


@pytest.mark.parametrize("pad", [None, 9000])
def test_no_token_that_pads(
    pad: int | None, exported: Callable[..., Artifact], make_llama: Callable[..., Path]
) -> None:
    """The default of the type, 32000, is beyond this vocabulary: transformers would refuse the artifact's config.json."""
    folder = make_llama("phi3", head_dim=16, pad_token_id=None)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"pad_token_id": pad}))
    config = json.loads((exported(folder).path / "config.json").read_text())
    assert config["pad_token_id"] is None


def head_apart(tensors: dict) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2


def test_a_head_that_differs_though_config_json_calls_it_tied(
    exported: Callable[..., Artifact], make_llama: Callable[..., Path]
) -> None:
    """transformers keeps both; that parity holds says that ours does."""
    folder = make_llama(tie_word_embeddings=True)
    edit_weights(folder, head_apart)
    assert "lm_head.weight" in ir.load(exported(folder).model).graph.initializers


def removed(name: str) -> Callable[[dict], None]:
    return lambda tensors: tensors.pop(name)


def reshaped(tensors: dict) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].T.contiguous()


def one_more_layer(tensors: dict) -> None:
    tensors["model.layers.4.mlp.up_proj.weight"] = tensors["model.layers.3.mlp.up_proj.weight"].clone()


def without_a_layer(tensors: dict) -> None:
    for name in [name for name in tensors if name.startswith("model.layers.2.")]:
        del tensors[name]


def together(tensors: dict) -> None:
    """As models of another family and vLLM store queries, keys and values."""
    at = "model.layers.1.self_attn."
    tensors[f"{at}qkv_proj.weight"] = torch.cat([tensors.pop(f"{at}{name}_proj.weight") for name in "qkv"])


def infinite(tensors: dict) -> None:
    tensors["model.norm.weight"][3] = np.inf


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (removed("model.layers.1.self_attn.k_proj.weight"), "no weight layers.1.self_attn.k_proj.weight"),
        (removed("model.embed_tokens.weight"), "no weight model.embed_tokens.weight"),
        (removed("lm_head.weight"), "no weight lm_head.weight"),
        (reshaped, "is its transpose"),
        (one_more_layer, "has a weight layers.4.mlp.up_proj.weight where config.json says num_hidden_layers 4"),
        (without_a_layer, "no weight layers.2.*"),
        (together, "no weight layers.1.self_attn.q_proj.weight, but layers.1.self_attn.qkv_proj.weight; take"),
        (infinite, "norm.weight holds NaN or infinities"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_weights_that_do_not_fit(
    make_llama: Callable[..., Path], refused_here: Callable[..., str], change: Callable[[dict], None], said: str
) -> None:
    folder = make_llama()
    edit_weights(folder, change)
    refused_here(folder, str(folder), said)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'"),
        ({"vocab_size": -5}, "vocab_size is -5"),
        ({"hidden_act": "laplace"}, "hidden_act 'laplace' is not one of"),
        ({"head_dim": 7}, "RoPE requires an even"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
        ({"num_hidden_layers": 2_000_000_000}, "no such model has more than"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "changes with the length of the text"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope_type 'spiral' is not one of"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": None}},
            "null as rope_parameters.original_max_position_embeddings",
        ),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_configurations_that_no_such_model_has(fields: dict, said: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(UserError) as error:
        parse_llama(tiny_llama().config.to_dict() | fields, path)
    line = str(error.value)
    assert line.startswith(f"{path}: ") and said in line and "\n" not in line


def test_a_layer_that_slides_needs_a_window(tmp_path: Path) -> None:
    """Where all layers slide or none, no window means that none does; here the layers say themselves that they do."""
    config = tiny_llama("qwen3").config.to_dict() | {"layer_types": SLIDING, "sliding_window": None}
    with pytest.raises(
        UserError, match=r"layer_types\[\d\] is sliding_attention, and sliding_window is None; take the"
    ):
        parse_llama(config, tmp_path)
    assert not any(
        layer.window
        for layer in parse_llama(tiny_llama("mistral", sliding_window=None).config.to_dict(), tmp_path).layers
    )


def test_inspect_says_what_it_is(make_llama: Callable[..., Path], capsys: pytest.CaptureFixture) -> None:
    from cuantiza.export.inspect import main

    assert main([str(make_llama("smollm3"))]) == 0
    said = capsys.readouterr().out
    assert "smollm3: 4 layers of width 32, 4 heads of 6, which share 2 keys and values" in said


def test_half_an_adapter_is_refused(make_llama: Callable[..., Path], refused_here: Callable[..., str]) -> None:
    folder = make_llama()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused_here(folder, "adapter_config.json: has no adapter_model.safetensors beside it")
