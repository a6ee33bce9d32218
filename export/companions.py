"""Write the configuration files of an artifact: those of the checkpoint, or new ones if it lacks them."""

from __future__ import annotations

import json
from pathlib import Path

from cuantiza.core.errors import UserError


def write_configs(fields: dict, checkpoint: Path, work: Path) -> None:
    """Write config.json, and generation_config.json: the checkpoint's own, or one made from `fields`."""
    _write_json(work / "config.json", fields)
    given = checkpoint / "generation_config.json"
    made = {key: fields[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if fields.get(key) is not None}
    _write_json(
        work / "generation_config.json", _read_json(given) if given.is_file() else {"_from_model_config": True, **made}
    )


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
