"""Every layout in which people keep the weights of a GPT-2 is read as the same model, or refused by what it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.checkpoints import checkpoint_digest
from cuantiza.core.inputs.weights.checkpoint import Checkpoint, read_checkpoint
from cuantiza.core.inputs.weights.pytorch import pytorch_loader
from cuantiza.core.store.artifact import Artifact
from cuantiza.eval.measure.engines import Engine, Subject

from helpers import edit_config

State = dict[str, torch.Tensor]
IDS = torch.tensor([[0, 5, 17, 300, 8191]])


def assert_same(folder: Path, model, repaired: bool = True) -> Checkpoint:
    """Assert that `folder` is read as `model`, by us and by the PyTorch model that others compare with."""
    found = read_checkpoint(folder)
    wanted = {name.removeprefix("transformer."): tensor.numpy() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    assert found.weights.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found.weights[name].shape == array.shape
        np.testing.assert_array_equal(found.weights[name].read(), array, err_msg=name)
    assert found.repaired == repaired
    with torch.inference_mode():
        torch.testing.assert_close(pytorch_loader(folder)()(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)
    return found


def renamed(state: State, *pairs: tuple[str, str]) -> State:
    for old, new in pairs:
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    return state


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def without_biases(state: State, *ends: str) -> State:
    return {name: tensor for name, tensor in state.items() if not name.endswith(ends or ".bias")}


def in_linear_layout(state: State) -> State:
    return {name: tensor.T if ".c_" in name and tensor.ndim == 2 else tensor for name, tensor in state.items()}


def in_tensorflow(state: State) -> State:
    """The names and shapes of OpenAI's own files, such as model/h0/attn/c_attn/w [1, D, 3D]."""
    state = {name: tensor[None] if ".c_" in name and tensor.ndim == 2 else tensor for name, tensor in state.items()}
    state = renamed(state, ("transformer.", "model."), ("wte.weight", "wte"), ("wpe.weight", "wpe"), (".bias", ".b"))
    state = {name.replace(".weight", ".g" if ".ln_" in name else ".w"): tensor for name, tensor in state.items()}
    return renamed(state, ("h.0.", "h0."), ("h.1.", "h1."), (".", "/"))


LAYOUTS: dict[str, Callable[[State], State]] = {
    "compiled": lambda state: prefixed(state, "_orig_mod."),
    "parallel": lambda state: prefixed(state, "module."),
    "trl": lambda state: prefixed(state, "pretrained_model."),
    "ilql": lambda state: prefixed(state, "base_model."),
    "peft": lambda state: prefixed(state, "base_model.model."),
    "stacked": lambda state: prefixed(state, "module._orig_mod.model."),
    "own prefix": lambda state: renamed(state, ("transformer.", "decoder.gpt.")),
    "compiled layers": lambda state: renamed(state, ("h.0.", "h.0._orig_mod."), ("h.1.", "h.1._orig_mod.")),
    "fsdp": lambda state: renamed(state, ("h.1.", "h.1._fsdp_wrapped_module."), ("transformer.", "model.")),
    "tied pair as the head": lambda state: renamed(state, ("transformer.wte", "lm_head")),
    "that with a prefix": lambda state: prefixed(renamed(state, ("transformer.wte", "lm_head")), "_orig_mod."),
    "g and b": lambda state: renamed(state, ("ln_1.weight", "ln_1.g"), ("ln_1.bias", "ln_1.b")),
    "gamma and beta": lambda state: {
        name.replace("weight", "gamma").replace("bias", "beta") if ".ln_" in name else name: tensor
        for name, tensor in state.items()
    },
    "tensorflow": in_tensorflow,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_other_names(written: Callable[..., Path], model, state: State, name: str) -> None:
    assert assert_same(written(LAYOUTS[name](state)), model).warnings == ()


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_transformers_own_names_are_left_to_transformers(
    written: Callable[..., Path], model, state: State, prefix: str
) -> None:
    masks = {f"{prefix}h.{layer}.attn.bias": torch.ones(1, 1, 128, 128, dtype=torch.uint8) for layer in (0, 1)}
    found = assert_same(written(renamed(state, ("transformer.", prefix)) | masks), model, repaired=False)
    assert found.warnings == () and found.dtypes == ("float32",)


@pytest.mark.parametrize("keys", [("model",), ("state_dict",), ("module",), ("module", "state_dict")])
def test_dictionaries_of_training_scripts(written: Callable[..., Path], model, state: State, keys: tuple) -> None:
    wrapped: dict = dict(state)
    for key in keys:
        wrapped = {key: wrapped, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}
    assert_same(written(wrapped, "bin"), model)


def test_a_dictionary_in_itself(written: Callable[..., Path]) -> None:
    state: dict = {}
    state["model"] = state
    with pytest.raises(UserError, match="tensors are none"):
        read_checkpoint(written(state, "bin"))


def test_linear_layers_of_nn_linear(written: Callable[..., Path], model, state: State) -> None:
    """c_proj of the attention is square: only the other layers tell that it is transposed too."""
    (warning,) = assert_same(written(in_linear_layout(state)), model).warnings
    assert "[outputs, inputs]" in warning and "transposed" in warning


def test_flax_names_and_layout(written: Callable[..., Path], model, state: State) -> None:
    kinds = {".c_": "kernel", ".ln_": "scale", ".w": "embedding"}
    flax = {
        name.replace("weight", next(kind for part, kind in kinds.items() if part in name)): tensor
        for name, tensor in in_linear_layout(state).items()
    }
    assert len(assert_same(written(flax), model).warnings) == 1


def test_nanogpt(written: Callable[..., Path], model, state: State) -> None:
    """ckpt.pt as its train.py writes it: in a dictionary, compiled, nn.Linear, no biases, head and embedding."""
    bare = {name: torch.zeros_like(tensor) if name.endswith("bias") else tensor for name, tensor in state.items()}
    ours = prefixed(in_linear_layout(without_biases(state)), "_orig_mod.")
    ours["_orig_mod.lm_head.weight"] = ours["_orig_mod.transformer.wte.weight"]
    folder = written({"model": ours, "model_args": {"n_layer": 2, "bias": False}, "iter_num": 7}, "bin")
    found = read_checkpoint(folder)
    assert [word in line for line in found.warnings for word in ("transposed", "no biases")] == [
        True,
        False,
        False,
        True,
    ]
    reference = type(model)(model.config).eval()
    reference.load_state_dict(bare, strict=False)
    with torch.inference_mode():
        torch.testing.assert_close(pytorch_loader(folder)()(IDS).logits, reference(IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ((), "ln_f.bias, ln_1.bias, ln_2.bias, attn.c_attn.bias"),
        (("c_attn.bias",), "(attn.c_attn.bias)"),
        (("ln_1.bias", "ln_2.bias", "ln_f.bias"), "(ln_f.bias, ln_1.bias, ln_2.bias)"),
    ],
)
def test_biases_that_a_model_never_had(
    written: Callable[..., Path], state: State, ends: tuple[str, ...], said: str
) -> None:
    found = read_checkpoint(written(without_biases(state, *ends)))
    assert said in found.warnings[0] and found.repaired
    gone = {name.removeprefix("transformer.") for name in state if name.endswith(ends or ".bias")}
    for name in gone:
        np.testing.assert_array_equal(found.weights[name].read(), np.zeros(state[f"transformer.{name}"].shape))
    assert len(found.weights) == len(state)


@pytest.mark.parametrize(
    "missing",
    [
        ("h.1.attn.c_attn.bias",),
        ("ln_f.bias",),
        ("h.0.ln_1.bias", "h.1.ln_1.bias"),
        ("h.0.mlp.c_fc.weight", "wpe.weight"),
    ],
)
def test_missing_weights_are_all_named(written: Callable[..., Path], state: State, missing: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        read_checkpoint(written({name: tensor for name, tensor in state.items() if not name.endswith(missing)}))
    assert all(name in str(error.value) for name in missing)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: renamed(state, ("c_attn", "qkv_proj")), ("h.0.attn.c_attn.weight", "transformer.h.0.attn.qkv_proj.weight")),
        (lambda state: {f"encoder.layer.{n}.weight": torch.ones(2) for n in range(5)}, ("encoder.layer.0.weight", "and 2 more", "h.0.attn.c_attn.weight")),
        (lambda state: prefixed(state, "teacher.") | prefixed(state, "student."), ("'student.transformer.'", "'teacher.transformer.'")),
        (lambda state: state | {"h.0.ln_1.g": torch.ones(32)}, ("'transformer.'", "''")),
        (lambda state: state | {"transformer.h.0.ln_1.g": torch.ones(32)}, ("h.0.ln_1.weight", "transformer.h.0.ln_1.g")),
        (lambda state: renamed(state, ("h.1.", f"h.{'9' * 5000}.")) | {"h.1.ln_1.weight": torch.ones(32)}, ("'transformer.'",)),
        (lambda state: state | {"lm_head.bias": torch.ones(8192)}, ("lm_head.bias", "not a GPT-2")),
    ],
    ids=["other layers", "other model", "two models", "two prefixes", "twice", "a layer of 5000 digits", "bias of the head"],
)  # fmt: skip
def test_names_that_are_there_are_told(
    written: Callable[..., Path], state: State, change: Callable[[State], State], said: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as error:
        read_checkpoint(written(change(state)))
    assert all(part in str(error.value) for part in said), error.value


@pytest.mark.parametrize("fields", [{"metadata": {}}, {}], ids=["as transformers", "without metadata"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_leftover_shards(written: Callable[..., Path], model, state: State, kind: str, fields: dict) -> None:
    """An earlier save had more shards, with tensors of the same names: only what the index names counts."""
    folder = written({}, kind)
    main = "model" if kind == "safetensors" else "pytorch_model"
    (folder / f"{main}.{kind}").unlink()

    def save(tensors: State, name: str) -> None:
        if kind == "safetensors":
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / name)
        else:
            torch.save(tensors, folder / name)

    names = [f"{main}-0000{number}-of-00002.{kind}" for number in (1, 2)]
    parts = [dict(list(state.items())[number::2]) for number in (0, 1)]
    for name, part in zip(names, parts, strict=True):
        save(part, name)
    save({name: torch.zeros_like(tensor) for name, tensor in state.items()}, f"{main}-00009-of-00009.{kind}")
    index = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (folder / f"{main}.{kind}.index.json").write_text(json.dumps({"weight_map": index} | fields))
    digest = checkpoint_digest(folder)
    assert_same(folder, model, repaired=not fields)
    (folder / f"{main}-00009-of-00009.{kind}").unlink()
    assert checkpoint_digest(folder) == digest
    save(parts[0] | {"transformer.wpe.weight": torch.ones(128, 32)}, names[0])
    assert checkpoint_digest(folder) != digest


def test_one_transposed_layer_is_a_mistake(
    written: Callable[..., Path], state: State, refused: Callable[..., str]
) -> None:
    name = "transformer.h.1.mlp.c_proj.weight"
    written(state | {name: state[name].T})
    refused("h.1.mlp.c_proj.weight", "[32, 128]", "[128, 32]", "transpose")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("checkpoint-500/model.safetensors", "give the folder that has them: checkpoint-500"),
        ("model-00001-of-00002.safetensors", "index of model-00001-of-00002.safetensors"),
        ("ckpt.pt", "only ckpt.pt, which is not read; .* rename the file"),
        (
            "consolidated.safetensors",
            "only consolidated.safetensors, which is not read; if transformers wrote consolidated",
        ),
        (
            "model.fp16.safetensors",
            "if transformers wrote model.fp16.safetensors, rename it to model.safetensors; else",
        ),
        ("optimizer.bin", "no pytorch_model.bin; save the model"),
        ("optimizer.pt", "no pytorch_model.bin; save the model with transformers' save_pretrained$"),
    ],
)
def test_weights_lie_elsewhere(folder: Path, place: str, said: str) -> None:
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / "model.safetensors").rename(folder / place)
    with pytest.raises(UserError, match=said):
        read_checkpoint(folder)


def test_untied_head_without_an_embedding(written: Callable[..., Path], state: State, folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"has no weight wte\.weight"):
        read_checkpoint(written(renamed(state, ("transformer.wte", "lm_head"))))


def test_untied_without_a_head(folder: Path, model) -> None:
    model.transformer.save_pretrained(folder)
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"no lm_head\.weight.*tie_word_embeddings false"):
        read_checkpoint(folder)


def test_exported_with_parity_and_a_pytorch_row(
    written: Callable[..., Path], state: State, exported: Callable[..., Artifact]
) -> None:
    """What had to be repaired goes through the whole export, is warned about in the manifest, and has its PyTorch row."""
    folder = written(
        prefixed(in_linear_layout(without_biases(renamed(state, ("transformer.wte", "lm_head")))), "module.")
    )
    artifact = exported(folder)
    warnings = artifact.manifest.details["warnings"]
    assert len(warnings) == 2 and "transposed" in warnings[0] and "no biases" in warnings[1]
    # Of the tied pair, one matrix of 8192 x 32 floats is stored.
    assert 8192 * 32 * 4 < artifact.model.stat().st_size < 1.5 * 8192 * 32 * 4
    ours = Engine(Subject("fp32", "onnx", artifact.model), 1).logits(IDS[0].numpy())
    theirs = Engine(Subject("pytorch", "torch", folder), 1).logits(IDS[0].numpy())
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)
