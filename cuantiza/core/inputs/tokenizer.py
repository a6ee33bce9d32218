"""Load the tokenizer of a checkpoint or artifact, and encode documents with it."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from cuantiza.core.errors import UserError

_RARE = "\0 a ñ 中 \U0010ffff"


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read `folder`/tokenizer.json. Raises UserError if it is missing or broken."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder}: has no tokenizer.json; put the model's own beside it")
    try:
        tokenizer = Tokenizer.from_file(str(path))
        # Some faults only show at a rare character, such as an unknown token that is missing from the vocabulary.
        tokenizer.encode(_RARE)
        return tokenizer
    except BaseException as error:  # the Rust library raises bare Exception; its panics are not even an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(f"{path}: is not a tokenizer ({error})") from None


def encode(tokenizer: Tokenizer, documents: tuple[str, ...], enough: int | None = None) -> list[list[int]]:
    """Token ids of each document, without special tokens; stops after the document that reaches `enough` tokens."""
    encoded: list[list[int]] = []
    count = 0
    for text in documents:
        if enough is not None and count >= enough:
            break
        encoded.append(tokenizer.encode(text, add_special_tokens=False).ids)
        count += len(encoded[-1])
    return encoded
