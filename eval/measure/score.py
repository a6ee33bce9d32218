"""Score single tokens: negative log-likelihood, whether it was the likeliest, and how far from the baseline's logits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Protocol

import numpy as np

from cuantiza.core.run.divergence import compare
from cuantiza.eval.measure.tokens.windows import Window


@dataclass(frozen=True)
class Scores:
    """Scores with one element per scored token. `kl` and `same_top` are None for the baseline itself.

    document int64 [N]; nll float64 [N] in nats; right bool [N], whether the token that follows was the likeliest one;
    kl float64 [N] in nats, KL(baseline ‖ model); same_top bool [N]
    """

    document: np.ndarray
    nll: np.ndarray
    right: np.ndarray
    kl: np.ndarray | None = None
    same_top: np.ndarray | None = None


class Deferred(Protocol):
    """A model that computes in another process: cuantiza.core.machine.process.Remote over an Engine."""

    def start(self, method: str, *args: object) -> None: ...

    def result(self) -> np.ndarray: ...


def score(windows: Iterable[Window], models: Sequence[Deferred]) -> list[Scores]:
    """Return the scores of every model. The first model is the baseline of the others.

    Each window is scored as soon as its logits are there, so that no logits are kept. The models compute a window one
    after another: each uses all processors, and together they would take longer. The first one computes the next
    window while this one is scored.
    """
    documents: list[np.ndarray] = []
    columns: list[list[tuple[np.ndarray, ...]]] = [[] for _ in models]
    ends: list[Window | None] = [None]
    for window, following in pairwise(chain(windows, ends)):
        assert window is not None  # only the last of all is None
        logits = []
        for number, model in enumerate(models):
            if number or not documents:
                _start(model, window)
            logits.append(model.result())
        if following is not None:
            _start(models[0], following)
        documents.append(np.full(len(window.targets), window.document))
        compared = compare(logits[0], logits[1:], window.targets)
        for column, own, (nll, *others) in zip(columns, logits, compared, strict=True):
            column.append((nll, own.argmax(axis=1) == window.targets, *others))
        del logits  # frees the memory before the next logits arrive
    document = np.concatenate(documents)
    return [Scores(document, *map(np.concatenate, zip(*column, strict=True))) for column in columns]


def _start(model: Deferred, window: Window) -> None:
    model.start("logits", window.inputs, len(window.targets))
