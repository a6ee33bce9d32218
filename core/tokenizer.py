"""How text becomes input of the model in a folder: its tokenizer, its start token, its longest sequence."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer

from core.errors import UserError

_POSITIONS = ("n_positions", "max_position_embeddings", "n_ctx", "seq_length", "max_seq_len")


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read `folder`/tokenizer.json. Raises UserError where it is missing or broken."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder}: has no tokenizer.json; put the model's own beside it")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises bare Exception
        raise UserError(f"{path}: is no tokenizer ({error})") from None


def encode(tokenizer: Tokenizer, documents: tuple[str, ...], enough: int | None = None) -> list[list[int]]:
    """Token ids of every document, without special tokens; of no more documents than give `enough` tokens."""
    encoded: list[list[int]] = []
    count = 0
    for text in documents:
        if enough is not None and count >= enough:
            break
        encoded.append(tokenizer.encode(text, add_special_tokens=False).ids)
        count += len(encoded[-1])
    return encoded


def start_token(folder: Path) -> int:
    """The id that stands before a text: the configuration's bos, else its eos (GPT-2 has one for both)."""
    config = read_config(folder)
    for key in ("bos_token_id", "eos_token_id"):
        if isinstance(config.get(key), int):
            return config[key]
    raise UserError(
        f"{folder / 'config.json'}: has neither bos_token_id nor eos_token_id; add the id of the token that starts a text"
    )


def max_positions(config: dict) -> int:
    """The longest sequence in tokens that the model of config.json's fields takes; 1024 where it names none.

    That is the smallest that transformers takes for any model type that names none.
    """
    given = (config[key] for key in _POSITIONS if isinstance(config.get(key), int) and config[key] > 0)
    return next(given, 1024)


def read_config(folder: Path) -> dict:
    """config.json of an artifact or of a folder of another origin. Raises UserError where there is none."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: has no config.json; put the model's own beside its ONNX file") from None
    except ValueError as error:
        raise UserError(f"{path}: is no JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: is no JSON object")
    return config
