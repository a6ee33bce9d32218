"""Decide which token starts a text and which tokens end one, where a checkpoint's files disagree or say nothing.

Perplexity, calibration and generation all begin with the start token, so a wrong one changes every figure. Checkpoints
often name a wrong one: transformers writes GPT2Config's default, 50256, for every vocabulary. The policy:

1. An id is *right* if it is within the model's vocabulary and the tokenizer has a special or added token of that id.
   It is right as well if the tokenizer has no start (or end) token of its own, or if it is 50256 in a vocabulary of
   50,257 where the tokenizer has no token of that id: there it is GPT-2's `<|endoftext|>`.
2. Start: the first right id of bos_token_id in config.json, then in generation_config.json. If both lack the key, the
   first right id of eos_token_id in the same files, because GPT-2 has one token for both; of a list, the first.
3. Ends: the ids of eos_token_id in generation_config.json, else in config.json. Of a list, all ids within the
   vocabulary count if one of them is right. If none is right, the tokenizer's own, else the start token.
4. If no file has any id, and the model is a GPT-2, both are GPT2Config's default, 50256, if that is right.
5. Else the tokenizer's own: bos_token, else eos_token, of tokenizer_config.json or special_tokens_map.json, else the
   first of the usual names (`<|endoftext|>`, `<s>` …) that the tokenizer has.
6. pad_token_id is kept where it is within the vocabulary.

What is no id (true, 1.5, "0", -1) counts as absent. A sentence of warning names all that was not taken as it stands,
and the token that the tokenizer's files name where another was taken.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.gpt2_config import is_gpt2
from cuantiza.core.inputs.model_config import read_object
from cuantiza.core.inputs.tokenizer_files import SETTINGS, SPECIAL_TOKENS

_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
_STARTS = ("<|endoftext|>", "<|startoftext|>", "<s>", "<bos>", "[BOS]", "</s>", "<eos>", "[EOS]", "[CLS]", "[SEP]")
_ENDS = ("<|endoftext|>", "</s>", "<eos>", "[EOS]", "[SEP]")
# GPT2Config's default of bos_token_id and eos_token_id, and the vocabulary in which it is `<|endoftext|>`.
_DEFAULT, _DEFAULT_VOCABULARY = 50256, 50257


@dataclass(frozen=True)
class SpecialTokens:
    """The token ids that start, end and pad a text. `source` says in words where the start token comes from."""

    start: int
    end: tuple[int, ...]
    pad: int | None
    source: str
    warnings: tuple[str, ...]

    def put_into(self, fields: dict[str, Any]) -> dict[str, Any]:
        """`fields` of a config.json or generation_config.json with these ids; several end tokens are a list.

        Without a token that pads, a key that is there becomes null, since transformers would replace a missing one by the
        default of the model's type, which may be beyond its vocabulary.
        """
        end = self.end[0] if len(self.end) == 1 else list(self.end)
        pad = {"pad_token_id": self.pad} if self.pad is not None or "pad_token_id" in fields else {}
        others = {key: value for key, value in fields.items() if key not in _KEYS}
        return others | {"bos_token_id": self.start, "eos_token_id": end} | pad


@dataclass(frozen=True)
class _Id:
    """A token id, and the key and the file that name it."""

    id: int
    key: str
    file: str

    def __str__(self) -> str:
        return f"{self.key} of {self.file}" if self.key else self.file


@dataclass
class _Faults:
    """What was not taken: for each value with what speaks against it, where it stands as (key, file)."""

    places: dict[tuple[str, str], list[tuple[str, str]]] = field(default_factory=dict)

    def add(self, value: object, reason: str, key: str, file: str) -> None:
        places = self.places.setdefault((reprlib.repr(value), reason), [])
        if (key, file) not in places:
            places.append((key, file))

    def __str__(self) -> str:
        said = []
        for (value, reason), places in self.places.items():
            keys, files = (list(dict.fromkeys(part)) for part in zip(*places, strict=True))
            whole = len(places) == len(keys) * len(files)
            named = f"{_and(keys)} of {_and(files)}" if whole else _and([f"{key} of {file}" for key, file in places])
            said.append(f"{named} {'is' if len(places) == 1 else 'are'} {value}, which {reason}")
        return "; ".join(said)


class _Vocabulary:
    """What is known of ids: how many the model has, and the tokenizer's tokens, special tokens and own start and end."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, size: int) -> None:
        self.size, self._tokenizer = size, tokenizer
        self._files = {name: read_object(folder / name) for name in (SETTINGS, SPECIAL_TOKENS)}
        texts = {_text(value) for file in self._files.values() for key, value in file.items() if key.endswith("_token")}
        self._special = {tokenizer.token_to_id(text) for text in (*_STARTS, *texts)}
        self._special |= set(tokenizer.get_added_tokens_decoder())
        self.named_start, self.named_end = self._named("bos_token"), self._named("eos_token")
        self.own_start = self.named_start or self.named_end or self._usual(_STARTS)
        self.own_end = self.named_end or self._usual(_ENDS)

    def describe(self, id: int) -> str:
        """The id with its token, such as `0 (<|endoftext|>)`."""
        text = self._tokenizer.id_to_token(id)
        return f"{id} ({text})" if text else f"{id}"

    def fault(self, id: int) -> str:
        """Say why `id` cannot be a special token of this model; empty if it can be."""
        if id >= self.size:
            return f"is beyond the model's vocabulary (0 to {self.size - 1})"
        text = self._tokenizer.id_to_token(id)
        if id in self._special or (text is None and (id, self.size) == (_DEFAULT, _DEFAULT_VOCABULARY)):
            return ""
        return f"is the ordinary token {text!r} of the tokenizer" if text else "is no token of the tokenizer"

    def right(self, id: int, own: _Id | None) -> bool:
        """Say whether `id` is right, where `own` is what the tokenizer has instead."""
        return id < self.size and (own is None or not self.fault(id))

    def _named(self, key: str) -> _Id | None:
        """The token that the tokenizer's files name under `key`."""
        for name, file in self._files.items():
            id = self._tokenizer.token_to_id(_text(file.get(key)))
            if id is not None and id < self.size:
                return _Id(id, key, name)
        return None

    def _usual(self, texts: tuple[str, ...]) -> _Id | None:
        """The first token of `texts` that the tokenizer has."""
        ids = (self._tokenizer.token_to_id(text) for text in texts)
        return next((_Id(id, "", "the tokenizer") for id in ids if id is not None and id < self.size), None)


def resolve_special_tokens(
    folder: Path, fields: dict[str, Any], tokenizer: Tokenizer, tokenizer_folder: Path, vocabulary: int
) -> SpecialTokens:
    """Decide the special tokens of the checkpoint in `folder` by the policy above.

    `fields` are those of its config.json, `tokenizer` is its tokenizer, whose other files are in `tokenizer_folder`, and
    `vocabulary` is the number of ids that its model takes. Raises UserError if there is nothing to start a text with, or
    if a file is not JSON.
    """
    known, faults, odd_pads = _Vocabulary(tokenizer_folder, tokenizer, vocabulary), _Faults(), _Faults()
    files = {"config.json": fields, "generation_config.json": read_object(folder / "generation_config.json")}
    starts = [_ids(file, "bos_token_id", name, faults) for name, file in files.items()]
    ends = [_ids(file, "eos_token_id", name, faults) for name, file in files.items()]
    if not any(starts + ends) and is_gpt2(fields) and known.right(_DEFAULT, known.own_start):
        starts = ends = [[_Id(_DEFAULT, "", "GPT2Config's default")]]

    start = _first_right(starts, known, known.own_start, faults)
    if start is None and not any(starts):
        start = _first_right(ends, known, known.own_start, faults)
    start = start or known.own_start or _first_right(ends, known, None, faults)
    if start is None:
        said = f" ({faults})" if faults.places else ""
        raise UserError(
            f"{folder / 'config.json'}: bos_token_id names no token that starts a text{said}, and neither do generation_config.json "
            f"and the tokenizer's files; write an id from 0 to {vocabulary - 1} there"
        )
    end = _all_right(ends[::-1], known, faults) or [known.own_end or start]
    pads = [one for name, file in files.items() for one in _ids(file, "pad_token_id", name, odd_pads)]
    for one in pads:
        if one.id >= vocabulary:
            odd_pads.add(one.id, known.fault(one.id), one.key, one.file)
    pad = next((one.id for one in pads if one.id < vocabulary), None)
    warnings = [*_warnings(known, faults, start, end)]
    if odd_pads.places:
        warnings.append(f"{odd_pads}; {'it is left out' if pad is None else f'{known.describe(pad)} pads'}")
    return SpecialTokens(start.id, tuple(dict.fromkeys(one.id for one in end)), pad, str(start), tuple(warnings))


def _ids(file: dict[str, Any], key: str, name: str, faults: _Faults) -> list[_Id]:
    """The ids under `key` of a file called `name`, one or a list of them. What is no id goes to `faults`."""
    value = file.get(key)
    found = []
    for item in value if isinstance(value, list) else [value]:
        whole = int(item) if isinstance(item, float) and item.is_integer() else item
        if type(whole) is int and whole >= 0:
            found.append(_Id(whole, key, name))
        elif whole is not None:
            faults.add(item, "is no token id", key, name)
    return found


def _first_right(lists: list[list[_Id]], known: _Vocabulary, own: _Id | None, faults: _Faults) -> _Id | None:
    """The first right id of the first list that has one. The ids of the lists before it go to `faults`."""
    for ids in lists:
        if good := [one for one in ids if known.right(one.id, own)]:
            return good[0]
        for one in ids:
            faults.add(one.id, known.fault(one.id), one.key, one.file)
    return None


def _all_right(lists: list[list[_Id]], known: _Vocabulary, faults: _Faults) -> list[_Id]:
    """All ids within the vocabulary of the first list that has a right one. All others before go to `faults`."""
    for ids in lists:
        good = any(known.right(one.id, known.own_end) for one in ids)
        for one in ids:
            if not good or one.id >= known.size:
                faults.add(one.id, known.fault(one.id), one.key, one.file)
        if good:
            return [one for one in ids if one.id < known.size]
    return []


def _warnings(known: _Vocabulary, faults: _Faults, start: _Id, end: list[_Id]) -> list[str]:
    """Sentences on what was not taken, and on what the tokenizer's files name otherwise."""
    first, last = known.describe(start.id), _and([known.describe(one.id) for one in end])
    begin_with, end_with = f"start with {first}, from {start}", f"end with {last}, from {end[0]}"
    warnings = []
    if faults.places:
        both = f"start and end with {first}, from {start}" if first == last else f"{begin_with}, and {end_with}"
        warnings.append(f"{faults}; texts {both}")
    others = []
    if (named := known.named_start) and named.id != start.id:
        others.append(f"texts {begin_with}, but {named} names {known.describe(named.id)}")
    if (named := known.named_end) and named.id not in [one.id for one in end]:
        others.append(f"texts {end_with}, but {named} names {known.describe(named.id)}")
    if others:
        warnings.append(
            f"{'; '.join(others)}; if the tokenizer is right, write its ids into config.json and generation_config.json"
        )
    if known.own_start is None and (fault := known.fault(start.id)):
        warnings.append(f"texts {begin_with}, which {fault}; if that is wrong, correct bos_token_id in config.json")
    return warnings


def _and(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _text(value: object) -> str:
    """The text of a token in a tokenizer's file: a string, or an object with the text as its content; else empty."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""
