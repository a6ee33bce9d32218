"""Choose which tokens a model sees and which it is scored on: pure functions from token ids to windows.

`rolling` (lm-evaluation-harness) works document by document. A start token comes first, and every token of the document
is scored once. Here the longest sequence has 4 tokens, the document is a..f, and ^ is the start token; inputs stand
above targets (. is not scored):

    ^ a b c      b c d e
    a b c d      . . e f

`halves` (llama.cpp) cuts one stream of tokens into disjoint windows. The first half of each window is context only.
Here the windows have 6 tokens:

    a b c d e f   g h i j k l
    . . . . e f   . . . . k l

`strided` (transformers' documentation) moves a window over one stream, and scores what no window before it scored. Here
the windows have 6 tokens, and each begins 4 tokens after the last one; the first token of all is not scored:

    a b c d e f   e f g h i j   i j k l
    . b c d e f   . . g h i j   . . k l

`full` (GPTQ) cuts the stream into full windows. The first token of each has no context and is not scored:

    a b c d e f   g h i j k l
    . b c d e f   . h i j k l
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Window:
    """A window of document `document`: the last n logits of `inputs` int64 [T] predict `targets` int64 [n]."""

    document: int
    inputs: np.ndarray
    targets: np.ndarray


def rolling(documents: list[list[int]], start: int, longest: int) -> Iterator[Window]:
    """Yield windows of at most `longest` tokens that score every token of every document once.

    The last window of a document is extended to the left, so that its tokens have a full context.
    """
    for number, tokens in enumerate(documents):
        line = np.asarray([start, *tokens], np.int64)
        for begin in range(0, len(tokens), longest):
            end = min(begin + longest, len(tokens))
            yield Window(number, line[max(0, end - longest) : end], line[begin + 1 : end + 1])


def halves(stream: np.ndarray, length: int) -> Iterator[Window]:
    """Yield disjoint windows of `length` tokens, scored on what follows their middle; remaining tokens are left out.

    As in llama.cpp's perplexity tool, length − 1 − length/2 tokens of each window are scored. llama.cpp replaces the
    first token of each window by a start token where the vocabulary asks for one; GPT-2's vocabulary does not. Windows of
    2 tokens have nothing after their middle, so there are none.
    """
    if length <= 2:
        return
    for number, begin in enumerate(range(0, len(stream) - length + 1, length)):
        window = stream[begin : begin + length]
        yield Window(number, window[:-1], window[length // 2 + 1 :])


def strided(stream: np.ndarray, length: int, stride: int) -> Iterator[Window]:
    """Yield windows of `length` tokens, `stride` apart, each scored on the tokens that no window before it has.

    As in transformers' documentation ("Perplexity of fixed-length models"): there is no start token, so the first token
    is not scored; all others are, once, where `stride` is less than `length`. The windows end with the first that
    reaches the end of the stream, and this one may be shorter. With `stride` = `length` nothing precedes the first token
    of a window, which is then not scored.
    """
    end = 0
    for number, begin in enumerate(range(0, len(stream), stride)):
        window = stream[begin : begin + length]
        targets = window[max(1, end - begin) :]
        if len(targets):
            yield Window(number, window[:-1], targets)
        end = begin + len(window)
        if end == len(stream):
            return


def full(stream: np.ndarray, length: int) -> Iterator[Window]:
    """Yield disjoint windows of `length` tokens, all full, scored on all but their first token.

    As in GPTQ's code (github.com/IST-DASLab/gptq): without a start token, and without what is left at the end.
    """
    yield from strided(stream[: len(stream) // length * length], length, length)
