"""Write the configuration files of an artifact: those of the checkpoint, or new ones if it lacks them."""

from __future__ import annotations

import json
from pathlib import Path

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.special_tokens import SpecialTokens


def write_configs(fields: dict, tokens: SpecialTokens, checkpoint: Path, work: Path) -> None:
    """Write config.json from `fields`, and generation_config.json: the checkpoint's own, or a new one.

    Both get the ids of `tokens`, so that whoever reads one of them starts and ends texts as the stages do.
    """
    given = checkpoint / "generation_config.json"
    generation = _read_json(given) if given.is_file() else {"_from_model_config": True}
    _write_json(work / "config.json", tokens.put_into(fields))
    _write_json(work / "generation_config.json", tokens.put_into(generation))


def _read_json(path: Path) -> dict:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({error}); take the file of the original checkpoint") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: is not a JSON object; take the file of the original checkpoint")
    return fields


def _write_json(path: Path, fields: dict) -> None:
    path.write_text(json.dumps(fields, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
