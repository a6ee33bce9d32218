"""Scores of single tokens: negative log-likelihood, KL divergence to the baseline, same top token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Protocol

import numpy as np

from core.errors import UserError
from eval.windows import Window

_CHUNK = 2**18  # logits at a time: temporaries stay in the processor's cache, whatever the vocabulary


@dataclass(frozen=True)
class Scores:
    """One element per scored token. `kl` and `same_top` are None where there is no baseline.

    document int64 [N]; nll float64 [N] in nats; kl float64 [N] in nats, KL(baseline ‖ model); same_top bool [N]
    """

    document: np.ndarray
    nll: np.ndarray
    kl: np.ndarray | None = None
    same_top: np.ndarray | None = None


class Deferred(Protocol):
    """A model that works elsewhere: core.process.Remote over an Engine."""

    def start(self, method: str, *args: object) -> None: ...

    def result(self) -> np.ndarray: ...


def score(windows: Iterable[Window], models: Sequence[Deferred]) -> list[Scores]:
    """Scores of every model, the first being the baseline of the others, window by window: no logits are kept.

    All models work on a window at the same time, and on the next one while this one is scored.
    """
    documents: list[np.ndarray] = []
    columns: list[list[tuple[np.ndarray, ...]]] = [[] for _ in models]
    for window, following in pairwise(chain(windows, [None])):
        if not documents:
            _start(models, window)
        n = len(window.targets)
        logits = [model.result()[-n:] for model in models]
        if following is not None:
            _start(models, following)
        documents.append(np.full(n, window.document))
        for column, values in zip(columns, compare(logits[0], logits[1:], window.targets), strict=True):
            column.append(values)
        del logits  # before the next ones come
    document = np.concatenate(documents)
    return [Scores(document, *map(np.concatenate, zip(*column, strict=True))) for column in columns]


def _start(models: Sequence[Deferred], window: Window) -> None:
    for model in models:
        model.start("logits", window.inputs)


def compare(reference: np.ndarray, candidates: list[np.ndarray], targets: np.ndarray) -> list[tuple[np.ndarray, ...]]:
    """(nll [n],) of the reference, then (nll, KL, same top token), each [n], of every candidate; logits are [n, V].

    nll is −ln p(target) in nats: uniform logits give ln V. KL(p ‖ q) = Σ p (ln p − ln q) in nats, of the
    reference's distribution p and the candidate's q.
    """
    if odd := next((x.shape for x in candidates if x.shape != reference.shape), None):
        raise UserError(
            f"an artifact gives logits {list(odd)} where the baseline gives {list(reference.shape)}; compare files of one model"
        )
    parts: list[list[tuple[np.ndarray, ...]]] = [[] for _ in range(1 + len(candidates))]
    rows = max(1, _CHUNK // reference.shape[1])
    for start in range(0, len(targets), rows):
        at = slice(start, start + rows)
        log_p = log_softmax(reference[at])
        p, top = np.exp(log_p), log_p.argmax(axis=1)
        parts[0].append((_pick(log_p, targets[at]),))
        for part, candidate in zip(parts[1:], candidates, strict=True):
            log_q = log_softmax(candidate[at])
            kl = np.einsum("nv,nv->n", p, log_p - log_q).astype(np.float64)
            # Rounding can leave two equal distributions a few 1e-9 below their least possible distance.
            part.append((_pick(log_q, targets[at]), np.maximum(kl, 0.0), log_q.argmax(axis=1) == top))
    return [tuple(map(np.concatenate, zip(*part, strict=True))) for part in parts]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """ln of the distribution over the last axis, float32 in and out."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _pick(log_p: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return -log_p[np.arange(len(targets)), targets].astype(np.float64)
