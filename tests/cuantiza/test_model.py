"""An artifact from Python: what it reads before a prompt."""

from __future__ import annotations

import pytest

from cuantiza.core.store.artifact import Artifact
from cuantiza.model import Model, load


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
