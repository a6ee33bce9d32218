"""Write the tokenizer files of an artifact: the checkpoint's own where nothing has to change in them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.model_config import read_object
from cuantiza.core.inputs.tokenizer import RARE, load_tokenizer, token_ids
from cuantiza.core.inputs.tokenizer_files import OWN, SETTINGS, TEMPLATE, names_in, vocabulary_files
from cuantiza.export.tokenizer.added import read_added, settle
from cuantiza.export.tokenizer.convert import convert
from cuantiza.export.tokenizer.readers import settle_class
from cuantiza.export.tokenizer.settings import read_settings, special_tokens, write_json

# Letters of scripts that no vocabulary has together.
_FOREIGN = "ꙮ᚛𒀀"


def write_tokenizer(checkpoint: Path, work: Path, vocabulary: int, config: dict[str, Any]) -> tuple[str, ...]:
    """Write tokenizer.json and tokenizer_config.json to `work`, and chat_template.jinja if the checkpoint has it.

    tokenizer.json is the checkpoint's, byte for byte, unless it holds working state of a training (truncation, padding,
    random splits) or gives added tokens other ids than the checkpoint's files say. tokenizer_config.json holds what
    other files add to it (special tokens, chat templates), because some readers know no other file. `config` are the
    fields of config.json, and `vocabulary` is the number of tokens that the model has.

    Returns warnings. Raises UserError where there is no tokenizer, where its files are broken, or where text could give
    ids of `vocabulary` or above.
    """
    files = vocabulary_files(names_in(checkpoint), str(checkpoint))
    settings = read_settings(checkpoint)
    added = read_added(checkpoint, settings)
    given: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    if OWN in files:
        path = checkpoint / files[OWN]
        fields = _read_own(path)
        given = copy.deepcopy(fields)
    else:
        fields, settings, warnings = convert(checkpoint, files, settings, config, added)
    warnings += settle(fields, added, checkpoint)
    warnings += _name_missing(fields, settings, vocabulary)
    _clear_state(fields)
    if fields == given:
        (work / OWN).write_bytes((checkpoint / files[OWN]).read_bytes())
    else:
        (work / OWN).write_text(json.dumps(fields, ensure_ascii=False), encoding="utf-8")
    warnings += _check(fields, work, checkpoint, vocabulary)
    made, more = settle_class(settings, fields, config)
    write_json(work / SETTINGS, _agreeing(made, fields))
    if (checkpoint / TEMPLATE).is_file() and isinstance(made["chat_template"], str):
        (work / TEMPLATE).write_bytes((checkpoint / TEMPLATE).read_bytes())
    return warnings + more


def _read_own(path: Path) -> dict[str, Any]:
    """The fields of a tokenizer.json. Raises UserError if the library cannot read it."""
    fields = read_object(path)
    try:
        tokenizer = Tokenizer.from_str(json.dumps(fields))
        del tokenizer
    except BaseException as error:  # the library raises bare Exception; its panics are not even an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(f"{path}: is not a tokenizer ({error})") from None
    fields.setdefault("added_tokens", [])
    return fields


def _clear_state(fields: dict[str, Any]) -> None:
    """Take out of tokenizer.json's `fields` what belongs to a training, and would change every text."""
    for key in ("truncation", "padding"):
        if fields.get(key) is not None:
            fields[key] = None
    for key in ("dropout", "alpha", "nbest_size"):
        if fields["model"].get(key) is not None:
            fields["model"][key] = None


def _name_missing(fields: dict[str, Any], settings: dict[str, Any], vocabulary: int) -> tuple[str, ...]:
    """Add special tokens to tokenizer.json's `fields` that tokenizer_config.json alone names, as transformers would.

    transformers numbers them on from the others. Those that fall beyond the `vocabulary` of the model are left out.
    """
    tokenizer = Tokenizer.from_str(json.dumps(fields))
    beyond = []
    for text in special_tokens(settings):
        if tokenizer.token_to_id(text) is None:
            tokenizer.add_special_tokens([text])
            number = tokenizer.token_to_id(text)
            if number is None or number >= vocabulary:
                beyond.append(f"{text!r} ({number})")
            else:
                flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
                fields["added_tokens"].append({"id": number, "content": text, **flags, "special": True})
    if not beyond:
        return ()
    return (
        f"tokenizer_config.json names {', '.join(beyond)}, which tokenizer.json does not have; transformers gives an id "
        f"beyond the model's {vocabulary} tokens, so never feed it to the model",
    )


def _check(fields: dict[str, Any], work: Path, checkpoint: Path, vocabulary: int) -> tuple[str, ...]:
    """Compare tokenizer.json in `work` with its `fields` and with the model's `vocabulary`; returns warnings."""
    tokenizer = load_tokenizer(work)
    ids = tokenizer.get_vocab()
    for token in fields["added_tokens"]:
        if ids.get(token["content"]) != token["id"]:
            raise UserError(
                f"{checkpoint}: its added token {token['content']!r} has the id {token['id']}, but the library gives it {ids.get(token['content'])}; "
                "take the tokenizer files of the original checkpoint"
            )
    if not ids:
        raise UserError(
            f"{checkpoint}: its tokenizer has no tokens; take the tokenizer files of the original checkpoint"
        )
    added = {token["content"] for token in fields["added_tokens"]}
    largest = max((number for text, number in ids.items() if text not in added), default=-1)
    if largest >= vocabulary:
        raise UserError(
            f"{checkpoint}: its tokenizer gives ids up to {largest}, but the model's vocabulary ends at {vocabulary - 1}; "
            "take the tokenizer that the model was trained with"
        )
    warnings = []
    if beyond := [
        f"{token['content']!r} ({token['id']})" for token in fields["added_tokens"] if token["id"] >= vocabulary
    ]:
        warnings.append(
            f"the tokenizer has {', '.join(beyond)} beyond the model's {vocabulary} tokens; "
            "a text that spells one out is read as other text is, and other libraries must never feed its id to the model"
        )
    try:
        tokenizer.encode(RARE)
        known = token_ids(tokenizer, "a")
        if all(token_ids(tokenizer, f"a{letter}") == known for letter in _FOREIGN):
            warnings.append(
                "the tokenizer leaves out characters that its vocabulary does not have, without a token for them; "
                "figures per byte and per word count them all the same"
            )
    except Exception as error:  # the library raises bare Exception
        warnings.append(
            f"the tokenizer has no token for what is not in its vocabulary ({error}); such texts are refused"
        )
    return tuple(warnings)


def _agreeing(settings: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """`settings` without an added_tokens_decoder that says other than tokenizer.json's `fields`, or less.

    Some classes of transformers 5 believe it, and not tokenizer.json.
    """
    listed = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in fields["added_tokens"]
    }
    decoder = settings.get("added_tokens_decoder") or {}
    told = {
        number: {key: value for key, value in token.items() if key != "__type"} if isinstance(token, dict) else token
        for number, token in decoder.items()
    }
    return (
        settings if told == listed else {key: value for key, value in settings.items() if key != "added_tokens_decoder"}
    )
