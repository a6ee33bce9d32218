"""Load the tokenizer of a checkpoint or artifact, and encode documents with it."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.texts.divide import SEPARATOR, divided_at, other_markers
from cuantiza.core.machine.progress import report

# Characters that few vocabularies have.
RARE = "\0 a ñ 中 \U0010ffff"
_SLACK = 1024  # tokens that may be encoded beyond those asked for, so that a document is not cut for a few
_CHARACTERS = 8  # more than a token has in most texts, so that one attempt finds enough tokens


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
    """Token ids of `text`, without special tokens around it. Raises UserError as `_encoding` does."""
    ids: list[int] = _encoding(tokenizer, text).ids
    return ids


@dataclass(frozen=True)
class Encoded:
    """A document, or its beginning: `text`, the ids of its tokens, and which characters [start, end) each token covers."""

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]


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
    for text in (part for document in documents for part in parts(document, marked)):
        if enough is not None and count >= enough:
            break
        if enough is None:
            found = _encoding(tokenizer, text)
            encoded.append(Encoded(text, found.ids, found.offsets))
        else:
            encoded.append(_beginning(tokenizer, text, enough - count, max(_SLACK, enough // 4)))
        count += len(encoded[-1].ids)
    return encoded


def say_other_markers(tokenizer: Tokenizer, documents: Iterable[Encoded], split: str, sha256: str) -> None:
    """Warn of documents of a `split` of a corpus with a marker that ends one for other tokenizers, but is no token here.

    The split has this `sha256`; each line is told once for it.
    """
    found = Counter(mark for item in documents for mark in other_markers(item.text))
    for mark, count in found.items():
        if tokenizer.token_to_id(mark) is None:
            have = f"1 {split} document has" if count == 1 else f"{count:,} {split} documents have"
            _say_once(
                f"warning   CORPUS: {have} {mark}, which the model's tokenizer reads as text; if it ends a document, put a line "
                f"{SEPARATOR} in the place of each",
                sha256,
            )


@functools.cache
def _say_once(line: str, sha256: str) -> None:
    """Report `line` once, although several recipes calibrate on the text of this `sha256`."""
    report(line)


def encode(
    tokenizer: Tokenizer, documents: Iterable[str], enough: int | None = None, marked: tuple[str, ...] = ()
) -> list[list[int]]:
    """The token ids of what `take` gives."""
    return [document.ids for document in take(tokenizer, documents, enough, marked)]


def parts(text: str, marked: tuple[str, ...]) -> list[str]:
    """The parts of `text` between markers, without the white space around these; `text` itself where it has none."""
    if not any(mark in text for mark in marked):
        return [text]
    return [part.strip() for part in divided_at(text, marked) if part.strip()]


def _beginning(tokenizer: Tokenizer, text: str, tokens: int, slack: int) -> Encoded:
    """`text` with its ids; its first `tokens` tokens, where it has over `slack` more."""
    characters = _CHARACTERS * (tokens + slack)
    while True:
        # The last tokens of a part would be others if the text went on, and are never among those that are taken.
        part = text[:characters]
        found = _encoding(tokenizer, part)
        if len(found.ids) > tokens + slack:
            break
        if len(part) == len(text):
            return Encoded(text, found.ids, found.offsets)
        characters *= 2
    # A character may have several tokens, which end at the same place, and a token may end in white space that its
    # offsets leave out.
    cut = tokens
    ends = [end for _, end in found.offsets]
    while cut < len(ends) - 1 and (ends[cut] <= ends[cut - 1] or part[ends[cut - 1] - 1].isspace()):
        cut += 1
    return Encoded(part[: ends[cut - 1]], found.ids[:cut], found.offsets[:cut])


def _encoding(tokenizer: Tokenizer, text: str) -> Encoding:
    """The tokens of `text`, without special tokens around it.

    Raises UserError where the tokenizer has neither a token for a part of the text nor an unknown token.
    """
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # the Rust library raises bare Exception
        shown = " ".join(text[:60].split())
        raise UserError(
            f"the text «{shown}…»: the tokenizer knows no token for a part of it ({error}); "
            "take a text of words that its vocabulary has, or give tokenizer.json an unknown token"
        ) from None


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
