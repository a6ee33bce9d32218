"""LoRA adapters of models that are no GPT-2: merged into the weights in whose names theirs end, as peft computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.model_config import read_config
from cuantiza.core.inputs.weights.adapters import read_fields
from cuantiza.core.inputs.weights.checkpoint import read_by_names, read_merged
from cuantiza.core.inputs.weights.pytorch import pytorch_loader
from cuantiza.core.store.artifact import Artifact

from helpers import copy_tokenizer, edit_weights, saved, tiny_llama

IDS = torch.tensor([[0, 5, 17, 300, 8191]])
# The type of model, what its config.json and its adapter have beside the rest, and the linear layers that are adapted.
CASES: dict[str, tuple[str, dict, dict, list[str]]] = {
    "all linear layers of a tied llama": (
        "llama",
        {"tie_word_embeddings": True},
        {"bias": "all"},
        ["q_proj", "up_proj"],
    ),
    "biases": ("llama", {"attention_bias": True}, {"bias": "lora_only", "use_rslora": True}, ["k_proj"]),
    "norms saved": ("qwen3", {}, {"modules_to_save": ["q_norm", "norm"]}, ["o_proj", "down_proj"]),
    "one matrix": ("phi3", {}, {}, ["qkv_proj", "gate_up_proj"]),
    "head by head": ("gpt_neox", {}, {"lora_bias": True}, ["query_key_value", "dense"]),
    "old head": ("gpt_neox", {}, {}, ["lm_head"]),
    "embedding": ("phi", {"partial_rotary_factor": 0.7}, {}, ["embed_tokens", "fc1"]),
    "tied embedding saved": ("opt", {"ffn_dim": 48}, {"modules_to_save": ["embed_tokens", "embed_positions"]}, ["fc1"]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_as_peft(case: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    kind, config, fields, targets = CASES[case]
    model = tiny_llama(kind, **config)
    base, adapter = saved(model, tmp_path / "base"), tmp_path / "adapter"
    before = model(IDS).logits
    lora = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": targets, **fields}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**lora)).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 5)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(adapter)
    with torch.inference_mode():
        theirs = adapted(IDS).logits
        assert (theirs - before).abs().max() > 0.01  # the adapter does something
        torch.testing.assert_close(pytorch_loader(adapter)()(IDS).logits, theirs, rtol=1e-4, atol=1e-4)


def write_adapter(folder: Path, base: Path | None, tensors: dict[str, torch.Tensor], **fields: object) -> Path:
    folder.mkdir(exist_ok=True)
    kinds = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    where = {"base_model_name_or_path": str(base)} if base else {}
    (folder / "adapter_config.json").write_text(json.dumps(kinds | where | fields))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def factors(name: str, inputs: int = 32, outputs: int = 24) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"lora_A.weight": (2, inputs), "lora_B.weight": (outputs, 2)}
    return {f"{name}.{part}": torch.randn(shape, generator=generator) / 4 for part, shape in shapes.items()}


@pytest.mark.parametrize("tied", [True, False])
def test_an_index_without_metadata(tied: bool, tmp_path: Path) -> None:
    """transformers refuses it, so the reference gets the weights that are read here, as it does with an adapter."""
    model = tiny_llama(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index["weight_map"]}))
    with torch.inference_mode():
        assert torch.equal(pytorch_loader(tmp_path)()(IDS).logits, model(IDS).logits)


QUERIES = "base_model.model.model.layers.1.self_attn.q_proj"


def test_a_value_head_beside_an_adapter(tmp_path: Path) -> None:
    """As trl writes a policy: the adapter, a pytorch_model.bin of the head alone, and the base elsewhere."""
    base = saved(tiny_llama(), tmp_path / "base")
    folder = write_adapter(tmp_path / "ppo", base, factors(QUERIES))
    alone = read_by_names(folder, read_fields(folder), "embed_tokens.weight")
    torch.save({"v_head.summary.weight": torch.ones(1, 32)}, folder / "pytorch_model.bin")
    found = read_by_names(folder, read_fields(folder), "embed_tokens.weight")
    merged, head = found.warnings
    assert (
        merged,
    ) == alone.warnings and head == "the export leaves out a value head, as trl adds (v_head.summary.weight)"
    np.testing.assert_array_equal(
        found.weights["layers.1.self_attn.q_proj.weight"].read(),
        alone.weights["layers.1.self_attn.q_proj.weight"].read(),
    )
    torch.save({"model.norm.weight": torch.ones(32)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has weights \(model\.norm\.weight\) beside its adapter, but no config\.json"):
        read_by_names(folder, read_fields(folder), "embed_tokens.weight")


@pytest.mark.parametrize("name", [QUERIES, "base_model.model.layers.1.self_attn.q_proj"], ids=["head", "backbone"])
def test_formula(name: str, tmp_path: Path) -> None:
    """W + 2 · B A in one layer, exactly, whether the adapter was trained on the whole model or on its backbone."""
    folder, tensors = saved(tiny_llama(), tmp_path / "llama"), factors(name)
    before, _ = read_merged(folder, read_config(folder))
    after, _ = read_merged(write_adapter(folder, None, tensors), read_config(folder))
    changed = "model.layers.1.self_attn.q_proj.weight"
    b, a = (tensors[f"{name}.lora_{part}.weight"].double().numpy() for part in "BA")
    np.testing.assert_array_equal(after[changed].read(), (before[changed].read() + 2 * (b @ a)).astype(np.float32))
    assert before.keys() == after.keys()
    for name in before.keys() - {changed}:
        np.testing.assert_array_equal(after[name].read(), before[name].read())


def test_a_tensor_that_the_model_does_not_read(tmp_path: Path) -> None:
    """A value head beside the weights does not keep PyTorch's model from having the adapter."""
    folder = write_adapter(saved(tiny_llama(), tmp_path / "llama"), None, factors(QUERIES))
    wanted = pytorch_loader(folder)()(IDS).logits
    edit_weights(folder, lambda tensors: tensors.update({"v_head.summary.weight": torch.ones(1, 32)}))
    torch.testing.assert_close(pytorch_loader(folder)()(IDS).logits, wanted, rtol=0, atol=0)
    edit_weights(folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(UserError, match="missing_keys"):
        pytorch_loader(folder)()


def test_the_artifact_of_an_adapter(exported: Callable[..., Artifact], tmp_path: Path) -> None:
    """Its embedding has two more tokens than the base's, and the base's files are the rest."""
    base = saved(tiny_llama("opt", ffn_dim=48), tmp_path / "base")
    copy_tokenizer(base)
    grown = torch.randn(8194, 32, generator=torch.Generator().manual_seed(1)) / 5
    tensors = factors("base_model.model.model.decoder.layers.0.self_attn.q_proj", outputs=32)
    tensors["base_model.model.model.decoder.embed_tokens.weight"] = grown
    adapter = write_adapter(tmp_path / "adapter", base, tensors)
    assert read_fields(adapter)["vocab_size"] == 8194
    artifact = exported(adapter)  # parity with PyTorch is a part of it
    (warning,) = artifact.manifest.details["warnings"]
    assert "LoRA adapter" in warning and "its base" in warning
    assert read_config(artifact.path)["vocab_size"] == 8194


@pytest.mark.parametrize(
    ("tensors", "fields", "said"),
    [
        (
            factors("base_model.model.transformer.h.0.attn.c_attn"),
            {},
            "adapts transformer.h.0.attn.c_attn, which the base does not have; give the base that it was trained on",
        ),
        (factors(QUERIES.replace("1", "9")), {}, "adapts model.layers.9.self_attn.q_proj, which the base does not"),
        (factors(QUERIES, inputs=64), {}, "[2, 64]"),
        (factors(QUERIES), {"use_dora": True}, "use_dora"),
        (factors(QUERIES) | {"base_model.model.score.weight": torch.ones(2, 32)}, {}, "score.weight"),
    ],
)
def test_what_is_not_merged(tensors: dict, fields: dict, said: str, tmp_path: Path) -> None:
    folder = saved(tiny_llama(), tmp_path / "llama")
    with pytest.raises(UserError) as error:
        read_merged(write_adapter(folder, None, tensors, **fields), read_config(folder))
    assert said in str(error.value) and "\n" not in str(error.value)
