"""What is not exported is named as what it is, and an exporter is advised only where it takes the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.model_types import (
    GRAPH_TYPES,
    OPTIMUM_TYPES,
    check_model_type,
    own_code,
    refuse_other_formats,
)

from helpers import Result, assert_nothing_published, assert_user_error, edit_config

PATH = Path("modelo/config.json")
VISION = {"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}, "encoder": {"model_type": "vit"}}
NAMED = [
    (VISION, "encoder-decoder (its decoder, gpt2"),
    ({"model_type": "encoder-decoder", "decoder": {"model_type": "gpt2"}}, "encoder-decoder"),
    ({"model_type": "speech-encoder-decoder"}, "encoder-decoder"),
    ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
    ({"model_type": "mbart"}, "encoder-decoder"),
    ({"model_type": "whisper"}, "encoder-decoder"),
    ({"model_type": "trocr"}, "TrOCR"),
    ({"model_type": "bert"}, "an encoder"),
    ({"model_type": "roberta"}, "an encoder"),
    ({"model_type": "imagegpt"}, "ImageGPT"),
    ({"model_type": "vit"}, "pictures"),
    ({"model_type": "qwen2_vl"}, "pictures or sound"),
    ({"model_type": "wav2vec2"}, "sound"),
    ({"model_type": "openai-gpt"}, "the first GPT"),
    ({"model_type": "xglm"}, "a language model that neither exporter"),
    ({"model_type": "gtp2"}, "none that transformers knows"),
    ({"model_type": 7}, "none that transformers knows"),
    ({"hidden_size": 32}, "has no model_type"),
    ({"architectures": ["GPTJForCausalLM"]}, 'are GPTJForCausalLM; add "model_type": "gptj"'),
    ({"architectures": ["LlamaForCausalLM"]}, 'add "model_type": "llama"'),
    ({"architectures": ["Gemma3ForCausalLM"]}, 'add "model_type": "gemma3_text"'),
    ({"architectures": ["MyModel"]}, 'are MyModel; if the model is a GPT-2, add "model_type": "gpt2"'),
]


@pytest.mark.parametrize("exporter", ["graph", "optimum"])
@pytest.mark.parametrize(("fields", "said"), NAMED, ids=lambda value: str(value)[:40])
def test_what_no_exporter_takes(fields: dict, said: str, exporter: str) -> None:
    with pytest.raises(UserError) as error:
        check_model_type(fields, PATH, exporter)
    line = str(error.value)
    assert line.startswith(f"{PATH}: ") and said in line and "\n" not in line
    # Where the other exporter is named, it is for another model.
    assert "EXPORTER=optimum exports it" not in line


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"architectures": ["MyGPT2ForCausalLM"]}, "names MyGPT2ForCausalLM, which"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_my.MyGPT2"}}, "names MyGPT2, which"),
        ({"architectures": ["GPT2LMHeadModel"], "auto_map": {"AutoModel": "ana/x--modeling.GPT2Model"}}, None),
        ({"architectures": ["GPT2DoubleHeadsModel"], "auto_map": {"AutoConfig": "configuration.MyConfig"}}, None),
        ({"architectures": ["TFGPT2LMHeadModel"]}, None),
        ({"architectures": ["PeftModelForCausalLM"]}, None),
        ({"architectures": "GPT2", "auto_map": ["x"]}, None),
        ({}, None),
    ],
    ids=str,
)
def test_code_of_its_own_is_named(fields: dict, said: str | None) -> None:
    found = own_code({"model_type": "gpt2", **fields})
    assert found == () if said is None else said in found[0] and "exported as the gpt2 that model_type says" in found[0]


@pytest.mark.parametrize("kind", GRAPH_TYPES)
def test_the_classes_of_transformers_are_not_code_of_its_own(kind: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    assert own_code({"model_type": kind, "architectures": [CLASSES[kind]]}) == ()
    if kind != "gpt2":  # which is known by that class
        with pytest.raises(UserError, match=f'add "model_type": "{kind}"'):
            check_model_type({"architectures": [CLASSES[kind]]}, PATH, "graph")


@pytest.mark.parametrize("kind", GRAPH_TYPES)
def test_what_the_default_exporter_takes(kind: str) -> None:
    check_model_type({"model_type": kind}, PATH, "graph")
    if kind not in OPTIMUM_TYPES:
        with pytest.raises(UserError, match=f"model_type is '{kind}'.*leave EXPORTER=optimum out"):
            check_model_type({"model_type": kind}, PATH, "optimum")


@pytest.mark.parametrize("kind", sorted({*OPTIMUM_TYPES} - {*GRAPH_TYPES}))
def test_what_the_other_exporter_takes(kind: str) -> None:
    with pytest.raises(UserError, match=f"model_type is '{kind}'.*EXPORTER=optimum exports it"):
        check_model_type({"model_type": kind}, PATH, "graph")
    check_model_type({"model_type": kind}, PATH, "optimum")


@pytest.mark.parametrize("exporter", ["graph", "optimum"])
def test_an_encoder_decoder_with_gpt2(folder: Path, refused: Callable[..., str], exporter: str) -> None:
    decoder = json.loads((folder / "config.json").read_text()) | {"add_cross_attention": True}
    (folder / "config.json").write_text(json.dumps({**VISION, "decoder": decoder, "is_encoder_decoder": True}))
    refused(str(folder / "config.json"), "encoder-decoder", options=("--exporter", exporter))


@pytest.mark.parametrize("exporter", ["graph", "optimum"])
def test_a_decoder_with_cross_attention(folder: Path, refused: Callable[..., str], exporter: str) -> None:
    edit_config(folder, add_cross_attention=True)
    refused(str(folder / "config.json"), "add_cross_attention", "encoder-decoder", options=("--exporter", exporter))


def only(folder: Path, *names: str, keep: tuple[str, ...] = ("config.json",)) -> None:
    """Leave `keep` in `folder`, and put empty files called `names` beside them."""
    for file in folder.iterdir():
        if file.name not in keep:
            file.unlink()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("modelo-q4.gguf",), "llama.cpp"),
        (("tf_model.h5",), "tf_model.h5"),
        (("flax_model.msgpack",), "flax_model.msgpack"),
        (("rust_model.ot",), "rust_model.ot"),
        (("model.onnx",), "exported already"),
        (("onnx/decoder_model.onnx",), "exported already"),
        (("model.onnx", "manifest.json"), "an artifact"),
        (("openvino_model.xml", "openvino_model.bin"), "openvino_model.xml, a model in the format of OpenVINO"),
        (("model.bin", "vocabulary.json"), "model.bin and vocabulary.json, a model in the format of CTranslate2"),
        (("rank0.safetensors",), "rank0.safetensors, a model in the format of TensorRT-LLM"),
        (
            ("params.json", "consolidated.00.pth"),
            "params.json and consolidated.00.pth, a model in the format of its maker",
        ),
        (("model_index.json", "unet/diffusion_pytorch_model.safetensors"), "diffusers"),
        (("modules.json", "model.safetensors"), "sentence-transformers"),
        (("hparams.json", "model.ckpt.index", "encoder.json"), "TensorFlow"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("keep", [("config.json",), ()], ids=["config", "no-config"])
def test_folders_of_other_formats(
    folder: Path, refused: Callable[..., str], names: tuple[str, ...], said: str, keep: tuple[str, ...]
) -> None:
    only(folder, *names, keep=keep)
    refused(str(folder), said)


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_shards_of_any_names_are_weights(folder: Path, index: str) -> None:
    """Beside them may lie forms of the same model for other programs."""
    only(folder, index, "shard-1.safetensors", "q4.gguf", "flax_model.msgpack", keep=("config.json",))
    refuse_other_formats(folder)


def test_the_state_of_a_training_is_no_model(folder: Path, refused: Callable[..., str]) -> None:
    only(folder, "optimizer.pt", "rng_state_0.pth", "training_args.bin", keep=("tokenizer.json",))
    assert "rename" not in refused(str(folder), "has no config.json")


def test_a_file_of_torch_without_a_config(folder: Path, refused: Callable[..., str]) -> None:
    only(folder, "ckpt.pt", keep=())
    refused(str(folder), "no weights but ckpt.pt, as torch saved it", "rename ckpt.pt to pytorch_model.bin")


@pytest.mark.parametrize("place", ["checkpoint-500", "snapshots/0123abc"])
def test_the_checkpoint_is_a_folder_deeper(folder: Path, refused: Callable[..., str], place: str) -> None:
    content = {file.name: file.read_bytes() for file in folder.iterdir()}
    only(folder, keep=())
    (folder / place).mkdir(parents=True)
    for name, data in content.items():
        (folder / place / name).write_bytes(data)
    refused(str(folder), str(folder / place), "give that folder")


@pytest.mark.parametrize(
    ("name", "said"),
    [("modelo.Q4_K_M.gguf", "llama.cpp"), ("model.onnx", "exported already"), ("model.safetensors", "its folder")],
)
def test_a_file_as_model(export_here: Callable[..., Result], tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert_user_error(export_here("--model", tmp_path / name, "--output", tmp_path / "artifacts"), name, said)
    assert_nothing_published(tmp_path / "artifacts")
