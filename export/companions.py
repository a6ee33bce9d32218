"""Write the tokenizer and configuration files of an artifact: those of the checkpoint, or new ones if it lacks them."""

from __future__ import annotations

import json
from pathlib import Path

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.checkpoints import TOKENIZER
from cuantiza.core.inputs.special_tokens import SpecialTokens
from cuantiza.core.inputs.tokenizer import load_tokenizer


def write_tokenizer(checkpoint: Path, work: Path, vocabulary: int) -> None:
    """Write tokenizer.json and tokenizer_config.json to `work`.

    GPT-2 checkpoints of 2020 carry only vocab.json and merges.txt; transformers makes the missing files from these.
    Raises UserError where there is no tokenizer, or where it gives ids of `vocabulary` or above.
    """
    if (checkpoint / "tokenizer.json").is_file() and (checkpoint / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(checkpoint)
        _write_json(work / "tokenizer_config.json", _read_json(checkpoint / "tokenizer_config.json"))
    else:
        tokenizer = _convert(checkpoint, work)
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest < 0:
        raise UserError(
            f"{checkpoint}: its tokenizer has no tokens; take the tokenizer files of the original checkpoint"
        )
    if largest >= vocabulary:
        raise UserError(
            f"{checkpoint}: its tokenizer gives ids up to {largest}, but the model's vocabulary ends at {vocabulary - 1}; "
            "take the tokenizer that the model was trained with"
        )
    (work / "tokenizer.json").write_text(tokenizer.to_str(pretty=False), encoding="utf-8")


def write_configs(fields: dict, tokens: SpecialTokens, checkpoint: Path, work: Path) -> None:
    """Write config.json from `fields`, and generation_config.json: the checkpoint's own, or a new one.

    Both get the ids of `tokens`, so that whoever reads one of them starts and ends texts as the stages do.
    """
    given = checkpoint / "generation_config.json"
    generation = _read_json(given) if given.is_file() else {"_from_model_config": True}
    _write_json(work / "config.json", tokens.put_into(fields))
    _write_json(work / "generation_config.json", tokens.put_into(generation))


def _convert(checkpoint: Path, work: Path):
    """Let transformers write the tokenizer files that `checkpoint` lacks, and return the tokenizer."""
    if not any((checkpoint / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(
            f"{checkpoint}: has no tokenizer ({', '.join(TOKENIZER)}); take the files of the original checkpoint"
        )
    if not (checkpoint / "tokenizer.json").is_file() and not (checkpoint / "merges.txt").is_file():
        raise UserError(f"{checkpoint}: has vocab.json but no merges.txt; take the files of the original checkpoint")
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False).save_pretrained(work)
    except Exception as error:  # for a broken file, the Rust library and transformers raise many kinds of exception
        raise UserError(
            f"{checkpoint}: its tokenizer files are broken ({error}); take those of the original checkpoint"
        ) from None
    if not (checkpoint / "tokenizer.json").is_file():
        _check_merges(work / "tokenizer.json", checkpoint)
    config = work / "tokenizer_config.json"
    fields = {key: value for key, value in _read_json(config).items() if key not in ("is_local", "local_files_only")}
    for file in work.iterdir():
        if file.name in TOKENIZER and file.name != "tokenizer.json":
            file.unlink()
    _write_json(config, fields)
    # The checkpoint's own tokenizer.json has priority: transformers 5 rebuilds a GPT-2 tokenizer from vocabulary and
    # merges alone, without the file's own normalizer and pre-tokenizer.
    return load_tokenizer(checkpoint if (checkpoint / "tokenizer.json").is_file() else work)


def _check_merges(tokenizer: Path, checkpoint: Path) -> None:
    """Raise UserError if merges are missing, because text would then be split into single letters.

    Every token except the 256 bytes and a few special ones is the result of a merge.
    """
    model = _read_json(tokenizer)["model"]
    if len(model["vocab"]) - len(model["merges"]) > 2 * 256:
        raise UserError(
            f"{checkpoint / 'merges.txt'}: has {len(model['merges'])} merges for the {len(model['vocab'])} tokens of vocab.json; "
            "it is cut short, take the file of the original checkpoint"
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
