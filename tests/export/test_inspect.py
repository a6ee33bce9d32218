"""`cuantiza inspect` says what a checkpoint or an artifact is, as its files and an export have it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.gpt2_config import parse_config
from cuantiza.core.store.artifact import Artifact
from cuantiza.export.graphs import gpt2
from cuantiza.export.inspect import main, of_artifact, of_checkpoint

from helpers import ES_MINI, copy_tokenizer, edit_config, edit_weights, stage, tiny_gpt2, tiny_llama
from hub_stub import files_of, serving


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("inner", [None, 48])
def test_the_number_of_parameters_is_pytorchs(tied: bool, inner: int | None) -> None:
    model = tiny_gpt2(tie_word_embeddings=tied, n_inner=inner)
    config = parse_config(model.config.to_dict(), Path("config.json"))
    assert gpt2.size(config).parameters == sum(parameter.numel() for parameter in model.parameters())


def test_the_embedded_model_in_one_screen(capsys: pytest.CaptureFixture) -> None:
    assert main([str(ES_MINI)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    for wanted in (
        "6 layers of width 256",
        "float16",
        "0 (<|endoftext|>), from bos_token_id of config.json",
        "8192 tokens",
    ):
        assert any(wanted in line for line in lines), wanted
    # Every number of the model is in its file.
    assert "7.1 million, 2.1" in "\n".join(lines) and "7.1 million numbers" in "\n".join(lines)


def test_warnings_are_those_of_an_export(folder: Path, exported: Callable[..., Artifact]) -> None:
    edit_config(folder, bos_token_id=50256, eos_token_id=50256)
    found = of_checkpoint(str(folder))
    assert found["start_token"].startswith("0 (<|endoftext|>)") and any("50256" in text for text in found["warnings"])
    artifact = exported(folder)
    assert artifact.manifest.details["warnings"] == found["warnings"] == of_artifact(artifact.path)["warnings"]


def test_an_artifact(es_mini_fp32: Artifact, capsys: pytest.CaptureFixture) -> None:
    assert main([str(es_mini_fp32.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["artifact"].startswith("fp32 of es-mini") and found["start_token"] == "0 (<|endoftext|>)"
    assert any(line.startswith("model.onnx, ") for line in found["files"])


def test_an_artifact_that_was_changed_is_refused(es_mini_fp32: Artifact, tmp_path: Path) -> None:
    copy = shutil.copytree(es_mini_fp32.path, tmp_path / "fp32")
    edit_config(copy, n_head=2)
    with pytest.raises(UserError, match=r"config\.json"):
        of_artifact(copy)


def test_all_faults_are_told_at_once(folder: Path) -> None:
    edit_config(folder, n_head=5)
    (folder / "tokenizer.json").write_text("{")
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError) as error:
        of_checkpoint(str(folder))
    for wanted in ("n_head 5", "tokenizer.json", "model.safetensors"):
        assert wanted in str(error.value), str(error.value)


def test_of_a_model_on_the_hub_only_small_files_are_downloaded(tmp_path: Path, tiny_folder: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "here")
    copy_tokenizer(folder)
    with serving() as hub:
        hub.add("owner/name", files_of(folder))
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
        result = stage("cuantiza", "inspect", "owner/name", env=environment)
        assert result.status == 0, result.stderr
        assert "on the hub, not downloaded" in result.stdout and "2 layers of width 32" in result.stdout
        assert "model.safetensors" not in hub.transferred() and "config.json" in hub.transferred()


def test_of_an_interrupted_download_nothing_is_missed(tmp_path: Path, tiny_folder: Path) -> None:
    """The index and one shard are there, as after a Ctrl-C: it is as if no weights were there."""
    tiny_gpt2().save_pretrained(folder := tmp_path / "here", max_shard_size="200KB")
    copy_tokenizer(folder)
    with serving() as hub:
        hub.add("owner/name", files_of(folder))
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
        assert stage("cuantiza", "inspect", "owner/name", env=environment).status == 0
        (snapshot,) = tmp_path.glob("hf/hub/models--owner--name/snapshots/*")
        for file in (folder / "model.safetensors.index.json", next(folder.glob("*-00001-*"))):
            shutil.copy(file, snapshot)
        result = stage("cuantiza", "inspect", "owner/name", env=environment)
        assert result.status == 0 and "on the hub, not downloaded" in result.stdout, result.stderr


def test_a_config_without_a_vocabulary_is_told(tmp_path: Path) -> None:
    """transformers has a default of its own for each kind of model, which may fit the weights."""
    tiny_llama("qwen3").save_pretrained(folder := tmp_path / "tiny")
    copy_tokenizer(folder)
    fields = json.loads((folder / "config.json").read_text())
    del fields["vocab_size"]
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"config.json: has no vocab_size"):
        of_checkpoint(str(folder))


@pytest.mark.parametrize("change", [{"vocab_size": 8100}, {"n_positions": 64}, {"n_layer": 1}])
def test_sizes_that_contradict_the_weights_are_told(folder: Path, change: dict[str, int]) -> None:
    edit_config(folder, **change)
    with pytest.raises(UserError, match=r"config\.json"):
        of_checkpoint(str(folder))


def test_a_head_that_differs_is_told(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({"lm_head.weight": weights["transformer.wte.weight"] * 1.5}))
    (warning,) = of_checkpoint(str(folder))["warnings"]
    assert "lm_head.weight differs from wte.weight" in warning
    edit_config(folder, tie_word_embeddings=False)
    assert "warnings" not in of_checkpoint(str(folder))


def test_a_tokenizer_that_has_no_token_for_the_example(folder: Path) -> None:
    words = {"<|endoftext|>": 0, "hola": 1}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    assert "no token for" in str(of_checkpoint(str(folder))["example"])
