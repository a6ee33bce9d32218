"""Tasks that measure artifacts, and the function that joins their parts. See build.py for what a task is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np

from cuantiza.core.machine.hardware import machine
from cuantiza.core.machine.instructions import instruction_sets
from cuantiza.eval.measure.engines import Engine
from cuantiza.eval.measure.latency import measure_latency
from cuantiza.eval.measure.score import Scores, score
from cuantiza.eval.measure.tokens.windows import rolling
from cuantiza.sweep.tasks.made import Made


@dataclass(frozen=True)
class Quality:
    """Score every token of some documents with the baseline and with artifacts; the baseline's scores come first.

    `documents` are token ids. `first` is the number of the first of them in the whole text. `start` is the token that
    precedes each document.
    """

    kind: ClassVar[str] = "quality"
    alone: ClassVar[bool] = False
    label: str
    baseline: Made
    artifacts: tuple[Made, ...]
    documents: tuple[list[int], ...]
    first: int
    start: int
    window: int
    threads: int

    def run(self) -> list[Scores]:
        models = [_Here(Engine(made.subject(), self.threads)) for made in (self.baseline, *self.artifacts)]
        found = score(rolling(list(self.documents), self.start, self.window), models)
        return [replace(item, document=item.document + self.first) for item in found]


class _Here:
    """An engine in this process, with the interface of a child process that cuantiza.eval.measure.score.score expects.

    It runs here and not in a child, because a task may only use its own `threads` threads.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._call: tuple[str, tuple] = ("", ())

    def start(self, method: str, *args: Any) -> None:
        self._call = method, args

    def result(self) -> np.ndarray:
        method, args = self._call
        return getattr(self._engine, method)(*args)


def merge(parts: Sequence[list[Scores]]) -> list[Scores]:
    """Join the scores of consecutive parts of a text. The result equals the scores of the whole text, bit by bit.

    Sums per document would be enough for perplexity, but not for the quantiles of KL. So tasks return the scores of
    each token, 26 bytes per token.
    """

    def joined(scores: Sequence[Scores], field: str) -> Any:
        values = [getattr(item, field) for item in scores]
        return None if values[0] is None else np.concatenate(values)

    names = [field.name for field in fields(Scores)]
    return [Scores(**{name: joined(scores, name) for name in names}) for scores in zip(*parts, strict=True)]


@dataclass(frozen=True)
class Latency:
    """Measure the latency of an artifact (None: of the baseline itself), in rounds with its baseline on one machine."""

    kind: ClassVar[str] = "latency"
    alone: ClassVar[bool] = True
    label: str
    baseline: Made
    artifact: Made | None
    ids: np.ndarray
    longest: int
    rounds: int
    threads: int

    def run(self) -> dict:
        subjects = [made.subject() for made in (self.baseline, self.artifact) if made is not None]
        found = measure_latency(subjects, self.ids, self.longest, self.rounds, self.threads)
        return found[subjects[-1].name] | {"machine": machine(self.threads) | {"instructions": instruction_sets()}}
