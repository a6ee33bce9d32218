"""LoRA adapters beside or instead of the weights: merged as the formula says and as peft itself computes, or refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.checkpoints import checkpoint_digest, resolve_model
from cuantiza.core.inputs.weights.adapters import read_fields
from cuantiza.core.inputs.weights.checkpoint import read_checkpoint
from cuantiza.core.inputs.weights.pytorch import pytorch_loader
from cuantiza.core.store.artifact import Artifact

from helpers import TOKENIZER_FILES, edit_config, edit_weights, tiny_gpt2

IDS = torch.tensor([[0, 5, 17, 300, 8191]])
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "target_modules": ["c_attn"],
    "fan_in_fan_out": True,
    "bias": "none",
    "inference_mode": True,
}
C_ATTN = "base_model.model.transformer.h.{}.attn.c_attn"


def factors(r: int = 4, name: str = C_ATTN, inputs: int = 32, outputs: int = 96) -> dict[str, torch.Tensor]:
    """A and B of a module in both layers."""
    generator = torch.Generator().manual_seed(7)
    shapes = {"lora_A.weight": (r, inputs), "lora_B.weight": (outputs, r)}
    return {
        f"{name.format(layer)}.{part}": torch.randn(shape, generator=generator) / 4
        for layer in (0, 1)
        for part, shape in shapes.items()
    }


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], kind: str = "safetensors", **fields: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | fields))
    if kind == "bin":
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def delta(tensors: dict[str, torch.Tensor], name: str = C_ATTN.format(1)) -> np.ndarray:
    return (tensors[f"{name}.lora_B.weight"].double() @ tensors[f"{name}.lora_A.weight"].double()).numpy()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({}, 8 / 4),
        ({"use_rslora": True}, 8 / math.sqrt(4)),
        ({"lora_alpha": 16, "fan_in_fan_out": False}, 4),  # peft itself sets fan_in_fan_out for Conv1D
        ({"alpha_pattern": {"c_attn": 2}}, 0.5),
        ({"alpha_pattern": {r"transformer\.h\.1\.attn\.c_attn": 2, "c_attn": 3}}, 0.5),
        ({"alpha_pattern": {"attn": 2, "tn.c_attn": 2}}, 2),
        ({"r": 8, "rank_pattern": {"c_attn": 4}}, 2),
    ],
)
def test_formula(folder: Path, model, kind: str, fields: dict, scale: float) -> None:
    """W + scale · (B A)ᵀ in layer 1, exactly; nothing else changes, on disk or in other layers' kinds."""
    tensors = factors()
    found = read_checkpoint(write_adapter(folder, tensors, kind, **fields)).weights
    before = model.state_dict()
    base = before["transformer.h.1.attn.c_attn.weight"].double().numpy()
    merged = (base + scale * delta(tensors).T).astype(np.float32)
    np.testing.assert_array_equal(found["h.1.attn.c_attn.weight"].read(), merged)
    for name, weight in found.items():
        if not name.endswith("c_attn.weight"):
            np.testing.assert_array_equal(weight.read(), before[f"transformer.{name}"].numpy(), err_msg=name)
    assert "lm_head.weight" not in found


@pytest.mark.parametrize("stored", [True, False], ids=["head stored", "embedding alone"])
def test_other_names_of_an_adapters_tensors(folder: Path, model, stored: bool) -> None:
    """With the adapter's own name in them, as in a state_dict; and an embedding that grew is the head of a tied pair."""
    if stored:
        edit_weights(
            folder, lambda weights: weights.update({"lm_head.weight": weights["transformer.wte.weight"].clone()})
        )
    grown, norm = torch.randn(8200, 32), torch.randn(32)
    tensors = {name.replace(".weight", ".default.weight"): tensor for name, tensor in factors().items()}
    tensors |= {
        "base_model.model.transformer.wte.weight": grown,
        "base_model.model.transformer.ln_f.original_module.weight": torch.zeros(32),
        "base_model.model.transformer.ln_f.modules_to_save.default.weight": norm,
    }
    found = read_checkpoint(write_adapter(folder, tensors, modules_to_save=["ln_f"]))
    base = model.state_dict()["transformer.h.1.attn.c_attn.weight"].double().numpy()
    merged = (base + 2 * delta(factors()).T).astype(np.float32)
    np.testing.assert_array_equal(found.weights["h.1.attn.c_attn.weight"].read(), merged)
    np.testing.assert_array_equal(found.weights["ln_f.weight"].read(), norm.numpy())
    for name in {"wte.weight", "lm_head.weight"} & found.weights.keys():
        np.testing.assert_array_equal(found.weights[name].read(), grown.numpy())
    assert found.fields["vocab_size"] == 8200 and "lm_head.weight" not in found.weights


def test_exported_beside_the_weights(folder: Path, exported: Callable[..., Artifact]) -> None:
    """The adapter's name stands in a warning, and the digest depends on the adapter."""
    digest = checkpoint_digest(folder)
    write_adapter(folder, factors(), base_model_name_or_path="datificate/gpt2-small-spanish")
    assert checkpoint_digest(folder) != digest
    (warning,) = exported(folder).manifest.details["warnings"]
    assert "LoRA adapter" in warning and "adapter_model.safetensors" in warning and "merged already" in warning


def test_exported_instead_of_the_weights(
    folder: Path, tmp_path: Path, exported: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base's folder is found from the adapter's, and from the working directory; config and tokenizer are the base's."""
    adapter = write_adapter(tmp_path / "ajustado", factors(), base_model_name_or_path=f"../{folder.name}")
    digest, base = checkpoint_digest(adapter), checkpoint_digest(folder)
    artifact = exported(adapter)
    (warning,) = artifact.manifest.details["warnings"]
    assert artifact.manifest.model == "ajustado" and "its base" in warning and folder.name in warning
    write_adapter(adapter, factors(), base_model_name_or_path=folder.name)
    monkeypatch.chdir(tmp_path)
    merged = read_checkpoint(adapter).weights["h.1.attn.c_attn.weight"].read()
    beside = read_checkpoint(write_adapter(folder, factors())).weights["h.1.attn.c_attn.weight"].read()
    np.testing.assert_array_equal(merged, beside)
    (folder / "adapter_config.json").unlink(), (folder / "adapter_model.safetensors").unlink()
    edit_config(folder, note="changed")
    assert checkpoint_digest(folder) != base and checkpoint_digest(adapter) != digest


def test_own_tokenizer_beside_an_adapter(folder: Path, tmp_path: Path, exported: Callable[..., Artifact]) -> None:
    """Where tokens were added, the adapter brings the tokenizer and the whole embedding matrix."""
    embedding = torch.randn(8194, 32, generator=torch.Generator().manual_seed(1)) / 5
    tensors = factors() | {
        "base_model.model.transformer.wte.weight": embedding,
        "base_model.model.lm_head.weight": embedding.clone(),
    }
    adapter = write_adapter(tmp_path / "con-tokens", tensors, base_model_name_or_path=str(folder))
    for name in TOKENIZER_FILES:
        shutil.copy(folder / name, adapter)
    tokenizer = json.loads((adapter / "tokenizer.json").read_text())
    added = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    tokenizer["added_tokens"] += [{"id": 8192, "content": "<a>", **added}, {"id": 8193, "content": "<b>", **added}]
    (adapter / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert read_fields(adapter)["vocab_size"] == 8194
    artifact = exported(adapter)
    assert json.loads((artifact.path / "config.json").read_text())["vocab_size"] == 8194
    assert '"<b>"' in (artifact.path / "tokenizer.json").read_text()
    # Both matrices are equal, so one is stored.
    assert 8194 * 32 * 4 < artifact.model.stat().st_size < 1.5 * 8194 * 32 * 4


REFUSED: dict[str, tuple[dict, str]] = {
    "DoRA": ({"use_dora": True}, "use_dora"),
    "prefix tuning": ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING"),
    "IA3": ({"peft_type": "IA3"}, "IA3"),
    "not peft": ({"peft_type": None}, "peft_type"),
    "trainable tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    "replicated layers": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
    "of the future": ({"use_novel_math": True, "use_dora": True}, "use_dora, use_novel_math"),
    "classifier": ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
    "another rank": ({"r": 16}, "r is 16, but transformer.h.0.attn.c_attn has 4"),
    "no alpha": ({"lora_alpha": "8"}, "alpha"),
    "endless alpha": ({"lora_alpha": 10**400}, "alpha"),
    "patterns in a list": ({"alpha_pattern": ["c_attn"]}, "alpha_pattern"),
    "broken pattern": ({"alpha_pattern": {"(": 2}}, "regular expression"),
    "pattern that repeats a group": ({"alpha_pattern": {r"([\w.]+)+!": 2}}, "very long"),
    "pattern of many repetitions": ({"alpha_pattern": {r"\w?" * 30 + "!": 2}}, "very long"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_merged(folder: Path, name: str) -> None:
    fields, said = REFUSED[name]
    with pytest.raises(UserError) as error:
        read_checkpoint(write_adapter(folder, factors(), **fields))
    assert said in str(error.value) and "adapter_config.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (factors(inputs=64), "[4, 64]"),
        (factors(name="base_model.model.model.layers.{}.self_attn.q_proj"), "q_proj"),
        (factors(name="base_model.model.transformer.h.9{}.attn.c_attn"), "h.90.attn.c_attn"),
        ({name: tensor for name, tensor in factors().items() if "lora_A" in name}, "no A and B"),
        (factors() | {f"{C_ATTN.format(0)}.lora_magnitude_vector": torch.ones(96)}, "lora_magnitude_vector"),
        (factors() | {"base_model.model.score.weight": torch.ones(2, 32)}, "score.weight"),
        (factors() | {"base_model.model.transformer.ln_f.weight": torch.ones(64)}, "[64]"),
        (
            factors(name=C_ATTN.replace("{}", "9{}")),
            "adapts transformer.h.90.attn.c_attn, which the base does not have",
        ),
        ({}, "holds no tensors"),
        ({name: tensor.to(torch.int8) for name, tensor in factors().items()}, "int8"),
    ],
)
def test_adapters_of_another_model(folder: Path, tensors: dict, said: str) -> None:
    with pytest.raises(UserError) as error:
        read_checkpoint(write_adapter(folder, tensors))
    assert said in str(error.value), error.value


def test_a_resized_matrix_is_stored_twice(folder: Path) -> None:
    grown = {name: torch.randn(8195, 32) for name in ("wte", "lm_head")}
    names = {"wte": "base_model.model.transformer.wte", "lm_head": "base_model.model.lm_head"}
    tensors = factors() | {f"{names[key]}.modules_to_save.weight": value for key, value in grown.items()}
    tensors |= {f"{names[key]}.weight": value.clone() for key, value in grown.items()}
    write_adapter(folder, tensors, modules_to_save=["wte", "lm_head"])
    merged = read_checkpoint(folder).weights
    assert np.array_equal(merged["wte.weight"].read(), grown["wte"].numpy())
    assert np.array_equal(merged["lm_head.weight"].read(), grown["lm_head"].numpy())
    write_adapter(folder, tensors | {f"{names['wte']}.weight": grown["wte"] + 1}, modules_to_save=["wte", "lm_head"])
    with pytest.raises(UserError, match=r"transformer\.wte\S*weight, which is not merged here"):
        read_checkpoint(folder)


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PROMPT_TUNING"])
def test_trained_prompts_cannot_be_merged(folder: Path, kind: str) -> None:
    write_adapter(folder, {"prompt_embeddings": torch.zeros(3, 32)}, peft_type=kind)
    with pytest.raises(UserError, match="cannot be merged"):
        read_checkpoint(folder)


def test_half_an_adapter(folder: Path, refused: Callable[..., str]) -> None:
    """Neither file alone says that the weights beside it are the base alone."""
    write_adapter(folder, factors())
    (folder / "adapter_model.safetensors").rename(folder / "kept")
    refused("adapter_config.json", "adapter_model.safetensors")
    (folder / "kept").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").unlink()
    refused("no adapter_config.json")


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (None, "which model"),
        ("../nowhere", "neither a folder"),
        ("/no/such/folder", "neither a folder"),
        (".", "itself"),
    ],
)
def test_no_base(tmp_path: Path, base: str | None, said: str) -> None:
    adapter = write_adapter(tmp_path / "solo", factors(), base_model_name_or_path=base)
    for read in (read_checkpoint, checkpoint_digest, lambda folder: resolve_model(str(folder))):
        with pytest.raises(UserError, match=said):
            read(adapter)


# What peft trains, and whether merging changes the same matrices as training did. Of a tied pair, peft's own merge
# changes both where training changed one, so there the adapted model is what is right.
PEFT: dict[str, tuple[dict, dict]] = {
    "default": ({}, {}),
    "all linear layers": ({"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 3, "lora_alpha": 5}, {}),
    "rslora and patterns": (
        {
            "target_modules": ["c_attn", "mlp.c_proj"],
            "use_rslora": True,
            "rank_pattern": {"h.0.attn.c_attn": 2},
            "alpha_pattern": {"mlp.c_proj": 3},
        },
        {},
    ),
    "biases": ({"bias": "all"}, {}),
    "biases of adapted layers": ({"bias": "lora_only", "target_modules": ["c_fc"]}, {}),
    "bias of B": ({"lora_bias": True}, {}),
    "norms saved": ({"modules_to_save": ["ln_f", "ln_1"]}, {}),
    "untied head": ({"target_modules": ["lm_head", "c_attn"]}, {"tie_word_embeddings": False}),
    "untied embeddings": ({"target_modules": ["wte", "wpe"]}, {"tie_word_embeddings": False}),
    "untied embeddings saved": ({"modules_to_save": ["wte", "lm_head"]}, {"tie_word_embeddings": False}),
    "tied head": ({"target_modules": ["lm_head"]}, {}),
    "tied embedding": ({"target_modules": ["wte"]}, {}),
    "tied embedding saved": ({"modules_to_save": ["wte"]}, {}),
    "tied head saved": ({"modules_to_save": ["lm_head"]}, {}),
    "tied pair saved": ({"modules_to_save": ["wte", "lm_head"]}, {}),
    "tied embedding saved, to stay tied": ({"modules_to_save": ["wte"], "ensure_weight_tying": True}, {}),
    "tied head saved, to stay tied": ({"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, {}),
    "tied embedding, to stay tied": ({"target_modules": ["wte"], "ensure_weight_tying": True}, {}),
    "tied head, to stay tied": ({"target_modules": ["lm_head"], "ensure_weight_tying": True}, {}),
    "tied pair, to stay tied": ({"target_modules": ["wte", "lm_head"], "ensure_weight_tying": True}, {}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PEFT)
def test_as_peft(tmp_path: Path, name: str) -> None:
    """The merged weights compute what peft's model computes with the adapter beside them."""
    peft = pytest.importorskip("peft")
    fields, config = PEFT[name]
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_gpt2(**config).save_pretrained(base)
    lora = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": ["c_attn"], **fields}
    adapted = peft.get_peft_model(tiny_gpt2(**config), peft.LoraConfig(**lora)).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 5)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(adapter)
    ours = pytorch_loader(adapter)()
    with torch.inference_mode():
        theirs = adapted(IDS).logits
        assert (theirs - tiny_gpt2(**config)(IDS).logits).abs().max() > 0.01  # the adapter does something
        torch.testing.assert_close(ours(IDS).logits, theirs, rtol=1e-4, atol=1e-4)
    if not name.startswith("tied"):
        for key, tensor in adapted.merge_and_unload().state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], tensor, rtol=1e-6, atol=1e-6, msg=key)
