"""config.json of a GPT-2 under all its names: what every reader gets, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.gpt2_config import canonical_fields, is_gpt2, odd_fields, parse_config
from cuantiza.core.inputs.model_config import read_config

from helpers import ES_MINI

PATH = Path("config.json")
SIZES = {"vocab_size": 8192, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}
ALIASES = {
    "vocab_size": 8192,
    "max_position_embeddings": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def test_a_usual_file_stays_as_it_is() -> None:
    fields = read_config(ES_MINI)
    assert canonical_fields(fields) == fields and odd_fields(fields) == ()


def test_another_model_stays_as_it_is() -> None:
    fields = {"model_type": "llama", "hidden_size": 32, "bos_token_id": [1]}
    assert canonical_fields(fields) is fields and odd_fields(fields) == ()


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "gpt2", **ALIASES},
        {"model_type": "gpt2", **SIZES},
        {"model_type": "gpt2", **SIZES, **ALIASES},
        {"architectures": ["GPT2LMHeadModel"], **ALIASES},
        {"model_type": None, **SIZES},
        {"model_type": "gpt-sw3", **SIZES},
        {"model_type": "gpt2", **{key: float(value) for key, value in SIZES.items()}},
        {"model_type": "gpt2", **SIZES, "n_positions": None, "n_ctx": 128},
    ],
    ids=["aliases", "own", "both", "architectures", "null-type", "sw3", "floats", "n_ctx"],
)
def test_every_spelling_is_the_same_model(fields: dict) -> None:
    canonical = canonical_fields(fields)
    assert {key: canonical[key] for key in SIZES} == SIZES and canonical["model_type"] == "gpt2"
    assert all(type(canonical[key]) is int for key in SIZES) and "hidden_size" not in canonical
    assert canonical_fields(canonical) == canonical
    assert parse_config(fields, PATH) == parse_config({"model_type": "gpt2", **SIZES}, PATH)


def test_sizes_that_are_left_out_are_transformers_defaults() -> None:
    from transformers import GPT2Config

    canonical, theirs = canonical_fields({"model_type": "gpt2"}), GPT2Config()
    assert all(canonical[key] == getattr(theirs, key) for key in SIZES)


@pytest.mark.parametrize(
    ("fields", "loaded"),
    [
        ({"bos_token_id": [0, 1], "eos_token_id": [0, 5]}, {"bos_token_id": 0, "eos_token_id": [0, 5]}),
        ({"bos_token_id": None, "eos_token_id": [7]}, {"eos_token_id": 7}),
        ({"bos_token_id": "0", "pad_token_id": -1, "eos_token_id": True}, {}),
        ({"layer_norm_epsilon": 1}, {"layer_norm_epsilon": 1.0}),
        ({"n_inner": 64.0}, {"n_inner": 64}),
    ],
)
def test_transformers_loads_what_is_canonical(fields: dict, loaded: dict) -> None:
    from transformers import GPT2Config

    canonical = canonical_fields({"model_type": "gpt2", **SIZES, **fields})
    assert {key: value for key, value in canonical.items() if key not in SIZES and key != "model_type"} == loaded
    config = GPT2Config.from_dict(canonical)
    assert all(getattr(config, key) == value for key, value in loaded.items())


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"model_type": "gpt2"}, True),
        ({"model_type": "gpt_neo", "n_embd": 32}, False),
        ({"architectures": ["GPT2Model"]}, True),
        ({"architectures": ["GPTJForCausalLM"], "n_embd": 32}, False),
        ({"n_embd": 32, "n_layer": 2}, True),
        ({"n_embd": 32, "rotary_dim": 8}, False),
        ({"n_embd": 32, "afn": "gelu"}, False),
        ({"hidden_size": 32}, False),
        ({}, False),
    ],
)
def test_is_gpt2(fields: dict, found: bool) -> None:
    assert is_gpt2(fields) is found


@pytest.mark.parametrize(
    ("key", "alias"),
    [
        ("n_embd", "hidden_size"),
        ("n_head", "num_attention_heads"),
        ("n_layer", "num_hidden_layers"),
        ("n_positions", "max_position_embeddings"),
    ],
)
def test_two_names_that_contradict_each_other(key: str, alias: str) -> None:
    with pytest.raises(UserError, match=f"{key} is {SIZES[key]} but {alias}, another name of it, is 999"):
        parse_config({**SIZES, alias: 999}, PATH)


@pytest.mark.parametrize("alias", ["hidden_size", "num_hidden_layers"])
def test_a_wrong_value_is_named_as_it_stands(alias: str) -> None:
    with pytest.raises(UserError, match=f"{alias} is 'x' where"):
        parse_config({**ALIASES, alias: "x"}, PATH)


@pytest.mark.parametrize("value", [1e300, 10**400, float("inf"), True, [32], {}, "32"])
@pytest.mark.parametrize("key", ["n_embd", "vocab_size", "n_inner"])
def test_what_is_no_size(key: str, value: object) -> None:
    with pytest.raises(UserError, match=f"{key} is .* where a positive whole number is needed"):
        parse_config({**SIZES, key: value}, PATH)


@pytest.mark.parametrize("value", [0, -1, 10**400, float("nan"), float("inf"), True, "1e-5", None])
def test_what_is_no_epsilon(value: object) -> None:
    with pytest.raises(UserError, match="layer_norm_epsilon is"):
        parse_config({**SIZES, "layer_norm_epsilon": value}, PATH)


def test_n_positions_counts_and_n_ctx_is_told() -> None:
    fields = {"model_type": "gpt2", **SIZES, "n_ctx": 64}
    assert parse_config(fields, PATH).n_positions == 128 == canonical_fields(fields)["n_positions"]
    (line,) = odd_fields(fields)
    assert "128" in line and "64" in line
    assert odd_fields(fields | {"n_ctx": 128}) == ()
