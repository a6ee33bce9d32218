"""Read what the stages need of a model's config.json, whatever the model's type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cuantiza.core.errors import UserError

_POSITIONS = ("n_positions", "max_position_embeddings", "n_ctx", "seq_length", "max_seq_len")


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of config.json in a checkpoint or artifact. Raises UserError if it is missing or not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: has no config.json; take the one of the original checkpoint")
    return read_object(path)


def read_object(path: Path, whose: str = "checkpoint") -> dict[str, Any]:
    """The fields of the JSON object in `path`; none where there is no such file. Raises UserError if it holds no object.

    `whose` says in the message what the file is of.
    """
    if not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error}); take the file of the original {whose}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: is not a JSON object; take the file of the original {whose}")
    return fields


def start_token(folder: Path) -> int:
    """The id of the token before a text in the artifact `folder`: bos_token_id of its config.json.

    Export decides it (special_tokens.py) and writes it there. In a folder from elsewhere, eos_token_id stands in for it.
    Raises UserError if config.json has neither.
    """
    config = read_config(folder)
    for key in ("bos_token_id", "eos_token_id"):
        if found := _ids(config.get(key)):
            return found[0]
    raise UserError(
        f"{folder / 'config.json'}: has neither bos_token_id nor eos_token_id; add the id of the token that starts a text"
    )


def end_tokens(folder: Path) -> frozenset[int]:
    """The ids of tokens that end a text: eos_token_id, one or a list, of generation_config.json, else config.json."""
    try:
        generation = read_object(folder / "generation_config.json")
    except (OSError, UserError):
        generation = {}
    for fields in (generation, read_config(folder)):
        if found := _ids(fields.get("eos_token_id")):
            return frozenset(found)
    return frozenset()


def max_positions(config: dict[str, Any]) -> int:
    """The longest sequence, in tokens, that the model takes according to `config`, the fields of its config.json.

    If no field says so, it is 1024, the smallest default of the model types that may leave the field out.
    """
    given = [config.get(key) for key in _POSITIONS]
    numbers = [value for value in given if isinstance(value, int | float) and not isinstance(value, bool)]
    return next((int(value) for value in numbers if 0 < value < 2**31), 1024)


def _ids(value: Any) -> list[int]:
    """The token ids of `value`, one or a list of them; none if something else is among them."""
    found = value if isinstance(value, list) else [value]
    return found if all(type(item) is int for item in found) else []
