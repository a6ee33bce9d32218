"""Texts are encoded whole, and the same text always as the same tokens, whatever a training left in tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.tokenizer import encode, load_tokenizer, token_ids

from helpers import CORPUS, ES_MINI, SPANISH

PADDING = {"direction": "Right", "pad_to_multiple_of": 64, "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
STATE: dict[str, dict] = {
    "truncation": {
        "truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0},
    },
    "longest": {"padding": PADDING | {"strategy": "BatchLongest"}},
    "fixed": {"padding": PADDING | {"strategy": {"Fixed": 512}, "pad_to_multiple_of": None}},
    "dropout": {"dropout": 0.5},
}


def own(**changes: object) -> dict:
    """The fields of es-mini's tokenizer.json with `changes`; `dropout` is one of the model's."""
    fields = json.loads((ES_MINI / "tokenizer.json").read_text(encoding="utf-8"))
    for key, value in changes.items():
        (fields["model"] if key in fields["model"] else fields)[key] = value
    return fields


@pytest.fixture
def loaded(tmp_path: Path) -> Callable[..., Tokenizer]:
    def call(fields: dict, **config: object) -> Tokenizer:
        (tmp_path / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")
        if config:
            (tmp_path / "config.json").write_text(json.dumps(config))
        return load_tokenizer(tmp_path)

    return call


@pytest.mark.parametrize("name", STATE)
def test_working_state_changes_no_text(loaded: Callable[..., Tokenizer], name: str) -> None:
    texts = (*SPANISH, *(path.read_text(encoding="utf-8") for path in sorted(CORPUS.glob("*.txt"))[:3]))
    tokenizer = loaded(own(**STATE[name]))
    for _ in range(2):
        assert encode(tokenizer, texts) == encode(load_tokenizer(ES_MINI), texts)


def test_sampling_of_a_unigram_is_off(loaded: Callable[..., Tokenizer]) -> None:
    pieces = [("<unk>", 0.0), ("a", -1.0), ("b", -1.1), ("ab", -2.0), ("aa", -2.0), ("abab", -4.0)]
    model = models.Unigram(pieces, unk_id=0)
    model.alpha, model.nbest_size = 0.1, 8
    tokenizer = loaded(json.loads(Tokenizer(model).to_str()))
    assert tokenizer.model.alpha is None and tokenizer.model.nbest_size is None
    assert len({tuple(token_ids(tokenizer, "ababaab" * 5)) for _ in range(20)}) == 1


@pytest.mark.parametrize("inside", [False, True], ids=["added", "also-a-word"])
def test_a_token_without_an_embedding_is_read_as_text(loaded: Callable[..., Tokenizer], inside: bool) -> None:
    fields = own()
    fields["added_tokens"].append({**fields["added_tokens"][0], "id": 8192, "content": "[PAD]"})
    if inside:
        fields["model"]["vocab"]["[PAD]"] = 8192
    assert token_ids(loaded(fields), "Hola [PAD]")[-1] == 8192
    assert token_ids(loaded(fields, vocab_size=8193), "Hola [PAD]")[-1] == 8192
    limited = loaded(fields, vocab_size=8192)
    assert token_ids(limited, "Hola [PAD]") == token_ids(load_tokenizer(ES_MINI), "Hola [PAD]")
    assert token_ids(limited, "<|endoftext|>") == [0]


@pytest.mark.parametrize("kind", [models.WordLevel, models.WordPiece])
def test_without_an_unknown_token_only_unknown_words_are_refused(
    loaded: Callable[..., Tokenizer], kind: Callable[..., models.Model]
) -> None:
    made = Tokenizer(kind({"hola": 0, "que": 1}))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = loaded(json.loads(made.to_str()))
    assert encode(tokenizer, ("hola que", "que")) == [[0, 1], [1]]
    with pytest.raises(UserError, match=r"«que nada…».*unknown token"):
        encode(tokenizer, ("hola", "que nada"))


def test_a_post_processor_adds_nothing(loaded: Callable[..., Tokenizer]) -> None:
    bos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [bos]}
    template["special_tokens"] = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
    tokenizer = loaded(own(post_processor=template))
    assert tokenizer.encode("hola").ids[0] == 0
    assert token_ids(tokenizer, "hola") == token_ids(load_tokenizer(ES_MINI), "hola")
