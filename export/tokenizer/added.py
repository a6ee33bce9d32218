"""Give added tokens the ids that the files of a checkpoint say, in the fields of tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.model_config import read_object
from cuantiza.core.inputs.tokenizer_files import ADDED_TOKENS, SETTINGS
from cuantiza.export.tokenizer.settings import content, special_tokens

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def read_added(checkpoint: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The tokens of tokenizer_config.json or added_tokens.json, by their text, as tokenizer.json writes them.

    Where the first file has an added_tokens_decoder, the second is one that an older save left, which transformers does
    not read either. Raises UserError if an id is no whole number from 0, or if two tokens have the same.
    """
    named = special_tokens(settings)
    found: dict[str, dict[str, Any]] = {}
    path = checkpoint / ADDED_TOKENS
    for text, number in read_object(path).items() if "added_tokens_decoder" not in settings else ():
        special = text in named
        found[text] = _token(text, number, {"normalized": not special, "special": special}, path)
    path = checkpoint / SETTINGS
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise UserError(f"{path}: added_tokens_decoder is not a JSON object; take the file of the original checkpoint")
    for number, token in decoder.items():
        text = content(token, "added_tokens_decoder", path)
        found[text] = _token(text, number, token if isinstance(token, dict) else {}, path)
    by_id: dict[int, str] = {}
    for text, token in found.items():
        if by_id.setdefault(token["id"], text) != text:
            raise UserError(
                f"{checkpoint}: its added tokens {by_id[token['id']]!r} and {text!r} have the same id {token['id']}; "
                "take the tokenizer files of the original checkpoint"
            )
    return found


def settle(fields: dict[str, Any], more: dict[str, dict[str, Any]], checkpoint: Path) -> tuple[str, ...]:
    """Change `fields` of tokenizer.json so that the library gives every added token the id that is written for it.

    `more` are tokens that other files add. The library numbers added tokens on from the vocabulary, whatever id is
    written for them; a token with another id gets its place in the vocabulary itself. Returns warnings. Raises UserError
    where an id cannot be given, because the vocabulary has another token there, or because it allows no gaps.
    """
    warnings = []
    added: list[dict[str, Any]] = fields["added_tokens"]
    listed = {token["content"]: token for token in added}
    new = [token for text, token in more.items() if text not in listed]
    for text, token in more.items():
        if text in listed and listed[text]["id"] != token["id"]:
            warnings.append(
                f"{text!r} has the id {listed[text]['id']} in tokenizer.json and {token['id']} in {ADDED_TOKENS} or {SETTINGS}; "
                "tokenizer.json decides"
            )
    if new:
        fields["added_tokens"] = added = sorted([*added, *new], key=lambda token: token["id"])
    vocabulary = fields["model"].get("vocab")
    if isinstance(vocabulary, dict):
        for token in added:
            there = vocabulary.get(token["content"])
            if there is not None and there != token["id"]:
                if token in new:
                    raise UserError(
                        f"{checkpoint}: {token['content']!r} has the id {token['id']} among its added tokens and {there} in its vocabulary; "
                        "take the tokenizer files of the original checkpoint"
                    )
                warnings.append(
                    f"tokenizer.json gives {token['content']!r} the ids {token['id']} and {there}; "
                    f"{there}, which its vocabulary says, counts"
                )
                token["id"] = there
    outside = [token for token in added if not isinstance(vocabulary, dict) or token["content"] not in vocabulary]
    if outside:
        read = Tokenizer.from_str(json.dumps(fields))
        if any(read.token_to_id(token["content"]) != token["id"] for token in outside):
            # All of them: the library numbers those that stay on from the size of the vocabulary, which changes here.
            _give_places(fields, outside, checkpoint)
    return tuple(warnings)


def _give_places(fields: dict[str, Any], tokens: list[dict[str, Any]], checkpoint: Path) -> None:
    """Write `tokens` into the vocabulary of `fields`, each at its id."""
    vocabulary = fields["model"].get("vocab")
    names = ", ".join(f"{token['content']!r} ({token['id']})" for token in tokens)
    if not isinstance(vocabulary, dict):
        raise UserError(
            f"{checkpoint}: the ids of its added tokens {names} do not follow on from its vocabulary of {len(vocabulary or [])} tokens, "
            f"and a {fields['model'].get('type')} vocabulary has no gaps; take the tokenizer.json of the original checkpoint"
        )
    there = {number: text for text, number in vocabulary.items()}
    for token in tokens:
        other = there.get(token["id"])
        if other is not None:
            if _reachable(fields, other, token["id"]):
                raise UserError(
                    f"{checkpoint}: its added token {token['content']!r} has the id {token['id']}, which its vocabulary gives to {other!r}; "
                    "take the tokenizer files of the original checkpoint"
                )
            del vocabulary[other]
        vocabulary[token["content"]] = token["id"]


def _reachable(fields: dict[str, Any], text: str, number: int) -> bool:
    """Whether some text is encoded as the token `text` of the vocabulary."""
    model = fields["model"]
    if model.get("type", "BPE") == "BPE" and "merges" in model:
        pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
        whole = model.get("ignore_merges", False) or len(text) == 1 or text.startswith("<0x")
        return whole or any(text in (first, second, first + second) for first, second in pairs)
    tokenizer = Tokenizer.from_str(json.dumps(fields | {"added_tokens": []}))
    return number in tokenizer.encode(tokenizer.decode([number]), add_special_tokens=False).ids


def _token(text: str, number: Any, flags: dict[str, Any], path: Path) -> dict[str, Any]:
    """A token as tokenizer.json writes it."""
    try:
        given = int(number)
    except (TypeError, ValueError):
        given = -1
    if given < 0 or isinstance(number, bool | float):
        raise UserError(f"{path}: the id of {text!r} is {number!r} where a whole number from 0 is needed")
    return {"id": given, "content": text} | {flag: bool(flags.get(flag, False)) for flag in _FLAGS}
