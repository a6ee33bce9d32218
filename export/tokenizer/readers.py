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
    chosen, left, sure = _choose(made, fields, config)
    if not sure:
        built, same, _ = _asked(chosen, fields, config)
        if not same and built not in _PLAIN:
            return chosen, (*warnings, _told_of_auto(built, fields, config))
    return chosen, warnings if left is None else (*warnings, _told(left, fields))


def _choose(
    settings: dict[str, Any], fields: dict[str, Any], config: dict[str, Any]
) -> tuple[dict[str, Any], str | None, bool]:
    """`settings` with the class to name, the one that was left as it does not keep to the file, and whether AutoTokenizer
    of transformers 5 is sure to take the class to name.

    For some model types, such as qwen2, it takes a class of its own whatever is named. GPT-2 is none of them.
    """
    is_gpt2 = config.get("model_type", "gpt2") == "gpt2"
    named = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if not isinstance(named, str):
        named = _GPT2[0] if is_gpt2 else None
    if named in _PLAIN:
        return _plain(settings, fields, config), None, is_gpt2
    if named in _GPT2:
        words, ends = _words(fields), ("bos_token", "eos_token", "unk_token")
        defaults = {key: _END for key in ends if key not in settings and _END in words}
        same = _gpt2s(fields, settings)
        if same and (_END in words or all(key in settings for key in ends)):
            return {**settings, **defaults, "tokenizer_class": named}, None, is_gpt2
        return _plain({**settings, **defaults}, fields, config), None if same else named, is_gpt2
    built, same, defaults = _asked(settings, fields, config)
    if same and built not in _PLAIN:
        return {**settings, "model_input_names": _INPUTS}, None, True
    left = None if same else named or "the model's type"
    return _plain({**defaults, **settings}, fields, config), left, is_gpt2 or same


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
    return (
        f"transformers 5 builds the tokenizer of {named} otherwise than {OWN} describes it ({_kinds(fields)}); "
        f"the artifact names {PLAIN} instead, which keeps to the file"
    )


def _told_of_auto(built: str, fields: dict[str, Any], config: dict[str, Any]) -> str:
    """The warning where AutoTokenizer takes `built` ("" for a class that fails) in spite of the class that is named."""
    return (
        f"AutoTokenizer of transformers 5 takes {built or 'another class'} for the model type {config.get('model_type')}, whatever "
        f"class the artifact names, and so does not split text as {OWN} says ({_kinds(fields)}); load the tokenizer by "
        f"{PLAIN}.from_pretrained, which keeps to the file"
    )


def _kinds(fields: dict[str, Any]) -> str:
    """The kinds of the parts of tokenizer.json's `fields`."""
    kinds = [part.get("type") for key in ("normalizer", "pre_tokenizer") if isinstance(part := fields.get(key), dict)]
    return ", ".join(map(str, [*kinds, fields["model"].get("type", "BPE")]))


def _asked(
    settings: dict[str, Any], fields: dict[str, Any], config: dict[str, Any]
) -> tuple[str, bool, dict[str, Any]]:
    """The class that AutoTokenizer of transformers 5 takes ("" if that fails), whether it keeps to `fields`, and the special
    tokens that it assumes.
    """
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
