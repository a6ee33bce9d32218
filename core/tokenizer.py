"""The tokenizer of a checkpoint or artifact: its tokenizer.json and the token that starts a text."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer

from core.errors import UserError


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read `folder`/tokenizer.json. Raises UserError where it is missing or broken."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder}: has no tokenizer.json; put the model's own beside it")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises bare Exception
        raise UserError(f"{path}: is no tokenizer ({error})") from None


def encode(tokenizer: Tokenizer, documents: tuple[str, ...]) -> list[list[int]]:
    """Token ids of every document, without special tokens."""
    return [encoding.ids for encoding in tokenizer.encode_batch(list(documents), add_special_tokens=False)]


def start_token(folder: Path) -> int:
    """The id that stands before a text: the configuration's bos, else its eos (GPT-2 has one for both)."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key in ("bos_token_id", "eos_token_id"):
        if isinstance(config.get(key), int):
            return config[key]
    raise UserError(f"{folder / 'config.json'}: has neither bos_token_id nor eos_token_id; add the id of the token that starts a text")
