"""The graph of OPT, GPT-Neo, GPT-NeoX and their like gives PyTorch's logits: whole, through the cache, and padded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.model_config import read_config
from cuantiza.core.onnx import file as onnx_file
from cuantiza.core.run.runtime import Runtime
from cuantiza.core.store.artifact import Artifact
from cuantiza.export.graphs import classic
from cuantiza.export.graphs.classic_config import FAMILIES, parse_classic, shapes
from cuantiza.model import load

from helpers import ES_MINI, differences, edit_weights, saved, tiny_llama

# What a config.json of the type needs beside the sizes that all have.
OWN = {
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 7},
    "gptj": {"rotary_dim": 4, "n_inner": 48},
    "opt": {"ffn_dim": 48},
    "phi": {"partial_rotary_factor": 0.7},
    "starcoder2": {"sliding_window": 7},
}
PLAIN = {"rope_type": "default", "rope_theta": 500.0}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0, "partial_rotary_factor": 0.5}
CASES = {
    "gpt_neo": ("gpt_neo", {}),
    "gpt_neox": ("gpt_neox", {}),
    "one after the other": ("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 1.0, "attention_bias": False}),
    "stretched and tied": ("gpt_neox", {"rope_parameters": LINEAR, "tie_word_embeddings": True, "hidden_act": "relu"}),
    "an odd part of a head": ("gpt_neox", {"rotary_pct": 0.4}),
    "gptj": ("gptj", {}),
    "opt": ("opt", {}),
    "opt-350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    "galactica": ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"}),
    "no last norm": ("opt", {"_remove_final_layer_norm": True, "tie_word_embeddings": False}),
    "phi": ("phi", {}),
    "starcoder2": ("starcoder2", {}),
    "starcoder2 without biases": ("starcoder2", {"use_bias": False, "sliding_window": None}),
    "starcoder2 ignores a factor": ("starcoder2", {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}}),
}
# What old files hold beside the weights.
MASK = torch.ones(1, 1, 8, 8).tril().bool()


def tiny(kind: str, **fields: object):
    return tiny_llama(kind, **OWN.get(kind, {}) | fields)


def build(folder: Path, opset: int = 21) -> ir.Model:
    fields = read_config(folder)
    config = parse_classic(fields, folder / "config.json")
    return classic.build(config, classic.read(folder, fields).weights, opset, folder)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_weights_are_pytorchs(case: str, tmp_path: Path) -> None:
    kind, fields = CASES[case]
    model = tiny(kind, **fields)
    folder = saved(model, tmp_path / "checkpoint")
    onnx_file.save(build(folder, 18 if kind == "gpt_neo" else 21), tmp_path)
    assert max(differences(model, Runtime(tmp_path / "model.onnx"))) < 1e-4
    config = parse_classic(read_config(folder), folder)
    stored = {name.removeprefix(FAMILIES[kind].prefix): tuple(p.shape) for name, p in model.named_parameters()}
    known = {
        name for name in shapes(config) if not name.partition("attention.")[2].startswith(("query.", "key.", "value."))
    }
    assert known == {name for name in stored if "query_key_value" not in name}
    assert all(shapes(config)[name] == stored[name] for name in known)
    assert classic.size(config).parameters == sum(parameter.numel() for parameter in model.parameters())


def test_every_family_has_a_case() -> None:
    assert {kind for kind, _ in CASES.values()} == {*FAMILIES}


def old_names(kind: str, state: dict) -> dict:
    """The names of checkpoints of 2021 and 2022: with masks, without a backbone's prefix or with an older head."""
    if kind == "opt":
        return {name.removeprefix("model."): tensor for name, tensor in state.items()} | {
            "decoder.version": torch.ones(1)
        }
    inside = {"gpt_neo": "transformer.h.{}.attn.attention", "gpt_neox": "gpt_neox.layers.{}.attention"}[kind]
    for layer in range(4):
        state[f"{inside.format(layer)}.bias"] = MASK if kind == "gpt_neo" else MASK.to(torch.uint8)
        state[f"{inside.format(layer)}.masked_bias"] = torch.tensor(-1e9)
        if kind == "gpt_neox":
            state[f"{inside.format(layer)}.rotary_emb.inv_freq"] = torch.ones(1)
    return {name.replace("lm_head", "embed_out" if kind == "gpt_neox" else "lm_head"): t for name, t in state.items()}


@pytest.mark.parametrize("kind", ["gpt_neo", "opt"])
def test_names_of_old_checkpoints(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    folder = saved(model, tmp_path / "checkpoint")
    torch.save(old_names(kind, model.state_dict()), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    onnx_file.save(build(folder), tmp_path)
    assert max(differences(model, Runtime(tmp_path / "model.onnx"))) < 1e-4


def test_the_artifact_of_an_old_checkpoint(exported: Callable[..., Artifact], make_llama: Callable[..., Path]) -> None:
    """Its parity with PyTorch is part of an export, and what is no weight is not told as left out."""
    folder = make_llama("gpt_neox")
    torch.save(old_names("gpt_neox", tiny("gpt_neox").state_dict()), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    artifact = exported(folder)
    assert not [line for line in artifact.manifest.details.get("warnings", []) if "leaves out" in line]
    assert isinstance(load(artifact.path).generate("El mar", 5), str)


def removed(name: str) -> Callable[[dict], None]:
    return lambda tensors: tensors.pop(name)


def reshaped(name: str) -> Callable[[dict], None]:
    return lambda tensors: tensors.update({name: tensors[name][1:].clone()})


FUSED = "gpt_neox.layers.1.attention.query_key_value"


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("gpt_neox", removed(f"{FUSED}.weight"), "no weight layers.1.attention.query.weight"),
        ("gpt_neox", reshaped(f"{FUSED}.bias"), "layers.1.attention.query.bias is [31] where config.json says [32]"),
        ("gpt_neox", removed("embed_out.weight"), "no weight lm_head.weight"),
        ("gptj", removed("transformer.h.2.ln_1.bias"), "no weight h.2.ln_1.bias"),
        ("gptj", removed("lm_head.bias"), "no weight lm_head.bias"),
        ("opt", removed("model.decoder.embed_tokens.weight"), "no weight model.decoder.embed_tokens.weight"),
        ("opt", removed("model.decoder.embed_positions.weight"), "no weight decoder.embed_positions.weight"),
        ("opt", lambda tensors: tensors.update({"model.decoder.more.weight": torch.ones(2)}), ""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_weights_that_do_not_fit(
    kind: str, change: Callable[[dict], None], said: str, make_llama: Callable[..., Path]
) -> None:
    folder = make_llama(kind, **OWN.get(kind, {}))
    edit_weights(folder, change)
    if said:
        with pytest.raises(UserError) as error:
            build(folder)
        assert str(error.value).startswith(f"{folder}: ") and said in str(error.value)
    else:
        config = parse_classic(read_config(folder), folder)
        assert classic.left_over(config, classic.read(folder, read_config(folder)).weights) == ["decoder.more.weight"]


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("opt", {"num_attention_heads": 3}, "hidden_size 32 is not a multiple of num_attention_heads 3"),
        ("opt", {"ffn_dim": 0}, "ffn_dim is 0"),
        ("opt", {"word_embed_proj_dim": "wide"}, "word_embed_proj_dim is 'wide'"),
        ("opt", {"activation_function": "mish"}, "activation_function 'mish' is not one of"),
        ("gpt_neo", {"num_layers": 10**9}, "num_layers is 1000000000"),
        ("gpt_neo", {"attention_types": [[["global"], 10**9]]}, "attention_types has [['global'], 1000000000]"),
        ("gpt_neo", {"attention_types": "local"}, "attention_types has 'local'"),
        ("gpt_neo", {"attention_types": [[["global", "far"], 2]]}, "attention_types has 'far'"),
        ("gpt_neo", {"attention_types": [[["global"], 3]]}, "attention_types"),
        ("gpt_neo", {"layer_norm_epsilon": 0.0}, "layer_norm_epsilon is 0.0"),
        ("gpt_neox", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "changes with the length"),
        ("gptj", {"rotary_dim": 10}, "rotary_dim"),
        ("gptj", {"rotary_dim": 3}, "rotary_dim turns 3 channels of a head, and they are turned in pairs"),
        ("phi", {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor turns 3 channels"),
        ("phi", {"num_key_value_heads": 3}, "num_key_value_heads 3"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_configurations_that_are_not_exported(kind: str, fields: dict, said: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    given = saved(tiny(kind), tmp_path) and read_config(tmp_path)
    given = {key: value for key, value in given.items() if key not in ("attention_layers", "num_hidden_layers")}
    with pytest.raises(UserError) as error:
        parse_classic(given | fields, path)
    line = str(error.value)
    assert line.startswith(f"{path}: ") and said in line and "\n" not in line


OPTIMUM, ANOTHER = "EXPORTER=optimum may export it", "choose another model"
DYNAMIC = {"rope_parameters": PLAIN | {"rope_type": "dynamic", "factor": 2.0}}


@pytest.mark.parametrize(
    ("kind", "fields", "mend"),
    [
        ("phi", {"qk_layernorm": True}, OPTIMUM),
        ("opt", {"activation_function": "quick_gelu"}, OPTIMUM),
        ("starcoder2", {"hidden_act": "quick_gelu"}, ANOTHER),
        ("gpt_neox", DYNAMIC, ANOTHER),  # nor can a graph of optimum change with the length
        ("opt", {"activation_function": "swoosh"}, "take the config.json of the original checkpoint"),
    ],
)
def test_the_advice_is_one_that_helps(kind: str, fields: dict, mend: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        parse_classic(tiny(kind).config.to_dict() | fields, tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: ") and str(error.value).endswith(f"; {mend}")


def test_inspect_says_what_it_is(make_llama: Callable[..., Path], capsys: pytest.CaptureFixture) -> None:
    from cuantiza.export.inspect import main

    assert main([str(make_llama("phi", **OWN["phi"]))]) == 0
    said = capsys.readouterr().out
    assert "phi: 4 layers of width 32, 4 heads of 6, which share 2 keys and values, MLP of 48 with gelu_new" in said


def test_opts_tokenizer_of_2022(exported: Callable[..., Artifact], tmp_path: Path) -> None:
    """vocab.json and merges.txt alone, with <s>, <pad>, </s> and <unk> first, and every text begins with </s>."""
    from transformers import AutoTokenizer

    own = json.loads((ES_MINI / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    words = [word for word in sorted(own["vocab"], key=own["vocab"].get) if word != "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *words])}
    ids = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
    folder = saved(tiny("opt", vocab_size=len(vocabulary) + 5, **ids), tmp_path / "opt")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in own["merges"]]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>") | {"pad_token": "<pad>"}
    settings = names | {"add_bos_token": True, "add_prefix_space": False, "tokenizer_class": "GPT2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    artifact = exported(folder)
    assert "warnings" not in artifact.manifest.details
    model, text = load(artifact.path), "La niña ve el mar."
    theirs = [AutoTokenizer.from_pretrained(place)(text)["input_ids"] for place in (folder, artifact.path)]
    assert [model.encode(text)] * 2 == theirs and (model.start, model.end) == (2, {2})
    whole = load_file(folder / "model.safetensors")["model.decoder.embed_positions.weight"].numpy()
    positions = ir.load(artifact.model).graph.initializers["decoder.embed_positions.weight"].const_value.numpy()
    np.testing.assert_array_equal(positions, whole[2:])  # the first two rows are no position's
