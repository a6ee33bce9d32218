"""Load the tokenizer of a checkpoint or artifact, and encode documents with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cuantiza.core.errors import UserError

# Characters that few vocabularies have.
RARE = "\0 a ñ 中 \U0010ffff"


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read `folder`/tokenizer.json, so that it encodes texts whole, and the same text always as the same tokens.

    What training may have left in the file is switched off: truncation, padding, and random splits (`dropout` of BPE,
    `alpha` of Unigram). Added tokens with ids beyond `vocab_size` of the folder's config.json, if there is one, are
    left out, because the model has no embedding for them: a text that spells one is encoded as other text is.

    Raises UserError if the file is missing or broken.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder}: has no tokenizer.json; put the model's own beside it")
    try:
        tokenizer = Tokenizer.from_file(str(path))
        size = _vocabulary(folder)
        if size is not None and any(token >= size for token in tokenizer.get_added_tokens_decoder()):
            fields = json.loads(path.read_text(encoding="utf-8"))
            tokenizer = Tokenizer.from_str(json.dumps(_without_ids_from(size, fields)))
        _switch_off(tokenizer)
        _provoke(tokenizer)
        return tokenizer
    except BaseException as error:  # the Rust library raises bare Exception; its panics are not even an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(f"{path}: is not a tokenizer ({error})") from None


def token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of `text`, without special tokens around it.

    Raises UserError where the tokenizer has neither a token for a part of the text nor an unknown token.
    """
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    except Exception as error:  # the Rust library raises bare Exception
        shown = " ".join(text[:60].split())
        raise UserError(
            f"the text «{shown}…»: the tokenizer knows no token for a part of it ({error}); "
            "take a text of words that its vocabulary has, or give tokenizer.json an unknown token"
        ) from None
    return ids


def encode(tokenizer: Tokenizer, documents: tuple[str, ...], enough: int | None = None) -> list[list[int]]:
    """Token ids of each document, without special tokens; stops after the document that reaches `enough` tokens."""
    encoded: list[list[int]] = []
    count = 0
    for text in documents:
        if enough is not None and count >= enough:
            break
        encoded.append(token_ids(tokenizer, text))
        count += len(encoded[-1])
    return encoded


def _switch_off(tokenizer: Tokenizer) -> None:
    """Switch off what would change a text: truncation, padding, and random splits."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for name in ("dropout", "alpha", "nbest_size"):
        if getattr(tokenizer.model, name, None) is not None:
            setattr(tokenizer.model, name, None)


def _provoke(tokenizer: Tokenizer) -> None:
    """Let a tokenizer panic now if it does so at a rare character. That it has no token for one is no fault yet."""
    try:
        tokenizer.encode(RARE)
    except Exception:
        return


def _vocabulary(folder: Path) -> int | None:
    """`vocab_size` of `folder`/config.json; None if that file is missing, broken or says nothing."""
    try:
        size = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("vocab_size")
    except (OSError, ValueError, RecursionError, AttributeError):
        return None
    return size if isinstance(size, int) and not isinstance(size, bool) else None


def _without_ids_from(size: int, fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` of tokenizer.json without added tokens whose id is `size` or more."""
    beyond = {token["content"] for token in fields["added_tokens"] if token["id"] >= size}
    model, vocabulary = fields["model"], fields["model"].get("vocab")
    if isinstance(vocabulary, dict):
        model = model | {"vocab": {word: number for word, number in vocabulary.items() if word not in beyond}}
    kept = [token for token in fields["added_tokens"] if token["content"] not in beyond]
    return fields | {"added_tokens": kept, "model": model}
