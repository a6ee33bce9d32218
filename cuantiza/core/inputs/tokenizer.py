"""The tokenizer of a checkpoint or artifact: its tokenizer.json."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from cuantiza.core.errors import UserError

_RARE = "\0 a ñ 中 \U0010ffff"


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read `folder`/tokenizer.json. Raises UserError where it is missing or broken."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder}: has no tokenizer.json; put the model's own beside it")
    try:
        tokenizer = Tokenizer.from_file(str(path))
        # An unknown token that is in no vocabulary, say, shows at the first character that nothing else stands for.
        tokenizer.encode(_RARE)
        return tokenizer
    except BaseException as error:  # the Rust library raises bare Exception, and panics as something beside it
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
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
