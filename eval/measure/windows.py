"""Which tokens a model sees and which it is scored on: pure functions from token ids to windows.

`rolling` (lm-evaluation-harness): per document; every token is scored once, the first behind a start token.
With a longest sequence of 4 and tokens a..f behind start token ^, inputs above targets (. is not scored):

    ^ a b c      b c d e
    a b c d      . . e f

`halves` (llama.cpp): one stream, disjoint windows; the first half of each is context only. With windows of 6:

    a b c d e f   g h i j k l
    . . . . e f   . . . . k l
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Window:
    """`inputs` int64 [T]; the last n of its logits predict `targets` int64 [n] of document `document`."""

    document: int
    inputs: np.ndarray
    targets: np.ndarray


def rolling(documents: list[list[int]], start: int, longest: int) -> Iterator[Window]:
    """Windows of at most `longest` tokens that score every token of every document once.

    The last window of a document is extended to the left, so that its tokens have a full context.
    """
    for number, tokens in enumerate(documents):
        line = np.asarray([start, *tokens], np.int64)
        for begin in range(0, len(tokens), longest):
            end = min(begin + longest, len(tokens))
            yield Window(number, line[max(0, end - longest) : end], line[begin + 1 : end + 1])


def halves(stream: np.ndarray, length: int) -> Iterator[Window]:
    """Disjoint windows of `length` tokens, scored on what follows the middle; the rest at the end is left out.

    As in llama.cpp's perplexity tool, length − 1 − length/2 tokens of each window are scored. GPT-2's
    vocabulary asks for no start token, so none replaces a window's first token.
    """
    for number, begin in enumerate(range(0, len(stream) - length + 1, length)):
        window = stream[begin : begin + length]
        yield Window(number, window[:-1], window[length // 2 + 1 :])
