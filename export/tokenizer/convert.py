"""Let transformers make tokenizer.json from older files: byte pairs, a sentencepiece model, or a list of words."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.model_config import read_object
from cuantiza.core.inputs.tokenizer_files import MERGES, OWN, SENTENCEPIECE, SETTINGS, VOCABULARY, WORDS
from cuantiza.export.tokenizer.readers import PLAIN
from cuantiza.export.tokenizer.settings import tidy, write_json
from cuantiza.export.tokenizer.spm import WITH_OWN_IDS, from_sentencepiece, read_model

# So many tokens of a file a class of transformers may replace by its own special tokens. Where more are lost, the class
# did not read the file: it then has a vocabulary of its special tokens alone.
_FEW = 8


def convert(
    checkpoint: Path,
    files: dict[str, str],
    settings: dict[str, Any],
    config: dict[str, Any],
    added: dict[str, dict[str, Any]],
) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]:
    """The fields of tokenizer.json and tokenizer_config.json that transformers makes of `files`, and warnings.

    `files` names the files of `checkpoint` by transformers' names; `settings` are the fields of tokenizer_config.json,
    `config` those of config.json; `added` are the added tokens with their ids. Raises UserError where the files are
    broken or cut short.
    """
    warnings: tuple[str, ...] = ()
    named = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if WORDS in files and (named is None or not isinstance(named, str) or named.startswith("GPT2")):
        named = "BertTokenizer"
        warnings = (f"no file names the class of the tokenizer; {WORDS} is read as BertTokenizer's",)
    model = next((checkpoint / given for name, given in files.items() if name in SENTENCEPIECE), None)
    if model is not None and (not isinstance(named, str) or _has_own_ids(named)):
        fields, settings = from_sentencepiece(model, settings)
        if named in ("T5Tokenizer", "T5TokenizerFast"):
            _add_extra_ids(fields, settings, config)
        return fields, {**settings, "tokenizer_class": PLAIN}, warnings
    tokens = 0
    if model is not None:
        # transformers takes what is no such model for another kind of file, and a file of another name for none at all.
        tokens = len(read_model(model).pieces)
        files = dict.fromkeys(SENTENCEPIECE, model.name)
    with TemporaryDirectory() as temporary:
        prepared, saved = Path(temporary, "prepared"), Path(temporary, "saved")
        prepared.mkdir()
        for name, given in files.items():
            shutil.copyfile(checkpoint / given, prepared / name)
        if VOCABULARY in files:
            # Words of the vocabulary keep their ids, so the added tokens become words, unless their ids are taken.
            words = read_object(checkpoint / files[VOCABULARY])
            taken = {number for number in words.values() if isinstance(number, int)}
            free = {text: token["id"] for text, token in added.items() if token["id"] not in taken}
            write_json(prepared / VOCABULARY, free | words)
            tokens = len(words)
        elif WORDS in files:
            lines = (checkpoint / files[WORDS]).read_text(encoding="utf-8", errors="replace").split("\n")
            tokens = len({line.strip() for line in lines})
        left_out = ("added_tokens_decoder", "chat_template")
        told = {key: value for key, value in settings.items() if key not in left_out}
        write_json(prepared / SETTINGS, told | ({"tokenizer_class": named} if isinstance(named, str) else {}))
        write_json(prepared / "config.json", {"model_type": config.get("model_type", "gpt2")})
        _run_transformers(checkpoint, prepared, saved)
        fields = read_object(saved / OWN)
        made = tidy(read_object(saved / SETTINGS), checkpoint / SETTINGS)
    kept = len(fields["model"]["vocab"])
    if kept < tokens - _FEW:
        source = model or checkpoint / files[VOCABULARY if VOCABULARY in files else WORDS]
        raise UserError(
            f"{source}: has {tokens} tokens, of which {named or 'the class'} of transformers keeps {kept}; write the tokenizer_class that "
            f"reads this file (GPT2Tokenizer, if it has merges) into {SETTINGS}, or put a tokenizer.json beside it"
        )
    if MERGES in files:
        _check_merges(fields["model"], checkpoint / files[MERGES], len(added))
    # What transformers made of the added tokens is left out: their ids and flags are those that `added` says.
    fields["added_tokens"] = [token for token in fields["added_tokens"] if token["content"] not in added]
    made = {key: value for key, value in made.items() if key != "added_tokens_decoder"}
    template = {"chat_template": settings["chat_template"]} if "chat_template" in settings else {}
    return fields, {**made, **template}, warnings


def _has_own_ids(named: str) -> bool:
    """Whether the ids of the tokenizer class `named` are those of its sentencepiece model.

    A class that transformers does not know came with code of its own, and all such that we know of leave the ids as they are.
    """
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    return named.removesuffix("Fast") in WITH_OWN_IDS or tokenizer_class_from_name(named) is None


def _add_extra_ids(fields: dict[str, Any], settings: dict[str, Any], config: dict[str, Any]) -> None:
    """Add the tokens <extra_id_N> that T5Tokenizer puts after the model's own, the last first, if the model has them."""
    count, first = settings.get("extra_ids", 100), len(fields["model"]["vocab"])
    if isinstance(count, int) and first + count <= config.get("vocab_size", 0):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for number in range(count):
            content = f"<extra_id_{count - 1 - number}>"
            fields["added_tokens"].append({"id": first + number, "content": content, **flags, "special": True})


def _run_transformers(checkpoint: Path, prepared: Path, saved: Path) -> None:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        AutoTokenizer.from_pretrained(prepared, local_files_only=True, trust_remote_code=False).save_pretrained(saved)
        if not (saved / OWN).is_file():
            raise ValueError("transformers has no fast form of this class")
    except Exception as error:  # for a broken file, the Rust library and transformers raise many kinds of exception
        reason = " ".join(str(error).replace(str(prepared), str(checkpoint)).split())[:300]
        raise UserError(
            f"{checkpoint}: transformers cannot read its tokenizer files ({reason}); take those of the original checkpoint, "
            "or put a tokenizer.json beside them"
        ) from None


def _check_merges(model: dict[str, Any], path: Path, added: int) -> None:
    """Raise UserError if merges are missing, because text would then be split into single letters.

    Every token except the 256 bytes and a few special ones is the result of a merge.
    """
    if len(model["vocab"]) - added - len(model.get("merges", [])) > 2 * 256:
        raise UserError(
            f"{path}: has {len(model.get('merges', []))} merges for the {len(model['vocab'])} tokens of the vocabulary; "
            "it is cut short, take the file of the original checkpoint"
        )
