"""Compare two models by their logits for the same tokens: log-likelihood, KL divergence, same top token."""

from __future__ import annotations

import numpy as np

from cuantiza.core.errors import UserError

_CHUNK = 2**18  # logits at a time, so that temporary arrays fit in the processor's cache for any vocabulary


def compare(reference: np.ndarray, candidates: list[np.ndarray], targets: np.ndarray) -> list[tuple[np.ndarray, ...]]:
    """Score logits [n, V] of a reference and of candidates, for the tokens `targets` [n] that really follow.

    Returns (nll,) of the reference, then (nll, KL, same top token) of each candidate; every array is [n]. nll is
    −ln p(target) in nats (uniform logits give ln V). KL(p ‖ q) = Σ p (ln p − ln q) in nats, with p the distribution of
    the reference and q that of the candidate. Raises UserError if the shapes differ.
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
            # KL is at least 0; rounding can leave it a few 1e-9 below for equal distributions.
            part.append((_pick(log_q, targets[at]), np.maximum(kl, 0.0), log_q.argmax(axis=1) == top))
    return [tuple(map(np.concatenate, zip(*part, strict=True))) for part in parts]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-softmax float32 [n, V] of logits float32 [n, V]."""
    shifted: np.ndarray = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _pick(log_p: np.ndarray, targets: np.ndarray) -> np.ndarray:
    picked: np.ndarray = -log_p[np.arange(len(targets)), targets].astype(np.float64)
    return picked
