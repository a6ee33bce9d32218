"""Turn per-token scores into estimates with standard errors. The independent samples are documents, not tokens."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from cuantiza.eval.measure.score import Scores


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error, which is None if there are too few samples for one."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class TextSize:
    """Size of the scored documents: UTF-8 bytes, and words (split at white space, as lm-evaluation-harness does)."""

    bytes: int
    words: int


def text_size(documents: tuple[str, ...]) -> TextSize:
    return TextSize(
        sum(len(text.encode()) for text in documents), sum(len(re.split(r"\s+", text)) for text in documents)
    )


def mean_per_token(values: np.ndarray, document: np.ndarray) -> Estimate:
    """Mean of a per-token value [N], with its standard error over documents.

    `document` [N] is the number of the document that each token belongs to.
    """
    _, index = np.unique(document, return_inverse=True)
    return mean_by_document(np.bincount(index, weights=values), np.bincount(index))


def mean_by_document(sums: np.ndarray, counts: np.ndarray) -> Estimate:
    """Mean of a per-token value, with its standard error, from the sum [D] and the token count [D] of each document.

    Tokens of one document are correlated, so the document is the sampling unit of a ratio estimator: with sums s and
    counts n per document, mean = Σs / Σn, and variance = D/(D−1) · Σ(s − mean·n)² / (Σn)² (Cochran, Sampling
    Techniques, 6.4). A single document gives no standard error.
    """
    mean, number = sums.sum() / counts.sum(), len(counts)
    if number < 2:
        return Estimate(float(mean), None)
    variance = number / (number - 1) * ((sums - mean * counts) ** 2).sum() / counts.sum() ** 2
    return Estimate(float(mean), math.sqrt(variance))


def perplexity(scores: Scores) -> Estimate:
    """Perplexity: exp of the mean negative log-likelihood, with its standard error by the delta method."""
    mean = mean_per_token(scores.nll, scores.document)
    value = _exp(mean.value)
    return Estimate(value, None if mean.stderr is None else value * mean.stderr)


def _exp(nats: float) -> float:
    """Return exp(nats); inf where floats end, or for what is not a number."""
    return math.exp(nats) if nats < 700 else math.inf


def llama_cpp_perplexity(scores: Scores) -> Estimate:
    """Perplexity with the uncertainty that llama.cpp's perplexity tool prints beside it, so that both can be compared.

    Its units are single tokens: stderr = ppl · √((E[x²] − E[x]²) / (n − 1)) over the negative log-likelihoods x of n
    tokens (tools/perplexity/perplexity.cpp there). Tokens of one text are correlated, so it is smaller than an error
    over documents. It is None for a single token, and where likelihoods are not finite.
    """
    nll = scores.nll
    value = _exp(float(nll.mean()))
    if len(nll) < 2 or not math.isfinite(value):
        return Estimate(value, None)
    return Estimate(value, value * math.sqrt(float(nll.var()) / (len(nll) - 1)))


def quality(scores: Scores, size: TextSize, baseline: Scores | None) -> dict:
    """Return the quality fields of a report row (docs/report.md).

    `baseline` holds the baseline's scores of the same tokens, and is None for the baseline's own row.
    """
    ppl, total = perplexity(scores), float(scores.nll.sum())
    fields = {
        "tokens_scored": len(scores.nll),
        "perplexity": ppl.value,
        "perplexity_stderr": ppl.stderr,
        "bits_per_byte": total / math.log(2) / size.bytes,
        "word_perplexity": _exp(total / size.words),
        "byte_perplexity": _exp(total / size.bytes),
        "delta_ln_ppl": 0.0,
        "delta_ln_ppl_stderr": 0.0,
        "kl_divergence": 0.0,
        "kl_divergence_stderr": 0.0,
        "kl_divergence_p50": 0.0,
        "kl_divergence_p99": 0.0,
        "top1_agreement": 1.0,
        "top1_agreement_stderr": 0.0,
        "nll_by_document": np.bincount(scores.document, weights=scores.nll).tolist(),
    }
    if baseline is not None:
        assert scores.kl is not None and scores.same_top is not None  # all but the baseline have them
        delta = mean_per_token(scores.nll - baseline.nll, scores.document)
        kl = mean_per_token(scores.kl, scores.document)
        top = mean_per_token(scores.same_top.astype(float), scores.document)
        fields |= {
            "delta_ln_ppl": delta.value,
            "delta_ln_ppl_stderr": delta.stderr,
            "kl_divergence": kl.value,
            "kl_divergence_stderr": kl.stderr,
            "kl_divergence_p50": float(np.quantile(scores.kl, 0.5)),
            "kl_divergence_p99": float(np.quantile(scores.kl, 0.99)),
            "top1_agreement": top.value,
            "top1_agreement_stderr": top.stderr,
        }
    return fields
