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
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: has no config.json; take the one of the original checkpoint") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error}); take the file of the original checkpoint") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: is not a JSON object; take the file of the original checkpoint")
    return fields


def start_token(folder: Path) -> int:
    """The id of the token before a text: bos_token_id, else eos_token_id (GPT-2 has one token for both).

    Raises UserError if config.json has neither.
    """
    config = read_config(folder)
    for key in ("bos_token_id", "eos_token_id"):
        if isinstance(found := config.get(key), int):
            return found
    raise UserError(
        f"{folder / 'config.json'}: has neither bos_token_id nor eos_token_id; add the id of the token that starts a text"
    )


def end_tokens(folder: Path) -> frozenset[int]:
    """The ids of tokens that end a text: eos_token_id, one or a list, of generation_config.json, else config.json."""
    try:
        generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        generation = {}
    for fields in (generation, read_config(folder)):
        found = fields.get("eos_token_id") if isinstance(fields, dict) else None
        ids = found if isinstance(found, list) else [found]
        if ids and all(isinstance(item, int) for item in ids):
            return frozenset(ids)
    return frozenset()


def max_positions(config: dict[str, Any]) -> int:
    """The longest sequence, in tokens, that the model takes according to `config`, the fields of its config.json.

    If no field says so, it is 1024, the smallest default of the model types that may leave the field out.
    """
    given = (config[key] for key in _POSITIONS if isinstance(config.get(key), int) and config[key] > 0)
    return next(given, 1024)
