"""Divide texts into documents: at the markers that fine-tuning scripts write, at lines, or at the titles of articles."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

SEPARATOR = "<|endoftext|>"
BY = ("document", "line", "article")
# Scripts write the markers in capitals and with spaces inside as well.
_NAMES = r"<\| ?(?:start|end)oftext ?\|>"
_MARKER = re.compile(_NAMES, re.IGNORECASE)
_START = re.compile(r"<\| ?startoftext ?\|>", re.IGNORECASE)
_ALONE = re.compile(r"^\s*<\| ?endoftext ?\|>\s*$", re.MULTILINE | re.IGNORECASE)
# A text that speaks of a marker quotes it, or goes on after it with a comma or a full stop.
_QUOTED = rf"(?:(?<=[\s(][`'\"«“‘(])|(?<=^[`'\"«“‘(])|(?<=``)){_NAMES}(?=[`'\"»”’)])"
_SPOKEN_OF = re.compile(rf"{_QUOTED}|(?<=\w ){_NAMES}(?=[,.;:)](?:\s|\Z))", re.IGNORECASE | re.MULTILINE)
# In a file whose separators have lines of their own, a marker between two words is text as well. Elsewhere it is if it
# stands amid a sentence, and if all markers of the text, which are few then, do: texts in small letters are divided.
_BETWEEN_WORDS = re.compile(rf"(?<=\S ){_NAMES}(?= \S)", re.IGNORECASE)
_AMID_SENTENCE = re.compile(rf"(?<=[\w,] )(?i:{_NAMES})(?= [^\W\d_A-ZÁÉÍÓÚÑÜ])")
_FEW_MARKERS = 3
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
    if "<|" not in text:
        return [text]
    markers = [found for found in _MARKER.finditer(text) if not _SPOKEN_OF.match(text, found.start())]
    if not _START.search(text) and _ALONE.search(text):
        markers = [found for found in markers if not _BETWEEN_WORDS.match(text, found.start())]
    elif len(markers) <= _FEW_MARKERS and all(_AMID_SENTENCE.match(text, found.start()) for found in markers):
        markers = []
    ends = [0, *(place for found in markers for place in found.span()), len(text)]
    return [text[start:end] for start, end in zip(ends[::2], ends[1::2], strict=True)]


def speaks_of_markers(text: str) -> bool:
    """Whether a document has a marker amid its text, where it did not divide."""
    return "<|" in text and bool(_MARKER.search(text))


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
