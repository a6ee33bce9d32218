"""Text as it comes, token by token: whole characters, nothing twice, and no end at bytes that are no character."""

from __future__ import annotations

import random

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from cuantiza.core.inputs.tokenizer import load_tokenizer
from cuantiza.core.run.chat import Chat
from cuantiza.core.run.sampling import Sampling, generate, scores, text_of
from cuantiza.model import Model

from helpers import ES_MINI, SPANISH

LETTERS = "▁abcdeñolhustinr,.¿?¡!"


def byte_fallback() -> Tokenizer:
    """Letters, and the bytes of all other characters, as Llama's tokenizer has them."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS]
    model = models.BPE({word: number for number, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(LETTERS)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def es_mini() -> Tokenizer:
    return load_tokenizer(ES_MINI)


@pytest.mark.parametrize("make", [es_mini, byte_fallback, metaspace])
def test_pieces_make_the_whole_text(make) -> None:
    tokenizer = make()
    texts = ["hola, ¿sabes dónde? ¡ñandú!"] if make is metaspace else [*SPANISH, "👩‍👩‍👧 日本語 �x ññ"]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        whole = tokenizer.decode(ids, skip_special_tokens=False)
        for cut in range(len(ids)):
            before = tokenizer.decode(ids[:cut], skip_special_tokens=False)
            if not before.endswith("\ufffd"):  # else the cut is within a character
                assert before + "".join(text_of(tokenizer, ids[cut:], ids[:cut])) == whole


def test_random_bytes_make_the_whole_text() -> None:
    tokenizer, generator = es_mini(), random.Random(0)
    for _ in range(30):
        ids = [generator.randrange(1, 8192) for _ in range(60)]
        assert "".join(text_of(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=False)


def test_bytes_that_are_no_character_do_not_end_the_text() -> None:
    tokenizer = byte_fallback()
    number = tokenizer.token_to_id
    korean = [number(name) for name in ("<0xEC>", "<0x84>", "<0xAC>")]
    assert list(text_of(tokenizer, [*korean, number("<0xE1>"), number("▁"), number("a")])) == ["섬", "\ufffd ", "a"]
    assert "".join(text_of(tokenizer, [number("a"), number("<0xFF>")])) == "a\ufffd"
    generator = random.Random(0)
    for _ in range(30):
        ids = [generator.randrange(1, tokenizer.get_vocab_size()) for _ in range(60)]
        assert "".join(text_of(tokenizer, ids)).count("ñ") == ids.count(number("ñ"))


@pytest.mark.parametrize("make", [es_mini, byte_fallback])
@pytest.mark.parametrize("prompt", ["Hola \ufffd", "\ufffd\ufffd"])
def test_a_prompt_that_ends_in_the_replacement_character_is_not_repeated(make, prompt: str) -> None:
    tokenizer = make()
    before = [0, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    after = tokenizer.encode("hola a", add_special_tokens=False).ids
    assert "".join(text_of(tokenizer, after, before)).strip() == "hola a"


def test_a_ban_of_every_token_is_lifted() -> None:
    logits, sampling = np.array([1.0, 2.0, 3.0], np.float32), Sampling(no_repeat_ngram=1, top_p=0.9)
    assert np.isneginf(scores(logits, [0, 2], sampling)).tolist() == [True, False, True]
    assert np.isfinite(scores(logits, [0, 1, 2, 1], sampling)).any()


class Counts:
    """A model that says 1, 2, 3, 4, 1, 2 … after any text, and likes the token after the likeliest one next."""

    def cache(self, batch: int, capacity: int) -> None:
        pass

    def step(self, cache: None, ids: np.ndarray) -> np.ndarray:
        return np.roll([[4.0, 3.0, 2.0, 1.0, 0.0]], ids[0, -1] % 4 + 1).astype(np.float32)


def test_an_answer_may_repeat_what_was_asked_and_a_text_that_goes_on_may_not() -> None:
    """transformers counts the prompt of a text, too; in a chat that would ban the words of the template and the question."""
    sampling, ids = Sampling(temperature=0, no_repeat_ngram=3), [1, 2, 3, 4, 1, 2]
    assert list(generate(Counts(), ids, 6, sampling)) == [4, 1, 3, 4, 2, 3]
    assert list(generate(Counts(), ids, 7, sampling, repeat_prompt=True)) == [3, 4, 1, 2, 3, 4, 2]
    model = object.__new__(Model)  # without the files of one
    model.runtime, model.positions, model.end = Counts(), 100, frozenset()
    assert list(model.tokens(ids, 3, sampling, asked=Chat(ids, frozenset({1})))) == [3, 4]
    assert list(model.tokens(ids, 3, sampling)) == [4, 1, 3]
