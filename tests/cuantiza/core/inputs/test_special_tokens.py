"""Which token starts a text and which end one: each rule of the policy, on real tokenizers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.special_tokens import SpecialTokens, resolve_special_tokens
from cuantiza.core.inputs.tokenizer import load_tokenizer

from helpers import ES_MINI

DEFAULT = 50256
NAMED = ("tokenizer_config.json", "special_tokens_map.json")


def write(path: Path, fields: object) -> None:
    path.write_text(json.dumps(fields), encoding="utf-8")


@pytest.fixture
def resolve(tmp_path: Path) -> Callable[..., SpecialTokens]:
    """`resolve(config, generation, vocabulary)` for es-mini's tokenizer: 8192 tokens, of which `<|endoftext|>` is 0."""
    tokenizer = load_tokenizer(ES_MINI)

    def call(
        config: dict,
        generation: dict | None = None,
        vocabulary: int = 8192,
        files: tuple[str, ...] = NAMED,
        kind="gpt2",
    ) -> SpecialTokens:
        for name in files:
            shutil.copy(ES_MINI / name, tmp_path / name)
        if generation is not None:
            write(tmp_path / "generation_config.json", generation)
        return resolve_special_tokens(tmp_path, {"model_type": kind, **config}, tokenizer, tmp_path, vocabulary)

    return call


@pytest.mark.parametrize(
    ("config", "generation", "end"),
    [
        ({"bos_token_id": 0, "eos_token_id": 0}, None, (0,)),
        ({"bos_token_id": 0, "eos_token_id": 0}, {"eos_token_id": [0, 5]}, (0, 5)),
        ({"bos_token_id": None, "eos_token_id": [0, 5]}, {"eos_token_id": [0, 5]}, (0, 5)),
        ({"eos_token_id": [5, 0]}, None, (5, 0)),
        ({"bos_token_id": [0]}, None, (0,)),
        ({"bos_token_id": 0.0, "eos_token_id": 0.0}, None, (0,)),
        ({}, {"bos_token_id": 0, "eos_token_id": 0}, (0,)),
        ({}, {"eos_token_id": 0}, (0,)),
        ({"bos_token_id": None, "eos_token_id": None}, {}, (0,)),
        ({}, None, (0,)),
    ],
)
def test_nothing_to_say(
    resolve: Callable[..., SpecialTokens], config: dict, generation: dict | None, end: tuple
) -> None:
    found = resolve(config, generation)
    assert (found.start, found.end, found.warnings) == (0, end, ())


@pytest.mark.parametrize("files", [NAMED, NAMED[:1], NAMED[1:], ()], ids=["both", "config", "map", "none"])
@pytest.mark.parametrize("vocabulary", [8192, 8256, 52000], ids=["own", "padded", "large"])
@pytest.mark.parametrize("id", [DEFAULT, 8192, 10**12])
def test_an_id_of_another_vocabulary(
    resolve: Callable[..., SpecialTokens], files: tuple[str, ...], vocabulary: int, id: int
) -> None:
    """Beyond the model's vocabulary or in its padding, which no text was trained with: the tokenizer's own token."""
    found = resolve({"bos_token_id": id, "eos_token_id": id}, {"bos_token_id": id}, vocabulary, files)
    assert (found.start, found.end) == (0, (0,))
    (line,) = found.warnings
    assert str(id) in line and "0 (<|endoftext|>)" in line


@pytest.mark.parametrize("files", [NAMED, ()], ids=["named", "tokenizer.json"])
def test_an_ordinary_word(resolve: Callable[..., SpecialTokens], files: tuple[str, ...]) -> None:
    found = resolve({"bos_token_id": 4242, "eos_token_id": 4242}, files=files)
    assert (found.start, found.end) == (0, (0,))
    (line,) = found.warnings
    assert "4242" in line and "actitud" in line and "0 (<|endoftext|>)" in line


def test_the_default_is_an_ordinary_word_of_a_large_vocabulary(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(52_000)}, unk_token="w0"))
    tokenizer.add_special_tokens(["</s>"])
    write(tmp_path / "tokenizer_config.json", {"eos_token": {"content": "</s>"}})
    for fields in ({"bos_token_id": DEFAULT, "eos_token_id": DEFAULT}, {}):
        found = resolve_special_tokens(tmp_path, {"model_type": "gpt2", **fields}, tokenizer, tmp_path, 52_001)
        assert (found.start, found.end) == (52_000, (52_000,))
        assert bool(found.warnings) == bool(fields) == any("w50256" in line for line in found.warnings)


def test_the_end_that_is_right_stays_where_the_start_is_wrong(resolve: Callable[..., SpecialTokens]) -> None:
    found = resolve({"bos_token_id": DEFAULT, "eos_token_id": [0, 7, 9000]})
    assert (found.start, found.end) == (0, (0, 7))
    assert "50256" in found.warnings[0] and "9000" in found.warnings[0]


@pytest.mark.parametrize("config", [{}, {"bos_token_id": DEFAULT, "eos_token_id": DEFAULT}])
def test_the_vocabulary_of_gpt2(resolve: Callable[..., SpecialTokens], config: dict) -> None:
    """A config.json of 2019 has no ids: 50256 in a vocabulary of 50,257, and a line where the tokenizer says otherwise."""
    found = resolve(config, vocabulary=50257)
    assert (found.start, found.end) == (DEFAULT, (DEFAULT,))
    assert all("50256" in line and "0 (<|endoftext|>)" in line for line in found.warnings) and found.warnings
    assert resolve({}, vocabulary=50257, kind="llama").start == 0


def test_a_gpt2_of_2019(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(DEFAULT)}, unk_token="w0"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    found = resolve_special_tokens(tmp_path, {"model_type": "gpt2"}, tokenizer, tmp_path, 50257)
    assert (found.start, found.end, found.warnings) == (DEFAULT, (DEFAULT,), ())


def two_tokens(folder: Path, **named: object) -> Tokenizer:
    tokenizer = load_tokenizer(ES_MINI)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<usuario>", special=False)])
    write(folder / "tokenizer_config.json", named)
    return tokenizer


def test_config_wins_over_the_tokenizer_and_both_are_named(tmp_path: Path) -> None:
    tokenizer = two_tokens(tmp_path, bos_token="<s>", eos_token="</s>")
    fields = {"model_type": "gpt2", "bos_token_id": 0, "eos_token_id": 8194}
    found = resolve_special_tokens(tmp_path, fields, tokenizer, tmp_path, 8195)
    assert (found.start, found.end) == (0, (8194,))
    (line,) = found.warnings
    start, end, _ = line.split("; ")
    assert "0 (<|endoftext|>)" in start and "8192 (<s>)" in start and "bos_token" in start
    assert "8194 (<usuario>)" in end and "8193 (</s>)" in end and "eos_token" in end


@pytest.mark.parametrize(
    ("named", "start", "end"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, 8192, 8193),
        ({"bos_token": None, "eos_token": {"content": "</s>", "special": True}}, 8193, 8193),
        ({"bos_token": "<usuario>"}, 8194, 0),
        ({"bos_token": "<not-there>"}, 0, 0),
    ],
)
def test_only_the_tokenizer_says(tmp_path: Path, named: dict, start: int, end: int) -> None:
    tokenizer = two_tokens(tmp_path, **named)
    found = resolve_special_tokens(tmp_path, {"model_type": "gpt2"}, tokenizer, tmp_path, 8195)
    assert (found.start, found.end, found.warnings) == (start, (end,), ())


@pytest.mark.parametrize("odd", [True, "0", -1, 1.5, {}, [None, "x"]])
def test_what_is_no_id_counts_as_absent(resolve: Callable[..., SpecialTokens], odd: object) -> None:
    found = resolve({"bos_token_id": odd, "eos_token_id": odd})
    assert (found.start, found.end) == (0, (0,)) and "no token id" in found.warnings[0]


def test_pad(resolve: Callable[..., SpecialTokens]) -> None:
    assert resolve({"bos_token_id": 0, "pad_token_id": 3}).pad == 3
    beyond = resolve({"bos_token_id": 0, "pad_token_id": 8192})
    assert beyond.pad is None and "pad_token_id" in beyond.warnings[0] and "8192" in beyond.warnings[0]
    written = beyond.put_into({"pad_token_id": 8192, "n_layer": 2})
    assert written == {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None, "n_layer": 2}
    assert "pad_token_id" not in beyond.put_into({"n_layer": 2})


def words(folder: Path) -> Tokenizer:
    write(folder / "tokenizer_config.json", {})
    return Tokenizer(models.WordLevel({"hola": 0, "mundo": 1}, unk_token="hola"))


def test_a_tokenizer_without_special_tokens(tmp_path: Path) -> None:
    """Nothing speaks for another id than config.json's, but a text would start with a word, which is said."""
    fields = {"model_type": "gpt2", "bos_token_id": 1}
    found = resolve_special_tokens(tmp_path, fields, words(tmp_path), tmp_path, 2)
    assert found.start == 1 and "mundo" in found.warnings[0]


@pytest.mark.parametrize("config", [{}, {"bos_token_id": 2}, {"bos_token_id": "0", "eos_token_id": None}])
def test_nothing_at_all(tmp_path: Path, config: dict) -> None:
    with pytest.raises(UserError) as error:
        resolve_special_tokens(tmp_path, {"model_type": "gpt2", **config}, words(tmp_path), tmp_path, 2)
    line = str(error.value)
    assert "config.json" in line and "bos_token_id" in line and "0 to 1" in line and "\n" not in line
    assert all(str(value) in line for value in config.values() if value is not None)


@pytest.mark.parametrize("name", ["generation_config.json", *NAMED])
def test_a_broken_file_is_named(resolve: Callable[..., SpecialTokens], tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("[1, 2")
    with pytest.raises(UserError, match=name):
        resolve({}, files=())
