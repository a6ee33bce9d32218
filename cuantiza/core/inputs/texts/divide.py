"""Divide texts into documents: at the markers that fine-tuning scripts write, at lines, or at the titles of articles."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

SEPARATOR = "<|endoftext|>"
BY = ("document", "line", "article")
_MARKER = re.compile(r"<\|(?:startoftext|endoftext)\|>")
_START = "<|startoftext|>"
_ALONE = re.compile(r"^\s*<\|endoftext\|>\s*$", re.MULTILINE)
# In a file whose separators have lines of their own, a marker between two words of a sentence is text.
_NOT_IN_PROSE = re.compile(r"(?<!\S )<\|endoftext\|>|<\|endoftext\|>(?! \S)")
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
    if SEPARATOR not in text and _START not in text:
        return [text]
    return (_NOT_IN_PROSE if _START not in text and _ALONE.search(text) else _MARKER).split(text)


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
