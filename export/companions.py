"""Write the configuration files of an artifact: those of the checkpoint, or new ones if it lacks them."""

from __future__ import annotations

from pathlib import Path

from cuantiza.core.inputs.model_config import read_object
from cuantiza.core.inputs.special_tokens import SpecialTokens
from cuantiza.export.tokenizer.settings import write_json


def write_configs(fields: dict, tokens: SpecialTokens, checkpoint: Path, work: Path) -> None:
    """Write config.json from `fields`, and generation_config.json: the checkpoint's own, or a new one.

    Both get the ids of `tokens`, so that whoever reads one of them starts and ends texts as the stages do.
    """
    given = checkpoint / "generation_config.json"
    generation = read_object(given) if given.is_file() else {"_from_model_config": True}
    write_json(work / "config.json", tokens.put_into(fields))
    write_json(work / "generation_config.json", tokens.put_into(generation))
