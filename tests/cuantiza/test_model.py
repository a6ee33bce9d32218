"""An artifact from Python: what it reads before a prompt."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from cuantiza.core.errors import UserError
from cuantiza.core.store.artifact import Artifact, open_artifact
from cuantiza.core.store.user_cache import VARIABLE
from cuantiza.model import Model, load
from cuantiza.quantize.stage import quantize


@pytest.fixture(scope="module")
def model(es_mini_fp32: Artifact) -> Model:
    return load(es_mini_fp32, 1)


def test_a_prompt_that_begins_with_the_start_token_has_it_once(model: Model) -> None:
    plain = model.encode("Hola, buenos")
    assert plain[0] == model.start == 0 and model.start not in plain[1:]
    for written in ("<|endoftext|>Hola, buenos", "<|endoftext|><|endoftext|>Hola, buenos"):
        assert model.encode(written) == plain
        assert model.generate(written, 5, temperature=0) == model.generate("Hola, buenos", 5, temperature=0)
    assert model.encode("<|endoftext|>") == model.encode("") == [0]
    # White space after it belongs to the prompt, and so does a token in the midst of one.
    assert model.encode("<|endoftext|> Hola") == model.encode(" Hola") != model.encode("Hola")
    assert model.encode("Hola<|endoftext|>")[-1] == 0


def test_another_artifact_in_the_place_of_one_that_was_opened(
    es_mini_fp32: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "caches"))
    place, ids = shutil.copytree(es_mini_fp32.path, tmp_path / "made" / "fp32"), np.arange(40)
    opened, expected = open_artifact(place), load(es_mini_fp32, 1).logits(ids)
    half = quantize(es_mini_fp32.path, "bf16", output=tmp_path / "half" / "bf16")
    shutil.rmtree(place)
    shutil.copytree(half.path, place)
    with pytest.raises(UserError, match="changed since it was published"):
        load(opened, 1)
    assert (load(place, 1).logits(ids) != expected).any()
    shutil.rmtree(place)
    shutil.copytree(es_mini_fp32.path, place)
    for found in (load(opened, 1), load(place, 1)):
        assert (found.logits(ids) == expected).all()
