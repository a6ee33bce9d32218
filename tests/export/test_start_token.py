"""Exports of checkpoints whose files name start and end tokens in every way that people have them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cuantiza.core.inputs.model_config import end_tokens, start_token
from cuantiza.core.store.artifact import Artifact
from cuantiza.model import load

from helpers import Result, copy_tokenizer, edit_config

DEFAULT = 50256


def generation(folder: Path, **fields: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps(fields))


def read(artifact: Artifact, name: str) -> dict:
    return json.loads((artifact.path / name).read_text(encoding="utf-8"))


def test_as_transformers_saves_another_vocabulary(exported: Callable[..., Artifact], tmp_path: Path) -> None:
    """GPT2Config(vocab_size=8192) is saved with the default 50256, and with it transformers' generation_config.json."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "scratch"
    config = GPT2Config(vocab_size=8192, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    copy_tokenizer(folder)
    assert json.loads((folder / "config.json").read_text())["bos_token_id"] == DEFAULT
    artifact = exported(folder)
    assert (start_token(artifact.path), end_tokens(artifact.path)) == (0, {0})
    (line,) = artifact.manifest.details["warnings"]
    assert "50256" in line and "<|endoftext|>" in line


@pytest.mark.parametrize(
    "given",
    [
        {"bos_token_id": 4242, "eos_token_id": 4242},
        {"bos_token_id": None, "eos_token_id": None},
        {"bos_token_id": [0], "eos_token_id": "0", "pad_token_id": -1},
    ],
    ids=["word", "null", "types"],
)
def test_the_artifact_is_that_of_the_right_ids(exported: Callable[..., Artifact], folder: Path, given: dict) -> None:
    """Every text starts with the tokenizer's own token, so every figure is that of the checkpoint with the right ids."""
    right = json.loads((folder / "config.json").read_text())
    edit_config(folder, **given)
    (folder / "generation_config.json").unlink()
    artifact = exported(folder)
    assert read(artifact, "config.json") == {key: value for key, value in right.items() if key != "pad_token_id"}
    model = load(artifact.path)
    assert (model.start, model.end) == (0, {0})


def test_a_list_of_ends(exported: Callable[..., Artifact], make_gpt2: Callable[..., Path]) -> None:
    folder = make_gpt2("list")
    edit_config(folder, bos_token_id=None, eos_token_id=[0, 5])
    generation(folder, eos_token_id=[0, 5])
    artifact = exported(folder)
    assert (start_token(artifact.path), end_tokens(artifact.path)) == (0, {0, 5})
    assert read(artifact, "generation_config.json") == {"bos_token_id": 0, "eos_token_id": [0, 5]}
    assert "warnings" not in artifact.manifest.details


def test_transformers_takes_the_same_tokens(exported: Callable[..., Artifact], make_gpt2: Callable[..., Path]) -> None:
    from transformers import AutoConfig, GenerationConfig

    folder = make_gpt2("list")
    edit_config(folder, bos_token_id=DEFAULT, eos_token_id=[5, 0], pad_token_id=9000)
    generation(folder, bos_token_id=DEFAULT, eos_token_id=[DEFAULT], pad_token_id=9000)
    artifact = exported(folder)
    for read_by in (AutoConfig, GenerationConfig):
        found = read_by.from_pretrained(artifact.path)
        assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (0, [5, 0], None)
    assert (start_token(artifact.path), end_tokens(artifact.path)) == (0, {0, 5})


def test_a_config_of_2019(exported: Callable[..., Artifact], make_gpt2: Callable[..., Path]) -> None:
    """Without ids, GPT-2's vocabulary has GPT-2's token; the tokenizer, which is another's, is told."""
    folder = make_gpt2("old", vocab_size=50257)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if not k.endswith("token_id")}))
    (folder / "generation_config.json").unlink()
    artifact = exported(folder)
    assert (start_token(artifact.path), end_tokens(artifact.path)) == (DEFAULT, {DEFAULT})
    assert any("0 (<|endoftext|>)" in line for line in artifact.manifest.details["warnings"])


def test_the_line_is_printed_again(export_here: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
    edit_config(folder, bos_token_id=4242)
    first, second = (export_here("--model", folder, "--output", tmp_path / "a") for _ in range(2))
    said = [[line for line in run.stderr.splitlines() if line.startswith("warning")] for run in (first, second)]
    assert "up to date" in second.stderr and said[0] == said[1] and len(said[0]) == 1 and "4242" in said[0][0]


def test_no_token_at_all(folder: Path, refused: Callable[..., str]) -> None:
    for name in ("generation_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    words = {"type": "WordLevel", "vocab": {"hola": 0, "mundo": 1}, "unk_token": "hola"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": words}))
    edit_config(folder, bos_token_id=DEFAULT, eos_token_id=8192)
    refused(str(folder / "config.json"), "bos_token_id", "50256", "8192", "0 to 8191")
