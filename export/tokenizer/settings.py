"""Read what a checkpoint says about its tokenizer besides the vocabulary: special tokens, chat templates, the class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.model_config import read_object
from cuantiza.core.inputs.tokenizer_files import SETTINGS, SPECIAL_TOKENS, TEMPLATE, TEMPLATES

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
# Paths and working state of the process that saved the file, code that is never run, and sampling.
_LEFTOVERS = (
    "auto_map",
    "backend",
    "is_local",
    "local_files_only",
    "max_length",
    "merges_file",
    "name_or_path",
    "pad_to_multiple_of",
    "sp_model_kwargs",
    "special_tokens_map_file",
    "stride",
    "tokenizer_file",
    "truncation_strategy",
    "vocab_file",
)


def read_settings(checkpoint: Path) -> dict[str, Any]:
    """The fields of tokenizer_config.json, with everything in it that other files add.

    Special tokens of special_tokens_map.json count where tokenizer_config.json has no added_tokens_decoder, as
    transformers has it. Each special token is its text alone; its flags stand in tokenizer.json. Chat templates in files
    of their own replace those of tokenizer_config.json. Raises UserError if a file is broken.
    """
    path = checkpoint / SETTINGS
    fields = read_object(path)
    if "added_tokens_decoder" not in fields:
        fields |= {key: value for key, value in read_object(checkpoint / SPECIAL_TOKENS).items() if value is not None}
    return tidy({**fields, **_templates(checkpoint)}, path)


def tidy(fields: dict[str, Any], path: Path) -> dict[str, Any]:
    """`fields` of tokenizer_config.json, the same for every reader; `path` is named in errors.

    transformers.js takes special tokens as text alone, and transformers 4.57 takes no list as extra_special_tokens.
    """
    fields = {key: value for key, value in fields.items() if key not in _LEFTOVERS}
    for key in NAMED:
        if fields.get(key) is not None:
            fields[key] = content(fields[key], key, path)
    lists = [fields.pop(key) for key in _LISTS if isinstance(fields.get(key), list)]
    if more := list(dict.fromkeys(content(item, _LISTS[0], path) for items in lists for item in items)):
        fields[_LISTS[0]] = more
    for key in _LISTS:  # an object of names and tokens, which stays one
        if isinstance(fields.get(key), dict):
            fields[key] = {name: content(item, f"{name} of {key}", path) for name, item in fields[key].items()}
    return fields


def content(token: Any, key: str, path: Path) -> str:
    """The text of a special token, which is a string or an object with `content`. Raises UserError if it is neither."""
    found = token.get("content") if isinstance(token, dict) else token
    if not isinstance(found, str):
        raise UserError(f"{path}: {key} is {token!r} where the text of a token is needed")
    return found


def special_tokens(settings: dict[str, Any]) -> list[str]:
    """The texts of all special tokens that `settings` names, each once."""
    named = [settings[key] for key in NAMED if settings.get(key) is not None]
    groups = [settings[key] for key in _LISTS if settings.get(key)]
    # transformers numbers those of an object first, as they have names.
    groups.sort(key=lambda group: not isinstance(group, dict))
    more = [text for group in groups for text in (group.values() if isinstance(group, dict) else group)]
    return list(dict.fromkeys([*named, *more]))


def write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def _templates(checkpoint: Path) -> dict[str, Any]:
    """The chat templates that are files: one text, or a list of named ones; nothing if there is none."""
    files = {"default": checkpoint / TEMPLATE} if (checkpoint / TEMPLATE).is_file() else {}
    files |= {file.stem: file for file in sorted((checkpoint / TEMPLATES).glob("*.jinja"))}
    try:
        found = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    except UnicodeDecodeError as error:
        raise UserError(f"{checkpoint}: a chat template is not UTF-8 ({error}); convert it with iconv") from None
    if set(found) == {"default"}:
        return {"chat_template": found["default"]}
    return {"chat_template": [{"name": name, "template": text} for name, text in found.items()]} if found else {}
