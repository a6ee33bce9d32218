"""Compare the answers of an artifact with its baseline's: how many are right, and which flipped."""

from __future__ import annotations

import numpy as np

from cuantiza.eval.measure.estimates import mean_per_token
from cuantiza.eval.measure.score import Scores


def answered(scores: Scores, words: np.ndarray) -> np.ndarray:
    """Whether every token of each of `words` [W, 2] was the likeliest one: bool [W]."""
    wrong = np.concatenate([[0], np.cumsum(~scores.right)])
    return wrong[words[:, 1]] == wrong[words[:, 0]]


def compared(scores: Scores, baseline: Scores | None, words: np.ndarray) -> dict | None:
    """Return the field `last_words` of a report row (docs/report.md); None where there are no `words` [W, 2].

    `baseline` has the baseline's scores of the same tokens, and is None for the baseline's own row.
    """
    if not len(words):
        return None
    right = answered(scores, words)
    gained, lost = flips(right if baseline is None else answered(baseline, words), right)
    accuracy = mean_per_token(right.astype(float), scores.document[words[:, 0]])
    return {
        "words": len(words),
        "accuracy": accuracy.value,
        "accuracy_stderr": accuracy.stderr,
        "gained": gained,
        "lost": lost,
        "p": exact_p(gained, lost),
        "right": "".join("01"[int(item)] for item in right),
    }


def marks(text: str) -> np.ndarray:
    """The answers bool [W] that the field `right` of a report has as `text`, a 1 or 0 for each word."""
    return np.frombuffer(text.encode(), np.uint8) == ord("1")


def flips(before: np.ndarray, after: np.ndarray) -> tuple[int, int]:
    """Count what flipped between two bool [W]: (wrong before and right after, right before and wrong after)."""
    return int((~before & after).sum()), int((before & ~after).sum())


def exact_p(gained: int, lost: int) -> float:
    """McNemar's exact test: how likely flips as uneven as these are if each goes either way with probability ½.

    The two-sided p of the binomial distribution: min(1, 2 · Σ C(n, k) / 2ⁿ for k from 0 to min(gained, lost)), where n is
    the number of flips. It is 1 without flips. The sum is one of integers, so that the result is exact.
    """
    flipped, term, total = gained + lost, 1, 0
    for k in range(min(gained, lost) + 1):
        total += term
        term = term * (flipped - k) // (k + 1)
    return min(1.0, 2 * total / 2**flipped)
