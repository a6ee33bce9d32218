"""Write tokenizer_config.json so that transformers, whatever its version, splits texts as tokenizer.json says."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cuantiza.core.inputs.tokenizer_files import OWN, SETTINGS
from cuantiza.export.tokenizer.settings import NAMED, special_tokens, write_json

# The class that reads tokenizer.json as it is, in transformers 4 and 5, transformers.js and onnxruntime-genai.
PLAIN = "PreTrainedTokenizerFast"
_PLAIN = (PLAIN, "PreTrainedTokenizer", "TokenizersBackend")
_GPT2 = ("GPT2Tokenizer", "GPT2TokenizerFast")
# Without token types, which no graph of ours has as an input; GPT-2 in PyTorch would add the embedding of token 0.
_INPUTS = ["input_ids", "attention_mask"]
_END = "<|endoftext|>"
# What transformers 5 builds for GPT2Tokenizer from the vocabulary and the merges alone, without what is false or empty.
_GPT2_PARTS = {
    "pre_tokenizer": {"type": "ByteLevel", "use_regex": True},
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE"},
}


def settle_class(
    settings: dict[str, Any], fields: dict[str, Any], config: dict[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """`settings` of tokenizer_config.json with which every reader keeps to tokenizer.json's `fields`, and warnings.

    Many classes of transformers 5 build the tokenizer anew from its vocabulary, as they know it, and pay no heed to the
    file's own normalizer and pre-tokenizer. If that changes anything, the class becomes the one that reads the file.
    """
    made, warnings = _prefix_space(settings, fields)
    named = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if not isinstance(named, str):
        named = _GPT2[0] if config.get("model_type", "gpt2") == "gpt2" else None
    if named in _PLAIN:
        return _plain(made, fields, config), warnings
    if named in _GPT2:
        words = _words(fields)
        defaults = {key: _END for key in ("bos_token", "eos_token", "unk_token") if key not in made and _END in words}
        if _gpt2s(fields, made) and (
            _END in words or all(key in made for key in ("bos_token", "eos_token", "unk_token"))
        ):
            return {**made, **defaults, "tokenizer_class": named}, warnings
        if not _gpt2s(fields, made):
            warnings += (_told(named, fields),)
        return _plain({**made, **defaults}, fields, config), warnings
    built, same, defaults = _asked(made, fields, config)
    if same and built not in _PLAIN:
        return {**made, "model_input_names": _INPUTS}, warnings
    if not same:
        warnings = (*warnings, _told(named or "the model's type", fields))
    return _plain({**defaults, **made}, fields, config), warnings


def _plain(settings: dict[str, Any], fields: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """`settings` of the class that reads the file as it is."""
    made = {**settings, "tokenizer_class": PLAIN, "model_input_names": _INPUTS}
    if not any(key in made for key in NAMED):
        special = {token["id"]: token["content"] for token in fields["added_tokens"] if token["special"]}
        for key in ("bos_token", "eos_token", "pad_token"):
            number = config.get(f"{key}_id")
            if isinstance(number, int) and number in special:
                made[key] = special[number]
        unknown = fields["model"].get("unk_token")
        if isinstance(unknown, str) and unknown in special.values():
            made["unk_token"] = unknown
    return made


def _prefix_space(settings: dict[str, Any], fields: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """`settings` whose add_prefix_space is the pre-tokenizer's, because transformers 4 changes the latter by the former."""
    before = fields.get("pre_tokenizer") or {}
    if before.get("type") != "ByteLevel":
        return settings, ()
    own, said = bool(before.get("add_prefix_space")), settings.get("add_prefix_space")
    if own == bool(said):
        return settings, ()
    warnings: tuple[str, ...] = ()
    if said is not None:
        warnings = (
            f"add_prefix_space is {json.dumps(said)} in {SETTINGS} and {json.dumps(own)} in {OWN}, which decides",
        )
    return {**settings, "add_prefix_space": own}, warnings


def _gpt2s(fields: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether GPT2Tokenizer of transformers 5 builds what `fields` of tokenizer.json describe."""
    expected = json.loads(json.dumps(_GPT2_PARTS))
    if settings.get("add_prefix_space"):
        expected["pre_tokenizer"]["add_prefix_space"] = True
    return _parts(fields) == expected


def _parts(fields: dict[str, Any]) -> dict[str, Any]:
    """What decides how `fields` of tokenizer.json split and join texts, except the vocabulary, without what is empty."""
    model = {key: value for key, value in fields["model"].items() if key not in ("vocab", "merges", "dropout")}
    parts = {key: fields.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")}
    decoder = parts["decoder"]
    if isinstance(decoder, dict) and decoder.get("type") == "ByteLevel":
        parts["decoder"] = {"type": "ByteLevel"}  # its other fields say nothing about decoding
    return _bare({**parts, "model": {"type": "BPE", **model}})


def _bare(value: Any) -> Any:
    """`value` without keys that are null, false or empty, and without trim_offsets, which changes no token."""
    if isinstance(value, dict):
        kept = {key: _bare(item) for key, item in value.items() if key != "trim_offsets"}
        return {key: item for key, item in kept.items() if item not in (None, False, "", {}, [])}
    return [_bare(item) for item in value] if isinstance(value, list) else value


def _words(fields: dict[str, Any]) -> set[str]:
    """All tokens of tokenizer.json."""
    vocabulary = fields["model"].get("vocab") or []
    words = vocabulary if isinstance(vocabulary, dict) else (item[0] for item in vocabulary)
    return {*words, *(token["content"] for token in fields["added_tokens"])}


def _told(named: str, fields: dict[str, Any]) -> str:
    kinds = [part.get("type") for key in ("normalizer", "pre_tokenizer") if isinstance(part := fields.get(key), dict)]
    kinds += [fields["model"].get("type", "BPE")]
    return (
        f"transformers 5 builds the tokenizer of {named} otherwise than {OWN} describes it ({', '.join(map(str, kinds))}); "
        f"the artifact names {PLAIN} instead, which keeps to the file"
    )


def _asked(
    settings: dict[str, Any], fields: dict[str, Any], config: dict[str, Any]
) -> tuple[str, bool, dict[str, Any]]:
    """The class that transformers 5 takes, whether it keeps to `fields`, and the special tokens that it assumes."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / OWN).write_text(json.dumps(fields), encoding="utf-8")
        write_json(folder / SETTINGS, settings)
        write_json(folder / "config.json", {"model_type": config.get("model_type", "gpt2")})
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            read = json.loads(tokenizer.backend_tokenizer.to_str())
        except Exception:  # a class that cannot read this file, or has no tokenizer of the library
            return "", False, {}
    named = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if key in NAMED}
    side = {"padding_side": tokenizer.padding_side} if tokenizer.padding_side != "right" else {}
    same = _parts(read) == _parts(fields) and _vocabulary(read) == _vocabulary(fields)
    known = _words(fields)
    same = same and known.issuperset(tokenizer.get_vocab().keys() - set(special_tokens(settings)))
    defaults = {key: value for key, value in named.items() if value in known}
    return type(tokenizer).__name__, same, {**defaults, **side}


def _vocabulary(fields: dict[str, Any]) -> Any:
    """The vocabulary and the merges, in one form."""
    model = fields["model"]
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    return model.get("vocab"), merges
