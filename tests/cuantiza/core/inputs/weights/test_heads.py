"""Models with another head, and checkpoints that are quantized already: told as what they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.weights.checkpoint import read_checkpoint
from cuantiza.core.inputs.weights.pytorch import pytorch_loader

from helpers import Result, edit_config

State = dict[str, torch.Tensor]


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("GPT2ForSequenceClassification", "score."),
        ("GPT2ForTokenClassification", "classifier."),
        ("GPT2ForQuestionAnswering", "qa_outputs."),
    ],
)
@pytest.mark.parametrize("declared", [True, False])
def test_other_tasks(folder: Path, model, name: str, tensor: str, declared: bool) -> None:
    """What transformers saves for another task is refused, with or without `architectures` in its config.json."""
    getattr(transformers, name)(model.config).save_pretrained(folder)
    edit_config(folder, **({} if declared else {"architectures": None}))
    with pytest.raises(UserError) as error:
        read_checkpoint(folder)
    assert f"is a {name}" in str(error.value) and tensor in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["GPT2ForRewardModel", "GPT2RewardModel"])
def test_a_reward_model_is_refused(folder: Path, name: str) -> None:
    """A model that judges texts, by a class of nobody's library, whose head may lie in another file."""
    edit_config(folder, architectures=[name])
    with pytest.raises(
        UserError, match=rf"is a {name} \(architectures in config\.json says so\), and only language models"
    ):
        read_checkpoint(folder)


def test_the_export_warns_of_code_of_its_own(folder: Path, export_here: Callable[..., Result], tmp_path: Path) -> None:
    edit_config(folder, architectures=["MyGPT2ForCausalLM"], auto_map={"AutoModelForCausalLM": "modeling_my.MyGPT2"})
    result = export_here("--model", folder, "--output", tmp_path / "artifacts")
    assert result.status == 0 and "names MyGPT2ForCausalLM, MyGPT2, which transformers" in result.stderr, result.stderr


def test_a_classifier_is_refused_by_the_export(folder: Path, model, refused: Callable[..., str]) -> None:
    transformers.GPT2ForSequenceClassification(model.config).save_pretrained(folder)
    refused("is a GPT2ForSequenceClassification", "score.weight", "language model")


def test_a_classifier_of_another_family(folder: Path, refused: Callable[..., str], monkeypatch) -> None:
    """The other exporter writes the model without its head, too, if nobody stops it."""
    config = transformers.LlamaConfig(vocab_size=8192, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)  # fmt: skip
    transformers.LlamaForSequenceClassification(config).save_pretrained(folder)
    monkeypatch.setenv("OPTIMUM_PYTHON", "/bin/true")
    refused("is a LlamaForSequenceClassification", "score.weight", options=("--exporter", "optimum"))


def test_a_layout_that_only_the_default_exporter_reads(
    written: Callable[..., Path], state: State, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPTIMUM_PYTHON", "/bin/true")
    written({f"module.{name}": tensor for name, tensor in state.items()})
    refused("without EXPORTER=optimum", options=("--exporter", "optimum"))


def test_bare_and_double_heads(folder: Path, model) -> None:
    for name, left_out in (("GPT2Model", None), ("GPT2DoubleHeadsModel", "multiple_choice_head.summary.weight")):
        saved = getattr(transformers, name)(model.config).eval()
        saved.save_pretrained(folder)
        found = read_checkpoint(folder)
        backbone = saved if name == "GPT2Model" else saved.transformer
        for key, tensor in backbone.state_dict().items():
            np.testing.assert_array_equal(found.weights[key].read(), tensor.numpy(), err_msg=key)
        assert len(found.weights) == len(backbone.state_dict())
        assert [left_out is not None and left_out in line for line in found.warnings] == [True] * (left_out is not None)


@pytest.mark.parametrize("prefix", ["", "pretrained_model."])
def test_value_head(written: Callable[..., Path], model, state: State, prefix: str) -> None:
    heads = {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.ones(1)}
    folder = written({prefix + name: tensor for name, tensor in state.items()} | heads)
    (warning,) = read_checkpoint(folder).warnings
    assert "value head" in warning and "v_head.summary.bias, v_head.summary.weight" in warning
    ids = torch.tensor([[0, 5, 17]])
    with torch.inference_mode():
        torch.testing.assert_close(pytorch_loader(folder)()(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


def test_tensors_that_no_gpt2_has(written: Callable[..., Path], state: State) -> None:
    others = {f"clip_project.model.{n}.weight": torch.ones(2) for n in range(5)}
    others |= {"transformer.h.0.crossattention.c_attn.weight": torch.ones(32, 64)}
    (warning,) = read_checkpoint(written(state | others)).warnings
    assert "clip_project.model.0.weight" in warning and "and 3 more" in warning


def test_an_adapter_among_the_weights(written: Callable[..., Path], state: State) -> None:
    """The state_dict of a PeftModel that nobody has merged."""
    name = "transformer.h.0.attn.c_attn"
    state[f"{name}.base_layer.weight"] = state.pop(f"{name}.weight")
    state |= {f"{name}.lora_A.default.weight": torch.ones(4, 32), f"{name}.lora_B.default.weight": torch.ones(96, 4)}
    folder = written({f"base_model.model.{name}": tensor for name, tensor in state.items()})
    with pytest.raises(UserError, match=r"LoRA adapter.*merge_and_unload"):
        read_checkpoint(folder)


CONFIGS = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "fp8": {"quant_method": "fp8"},
    "torchao": {"quant_method": "torchao", "quant_type": "int4_weight_only"},
    "bitsandbytes, 4 bits": {"load_in_4bit": True},
    "MLX, 4 bits": {"group_size": 64, "bits": 4},
}


@pytest.mark.parametrize("method", CONFIGS)
def test_config_says_quantized(folder: Path, method: str) -> None:
    edit_config(folder, quantization_config=CONFIGS[method])
    with pytest.raises(UserError, match=rf"already quantized \({method}.*remove quantization_config"):
        read_checkpoint(folder)


QUANTIZED: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "bitsandbytes, 8 bits": (
        {"c_attn.weight": torch.ones(32, 96, dtype=torch.int8), "c_attn.SCB": torch.ones(96)},
        "bitsandbytes",
    ),
    "bitsandbytes, 4 bits": (
        {
            "c_attn.weight": torch.ones(1536, 1, dtype=torch.uint8),
            "c_attn.weight.quant_state.bitsandbytes__nf4": torch.ones(9, dtype=torch.uint8),
        },
        "bitsandbytes",
    ),
    "mlx": (
        {
            "c_attn.weight": torch.ones(96, 4, dtype=torch.uint8),
            "c_attn.scales": torch.ones(1),
            "c_attn.biases": torch.ones(1),
        },
        "(MLX: it has",
    ),
    "gptq": ({"c_attn.qweight": torch.ones(4, 96, dtype=torch.int32), "c_attn.scales": torch.ones(1, 96)}, "GPTQ"),
    "compressed": ({"c_attn.weight_packed": torch.ones(96, 4, dtype=torch.int32)}, "compressed-tensors"),
    "fp8 with scales": (
        {"c_attn.weight": torch.ones(32, 96).to(torch.float8_e4m3fn), "c_attn.weight_scale_inv": torch.ones(1)},
        "fp8",
    ),
    "integers alone": ({"c_attn.weight": torch.ones(32, 96, dtype=torch.int8)}, "c_attn.weight is int8"),
}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_weights_are_quantized(written: Callable[..., Path], state: State, name: str, kind: str) -> None:
    tensors, said = QUANTIZED[name]
    at = "transformer.h.0.attn."
    state.pop(f"{at}c_attn.weight")
    folder = written(state | {at + end: tensor for end, tensor in tensors.items()}, kind)
    with pytest.raises(UserError, match="already quantized") as error:
        read_checkpoint(folder)
    assert said in str(error.value)


@pytest.mark.parametrize("end", ["scale_weight", "weight.scale"])
def test_scales_of_8_bits_under_another_name(written: Callable[..., Path], state: State, end: str) -> None:
    """Without the scales, whose names nobody knows beforehand, the weights would be other ones."""
    at = "transformer.h.0.attn.c_attn"
    state[f"{at}.weight"] = state[f"{at}.weight"].to(torch.float8_e4m3fn)
    with pytest.raises(
        UserError, match=rf"already quantized \(it has weights of 8 bits, and .* {at}\.{end}, as a scale"
    ):
        read_checkpoint(written(state | {f"{at}.{end}": torch.ones(1)}))


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_pytorch_quantized(written: Callable[..., Path], model) -> None:
    """quantize_dynamic packs weight and bias of each nn.Linear, here of the head, into a tuple."""
    small = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(UserError, match=r"already quantized \(PyTorch: it has lm_head\._packed_params"):
        read_checkpoint(written(small.state_dict(), "bin"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_an_integer_head_is_not_replaced_by_the_embedding(
    written: Callable[..., Path], state: State, dtype: torch.dtype, refused: Callable[..., str]
) -> None:
    written(state | {"lm_head.weight": torch.ones(8192, 32, dtype=dtype)})
    refused("already quantized", "lm_head.weight", str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_floats_of_8_bits(written: Callable[..., Path], state: State, dtype: torch.dtype, kind: str) -> None:
    rounded = {name: tensor.to(dtype) for name, tensor in state.items()}
    folder = written(rounded, kind)
    found = read_checkpoint(folder)
    assert found.dtypes == (str(dtype).removeprefix("torch."),)
    assert len(found.warnings) == 1 and "8 bits" in found.warnings[0]
    for name, tensor in rounded.items():
        ours = found.weights[name.removeprefix("transformer.")].read()
        np.testing.assert_array_equal(ours, tensor.float().numpy(), err_msg=name)
    reference = pytorch_loader(folder)()
    np.testing.assert_array_equal(reference.transformer.wpe.weight.detach().numpy(), found.weights["wpe.weight"].read())


def test_floats_of_64_bits_are_exported(
    written: Callable[..., Path], state: State, export_here: Callable[..., Result], tmp_path: Path
) -> None:
    folder = written({name: tensor.double() for name, tensor in state.items()})
    assert read_checkpoint(folder).dtypes == ("float64",)
    result = export_here("--model", folder, "--output", tmp_path / "artifacts")
    assert result.status == 0 and "warning" not in result.stderr, result.stderr
