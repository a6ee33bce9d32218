"""Scores of single tokens: negative log-likelihood, KL divergence to the baseline, same top token."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from eval.windows import Window

_ROWS = 64  # positions at a time: temporaries stay in the cache and do not grow with the window


@dataclass(frozen=True)
class Scores:
    """One element per scored token. `kl` and `same_top` are None where there is no baseline.

    document int64 [N]; nll float64 [N] in nats; kl float64 [N] in nats, KL(baseline ‖ model); same_top bool [N]
    """

    document: np.ndarray
    nll: np.ndarray
    kl: np.ndarray | None = None
    same_top: np.ndarray | None = None


Logits = Callable[[np.ndarray], np.ndarray]  # token ids int64 [T] -> logits float32 [T, V]


def score(windows: Iterable[Window], model: Logits) -> Scores:
    """Negative log-likelihood of every target of `windows`."""
    pairs = [(np.full(len(w.targets), w.document), nll(model(w.inputs)[-len(w.targets) :], w.targets)) for w in windows]
    return Scores(*map(np.concatenate, zip(*pairs, strict=True)))


def score_pair(windows: Iterable[Window], baseline: Logits, model: Logits) -> tuple[Scores, Scores]:
    """Scores of the baseline and of the model, window by window, so that no logits are kept."""
    rows = []
    for window in windows:
        count = len(window.targets)
        compared = compare(baseline(window.inputs)[-count:], model(window.inputs)[-count:], window.targets)
        rows.append((np.full(count, window.document), *compared))
    document, base, nats, kl, same = map(np.concatenate, zip(*rows, strict=True))
    return Scores(document, base), Scores(document, nats, kl, same)


def nll(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """−ln p(target) in nats, float64 [n], of logits float32 [n, V] and targets [n]. Uniform logits give ln V."""
    return np.concatenate([_pick(log_softmax(logits[at]), targets[at]) for at in _chunks(len(targets))])


def compare(reference: np.ndarray, candidate: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, ...]:
    """(nll of the reference, nll of the candidate, KL, same top token), each [n], of logits [n, V] and targets [n].

    KL(p ‖ q) = Σ p (ln p − ln q) in nats, of the reference's distribution p and the candidate's q.
    """
    parts = []
    for at in _chunks(len(targets)):
        log_p, log_q = log_softmax(reference[at]), log_softmax(candidate[at])
        kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=1, dtype=np.float64)
        # Rounding can leave two equal distributions a few 1e-9 below their least possible distance.
        parts.append((_pick(log_p, targets[at]), _pick(log_q, targets[at]), np.maximum(kl, 0.0), log_p.argmax(axis=1) == log_q.argmax(axis=1)))
    return tuple(map(np.concatenate, zip(*parts, strict=True)))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """ln of the distribution over the last axis: float32 in and out; the normalizer is summed in float64."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)


def _pick(log_p: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return -log_p[np.arange(len(targets)), targets].astype(np.float64)


def _chunks(count: int) -> list[slice]:
    return [slice(start, start + _ROWS) for start in range(0, count, _ROWS)]
