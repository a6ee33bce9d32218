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
