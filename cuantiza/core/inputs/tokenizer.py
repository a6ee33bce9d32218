"""Load the tokenizer of a checkpoint or artifact, and encode documents with it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from cuantiza.core.errors import UserError

_SLACK = 1024  # tokens that may be encoded beyond those asked for, so that a document is not cut for a few
_CHARACTERS = 8  # more than a token has in most texts, so that one attempt finds enough tokens
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


@dataclass(frozen=True)
class Encoded:
    """A document, or its beginning: `text`, and the ids of its tokens."""

    text: str
    ids: list[int]


def markers(tokenizer: Tokenizer, ids: Iterable[int]) -> tuple[str, ...]:
    """The texts of those of `ids` that are special tokens: written in a text, they say where it begins or ends."""
    special = tokenizer.get_added_tokens_decoder()
    return tuple(special[token].content for token in sorted(set(ids)) if token in special and special[token].special)


def take(
    tokenizer: Tokenizer, documents: Iterable[str], enough: int | None = None, marked: tuple[str, ...] = ()
) -> list[Encoded]:
    """Encode `documents` without special tokens, up to the one that reaches `enough` tokens.

    This one is cut where `enough` is reached if the whole of it would be more than a quarter too much, and more than
    1024 tokens; no more than needed of a long document is encoded. `marked` are markers, at which documents are
    divided further: the start token stands before each of them anyway, and no marker is scored.
    """
    encoded: list[Encoded] = []
    count = 0
    for text in (part for document in documents for part in _divided(document, marked)):
        if enough is not None and count >= enough:
            break
        if enough is None:
            encoded.append(Encoded(text, tokenizer.encode(text, add_special_tokens=False).ids))
        else:
            encoded.append(_beginning(tokenizer, text, enough - count, max(_SLACK, enough // 4)))
        count += len(encoded[-1].ids)
    return encoded


def encode(
    tokenizer: Tokenizer, documents: Iterable[str], enough: int | None = None, marked: tuple[str, ...] = ()
) -> list[list[int]]:
    """The token ids of what `take` gives."""
    return [document.ids for document in take(tokenizer, documents, enough, marked)]


def _divided(text: str, marked: tuple[str, ...]) -> list[str]:
    """The parts of `text` between markers, without the white space around these; `text` itself where it has none."""
    if not any(mark in text for mark in marked):
        return [text]
    parts = re.split("|".join(map(re.escape, marked)), text)
    return [part.strip() for part in parts if part.strip()]


def _beginning(tokenizer: Tokenizer, text: str, tokens: int, slack: int) -> Encoded:
    """`text` with its ids; its first `tokens` tokens, where it has over `slack` more."""
    characters = _CHARACTERS * (tokens + slack)
    while True:
        # The last tokens of a part would be others if the text went on, and are never among those that are taken.
        part = text[:characters]
        found = tokenizer.encode(part, add_special_tokens=False)
        if len(found.ids) > tokens + slack:
            break
        if len(part) == len(text):
            return Encoded(text, found.ids)
        characters *= 2
    # A character may have several tokens, which end at the same place, and a token may end in white space that its
    # offsets leave out.
    cut = tokens
    ends = [end for _, end in found.offsets]
    while cut < len(ends) - 1 and (ends[cut] <= ends[cut - 1] or part[ends[cut - 1] - 1].isspace()):
        cut += 1
    return Encoded(part[: ends[cut - 1]], found.ids[:cut])
