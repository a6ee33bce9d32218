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
        reference, candidate = baseline(window.inputs)[-count:], model(window.inputs)[-count:]
        rows.append((np.full(count, window.document), nll(reference, window.targets), nll(candidate, window.targets),
                     kl_divergence(reference, candidate), reference.argmax(axis=1) == candidate.argmax(axis=1)))
    document, base, nats, kl, same = map(np.concatenate, zip(*rows, strict=True))
    return Scores(document, base), Scores(document, nats, kl, same)


def nll(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """−ln p(target) in nats, float64 [n], of logits float32 [n, V] and targets [n]. Uniform logits give ln V."""
    return np.concatenate([-_log_softmax(logits[at])[np.arange(len(targets[at])), targets[at]] for at in _chunks(len(targets))])


def kl_divergence(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """KL(p ‖ q) = Σ p (ln p − ln q) in nats, float64 [n], of logits [n, V] of p and of q."""
    values = []
    for at in _chunks(len(reference)):
        log_p, log_q = _log_softmax(reference[at]), _log_softmax(candidate[at])
        values.append((np.exp(log_p) * (log_p - log_q)).sum(axis=1, dtype=np.float64))
    # Rounding can leave a distribution a few 1e-9 below its least possible distance to itself.
    return np.maximum(np.concatenate(values), 0.0)


def _chunks(count: int) -> list[slice]:
    return [slice(start, start + _ROWS) for start in range(0, count, _ROWS)]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """float32 in, float32 out; the normalizer is summed in float64."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
