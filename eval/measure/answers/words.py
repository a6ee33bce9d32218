"""Find the last word of each sentence in a text, and the tokens that spell it: what a model has to answer.

LAMBADA (Paperno and others, 2016, arXiv:1606.06031) asks for the last word of a passage. Here every sentence of the scored
text is such a question: given everything before its last word, is each token of this word the likeliest one? The answer is
in the logits that perplexity needs anyway, so it costs no further run of the model.

A sentence ends with one of `.!?…`, and quotes or brackets around these, before white space or the end of the text. Its last
word is the run of letters before that: of «¿Vienes a casa?». it is casa. No dictionary is needed, so this works in every
language that separates words. Abbreviations of four letters or more (`aprox.`) are taken for ends of sentences; they are
words in their context all the same, and baseline and artifact are asked for the same ones.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence

import numpy as np

from cuantiza.core.inputs.tokenizer import Encoded
from cuantiza.eval.measure.tokens.windows import Window

LETTERS = 4  # of a word at least: shorter ones are often abbreviations (Sr., etc., pág.) or function words
CONTEXT = 32  # tokens before each token of a word, within its window and with the start token, at least
MOST = 5000  # words; LAMBADA's test split has 5153

_ENDS = ".!?…؟।"
_MARKS = rf"""[{_ENDS}»«”“"’‘'›)\]—]"""
_RUN = re.compile(rf"(?<!{_MARKS}){_MARKS}++(?=\s|\Z)")  # begins once in a run, so that long runs take no longer


def last_words(text: str) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of the last word of each sentence in `text`, in characters."""
    for run in _RUN.finditer(text):
        if any(mark in _ENDS for mark in run[0]):
            begin = end = run.start()
            while begin and unicodedata.category(text[begin - 1])[0] in "LM":  # a letter, or a mark that belongs to one
                begin -= 1
            if end - begin >= LETTERS and not (begin and (text[begin - 1].isdigit() or text[begin - 1] == "_")):
                yield begin, end


def spelled(item: Encoded) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of the tokens of each last word in `item`.

    White space before a word may be part of its first token, as in most vocabularies. A word is left out where one of its
    tokens has other characters too, such as the full stop.
    """
    starts, ends = [start for start, _ in item.offsets], [end for _, end in item.offsets]
    for begin, stop in last_words(item.text):
        first, end = bisect_right(ends, begin), bisect_left(starts, stop)
        if first < end and not item.text[starts[first] : begin].strip() and ends[end - 1] <= stop:
            yield first, end


def questions(documents: Sequence[Encoded], windows: Sequence[Window]) -> np.ndarray:
    """The tokens of the words to ask for, int64 [W, 2]: (first, end) among the targets of all `windows`.

    `windows` have every token of `documents` once as a target, in order. Each token of a word has a context of at least
    CONTEXT tokens. Of more than MOST words, so many are taken at equal distances.
    """
    context = np.concatenate([len(item.inputs) - np.arange(len(item.targets))[::-1] for item in windows])
    found, before = [], 0
    for item in documents:
        spans = ((before + first, before + end) for first, end in spelled(item))
        found += [(first, end) for first, end in spans if context[first:end].min() >= CONTEXT]
        before += len(item.ids)
    chosen = np.linspace(0, len(found) - 1, MOST).round().astype(int) if len(found) > MOST else slice(None)
    return np.asarray(found, np.int64).reshape(-1, 2)[chosen]
