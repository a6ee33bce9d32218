"""Divide texts into documents: at the markers that fine-tuning scripts write, at lines, or at the titles of articles."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

SEPARATOR = "<|endoftext|>"
BY = ("document", "line", "article")
# Scripts write the markers in capitals and with spaces inside as well.
_NAMES = r"(?i:<\| ?(?:start|end)oftext ?\|>)"
_FEW = 3
# What ends a document in texts that were prepared for other tokenizers.
_OTHERS = re.compile(r"</s>|\[(?:EOS|SEP)\]|<\|?(?:eos|eot_id|im_end|end_of_text|endofdoc)\|?>", re.IGNORECASE)
# A title of level one as WikiText writes it: ` = Title = `; those below are ` = = Section = = `.
_TITLE = re.compile(r"^ ?= (?!=)[^\n]*(?<![= ]) = ?$", re.MULTILINE)
# An article as WikiExtractor writes it, unless it is told to write JSON.
_EXTRACTED = re.compile(r"^<doc [^>\n]*>\n(.*?)^</doc>$", re.MULTILINE | re.DOTALL)
# A text of so many lines and hardly a blank one is probably a list of texts.
_MANY_LINES, _FEW_BLANK = 1000, 0.005


def divided(texts: Iterable[str], by: str) -> Iterator[str]:
    """The documents of `texts`, which are those of one file or table, without white space around them.

    Markers `<|startoftext|>` and `<|endoftext|>` end a document and are no part of one. Then every text is a document,
    or with `by` = "line" every line of it; "article" joins the lines of all texts from one title of level one to the
    next.
    """
    documents: Iterator[str] = (document for text in texts for document in _marked(text))
    if by == "line":
        documents = (line for text in documents for line in text.split("\n"))
    elif by == "article":
        documents = _articles(documents)
    return (document for text in documents if (document := text.strip()))


def _marked(text: str) -> list[str]:
    if text.startswith("<doc ") and (extracted := _EXTRACTED.findall(text)):
        return extracted
    return _Markers.of(_NAMES).divide(text) if "<|" in text else [text]


def divided_at(text: str, marks: Iterable[str]) -> list[str]:
    """The parts of `text` between `marks`, markers that a tokenizer has, by the rules of `<|endoftext|>`."""
    return _Markers.of("|".join(map(re.escape, marks))).divide(text)


@dataclass(frozen=True)
class _Markers:
    """Regular expressions of markers, and of where they are no marker but a text speaks of them."""

    marker: re.Pattern[str]
    alone: re.Pattern[str]
    spoken_of: re.Pattern[str]
    between_words: re.Pattern[str]
    amid_sentence: re.Pattern[str]

    @staticmethod
    @functools.cache
    def of(names: str) -> _Markers:
        """Those of the markers that the expression `names` finds."""
        name = f"(?:{names})"
        # A text that speaks of a marker quotes it, or goes on after it with a comma or a full stop.
        quoted = rf"(?:(?<=[\s(][`'\"«“‘(])|(?<=^[`'\"«“‘(])|(?<=``)){name}(?=[`'\"»”’)])"
        return _Markers(
            re.compile(name),
            re.compile(rf"^\s*{name}\s*$", re.MULTILINE),
            re.compile(rf"{quoted}|(?<=\w ){name}(?=[,.;:)](?:\s|\Z))", re.MULTILINE),
            re.compile(rf"(?<=\S ){name}(?= \S)"),
            re.compile(rf"(?<=[\w,] ){name} (\w)"),
        )

    def divide(self, text: str) -> list[str]:
        """The parts of `text` between markers.

        Where markers have lines of their own, and there is one kind of them, one between two words is text. Elsewhere it
        is if it stands amid a sentence, and if all markers of the text, which are few then, do: texts in small letters
        are divided.
        """
        found = [mark for mark in self.marker.finditer(text) if not self.spoken_of.match(text, mark.start())]
        kinds = {mark[0].lower() for mark in found}
        if len(kinds) == 1 and self.alone.search(text):
            found = [mark for mark in found if not self.between_words.match(text, mark.start())]
        elif len(found) <= _FEW and all(self._is_amid_sentence(text, mark) for mark in found):
            found = []
        ends = [0, *(place for mark in found for place in mark.span()), len(text)]
        return [text[start:end] for start, end in zip(ends[::2], ends[1::2], strict=True)]

    def _is_amid_sentence(self, text: str, mark: re.Match[str]) -> bool:
        after = self.amid_sentence.match(text, mark.start())
        return after is not None and after[1].islower()  # scripts without small letters do not tell


def speaks_of_markers(text: str) -> bool:
    """Whether a document has a marker amid its text, where it did not divide."""
    return "<|" in text and bool(_Markers.of(_NAMES).marker.search(text))


def other_markers(text: str) -> list[str]:
    """What ends a document for other tokenizers, as `text` writes it: each once, in the order of the text."""
    return list(dict.fromkeys(_OTHERS.findall(text)))


def _articles(texts: Iterable[str]) -> Iterator[str]:
    article: list[str] = []
    for text in texts:
        for line in text.rstrip("\n").split("\n"):
            if _TITLE.fullmatch(line) and article:
                yield "\n".join(article)
                article = []
            article.append(line)
    yield "\n".join(article)


def is_list_of_lines(text: str) -> bool:
    """Whether a text looks like one document a line: a thousand lines or more, with hardly a blank one among them."""
    lines = text.count("\n") + 1
    return lines >= _MANY_LINES and len(re.findall(r"\n[^\S\n]*(?=\n)", text)) < _FEW_BLANK * lines


def has_titles(documents: list[str]) -> bool:
    """Whether documents look like lines of WikiText's articles: some are a title alone, or have several inside."""
    alone = 0
    for text in documents:
        if " = " in text or text.startswith("= "):
            titles = len(_TITLE.findall(text))
            if titles > 1:
                return True
            alone += titles == 1 and "\n" not in text
    return alone > 1
