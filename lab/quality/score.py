"""Scores a row on the test text: the same tokens, windows and arithmetic as `python -m eval`, beside the fp32 artifact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from cuantiza.core.machine.child import Failed
from cuantiza.core.store import digests
from cuantiza.core.store.artifact import Artifact
from cuantiza.eval.measure.estimates import quality
from cuantiza.eval.measure.quality import Task
from cuantiza.eval.measure.score import Scores, score
from lab.bench.child import Resident
from lab.bench.ours import Engine
from lab.quality.rows import Row

# Quality fields of the report that a row has as well (docs/report.md).
FIELDS = (
    "perplexity",
    "delta_ln_ppl",
    "delta_ln_ppl_stderr",
    "kl_divergence",
    "kl_divergence_stderr",
    "kl_divergence_p50",
    "kl_divergence_p99",
    "top1_agreement",
    "top1_agreement_stderr",
)
TIMEOUT_S = 600


class Reference:
    """The fp32 artifact's logits: computed once, and kept in `folder` for the next row and the next run.

    Its methods are those that cuantiza.eval.measure.score wants of a model.
    """

    def __init__(self, fp32: Artifact, folder: Path, threads: int) -> None:
        self._fp32, self._threads, self._engine = fp32, threads, None
        self._folder = folder / fp32.digest[:16]
        self._folder.mkdir(parents=True, exist_ok=True)

    def start(self, method: str, ids: np.ndarray, last: int | None = None) -> None:
        self._last = last
        self._file = self._folder / f"{digests.digest(ids.tolist())[:32]}.npy"
        if not self._file.is_file():
            self._engine = self._engine or Engine("fp32", self._fp32.path, self._threads)
            work = self._file.with_suffix(".tmp")
            with work.open("wb") as file:
                np.save(file, self._engine.all_logits(ids))
            work.replace(self._file)

    def result(self) -> np.ndarray:
        return np.load(self._file)[-(self._last or 0) :]


class Answers:
    """A row's logits, from its own interpreter by way of a file; the methods are those of Reference.

    Logits that are not numbers raise Failed, because no figure follows from them.
    """

    def __init__(self, resident: Resident, file: Path, vocabulary: int) -> None:
        self._resident, self._file, self._vocabulary = resident, file, vocabulary

    def start(self, method: str, ids: np.ndarray, last: int | None = None) -> None:
        self._last = last
        self._resident.ask("logits", ids.tolist())
        self._logits = np.load(self._file)
        if np.isnan(self._logits).any():
            raise Failed("gives logits that are not numbers")

    def result(self) -> np.ndarray:
        return self._logits[-(self._last or 0) :, : self._vocabulary]  # some libraries pad the vocabulary


@contextmanager
def answers(row: Row, vocabulary: int, threads: int, work: Path) -> Iterator[Answers]:
    """Load a row in a process of its own, which ends with the block. Raises Failed if it does not load."""
    file = work / "logits.npy"
    request = {
        "task": "serve",
        "module": row.module,
        "kind": row.kind,
        "folder": str(row.folder.absolute()),
        "threads": threads,
        "options": {},
        "ids": [[]],
        "logits": str(file),
    }
    resident = Resident(row.python, request, work, TIMEOUT_S, threads)
    try:
        yield Answers(resident, file, vocabulary)
    finally:
        resident.close()
        file.unlink(missing_ok=True)


def measure(row: Row, reference: Reference, task: Task, threads: int, work: Path) -> dict:
    """The quality fields of a row: FIELDS, and those of `tail`. Raises Failed if its library fails.

    The tokens and windows are those of `task`. All logits are float32.
    """
    reference.start("logits", task.rolling[0].inputs)
    with answers(row, reference.result().shape[1], threads, work) as model:
        base, own = score(task.rolling, [reference, model])
    fields = quality(own, task.size, base)
    return {name: fields[name] for name in FIELDS} | tail(own, base)


def tail(own: Scores, base: Scores) -> dict:
    """The fields that docs/report.md lacks, from the scores of a row and of the fp32 artifact.

    The 99.9th percentile and the maximum of KL, in nats; the root mean square of the change of p(target), the
    probability of the token that really follows; and the sum of KL of each document, from which two rows can be compared
    document by document.
    """
    change = np.exp(-own.nll) - np.exp(-base.nll)
    return {
        "kl_divergence_p999": float(np.quantile(own.kl, 0.999)),
        "kl_divergence_max": float(own.kl.max()),
        "rms_change_of_p": float(np.sqrt(np.mean(change**2))),
        "kl_by_document": np.bincount(own.document, weights=own.kl).tolist(),
    }


def fp32_perplexity(reference: Reference, task: Task) -> float:
    """The perplexity of the fp32 artifact on the test text."""
    [scores] = score(task.rolling, [reference])
    return float(quality(scores, task.size, None)["perplexity"])
