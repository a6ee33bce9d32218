"""Interleaved rounds: each runs every row once, in a fresh process of its own, one after the other.

Nothing else is loaded meanwhile, so no thread pool disturbs another, and noise that lasts longer than a round falls
on all rows alike. The order is rotated from round to round.
"""

from __future__ import annotations

import os
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bench.child import Failed, ask
from bench.rows import Row
from bench.worker import STEPS, WARM_UP_STEPS
from core.progress import track

PREFILL, DECODE, GENERATE = (128, 512), (128, 512, 900), (128, 128)
# Of a larger batch, and of fewer threads than the most: less, so that a run stays short.
BATCH_PREFILL, BATCH_DECODE = (128,), (128,)
FEWER_PREFILL, FEWER_DECODE = (512,), (128,)
# Every row's logits of the last of 96 tokens, and of 32 more through the cache, are compared with the first row's.
CHECK = (96, 32)
TIMEOUT_S = 600


@dataclass(frozen=True)
class Setting:
    """Threads, sequences in a batch, and shapes: prefill lengths, decode positions, and (prompt, tokens) of a
    generation, all in tokens of one sequence."""

    threads: int
    batch: int
    prefill: tuple[int, ...]
    decode: tuple[int, ...]
    generate: tuple[int, int] | None

    @property
    def context(self) -> int:
        """The longest sequence that any of the shapes needs."""
        decode = max(self.decode, default=0) + WARM_UP_STEPS + STEPS
        return max(*self.prefill, decode, sum(self.generate or ()), sum(CHECK))


@dataclass
class Measured:
    """A row in a setting: what the worker answered in each round, or why there is nothing."""

    runs: list[dict]
    skipped: str | None = None


@dataclass(frozen=True)
class Answer:
    """To the check: the likeliest token at each position, and the logits float32 [positions, V] where there are any."""

    top: list[int]
    logits: np.ndarray | None


@dataclass(frozen=True)
class Agreement:
    """With the first row: the largest difference of a logit, and the share of `positions` with the same top token."""

    max_logit_difference: float | None
    same_top: float
    positions: int


def settings(threads: list[int], batches: list[int]) -> list[Setting]:
    """What is measured: every batch with the most threads, and the smallest with fewer. The main one comes first."""
    most, least = max(threads), min(batches)
    found = [Setting(most, least, PREFILL, DECODE, GENERATE)]
    found += [Setting(most, batch, BATCH_PREFILL, BATCH_DECODE, GENERATE) for batch in sorted({*batches} - {least})]
    fewer = sorted({*threads} - {most}, reverse=True)
    return found + [Setting(count, least, FEWER_PREFILL, FEWER_DECODE, None) for count in fewer]


class Others:
    """How busy other processes keep the machine, from the making of this object on."""

    def __init__(self) -> None:
        self._start = self._now()

    def processors(self) -> float | None:
        """As many processors as others kept busy on average; None where the system does not tell."""
        if self._start is None:
            return None
        (elapsed, busy), (elapsed_before, busy_before) = self._now(), self._start
        return max(0.0, (busy - busy_before) / max(elapsed - elapsed_before, 1e-9))

    @staticmethod
    def _now() -> tuple[float, float] | None:
        """(seconds, seconds of all processors that neither this process nor its children used)."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system, _, _, irq, softirq, steal, *_ = map(int, stat.read_text().split("\n")[0].split()[1:])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return time.monotonic(), busy - sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(
    rows: list[Row], wanted: list[Setting], ids: np.ndarray, rounds: int, work: Path, label: str
) -> tuple[dict[str, list[Measured]], dict[str, Answer]]:
    """(for each row and setting all rounds, for each row its answer to the check).

    Prompts are `ids` int64 [batch, context]; `work` is a folder for temporary files. A row that fails in a setting is
    not tried there again.
    """
    measured = {row.name: [Measured([]) for _ in wanted] for row in rows}
    answers: dict[str, Answer] = {}
    order = [
        (number, turn, rows[(turn + round_) % len(rows)])
        for round_ in range(rounds)
        for number in range(len(wanted))
        for turn in range(len(rows))
    ]
    for number, _, row in track(order, label, len(order)):
        found = measured[row.name][number]
        if found.skipped:
            continue
        checks = row.name not in answers and number == 0
        try:
            run, answer = _run(row, wanted[number], ids, work, checks)
        except Failed as error:
            found.runs, found.skipped = [], str(error)
            continue
        found.runs.append(run)
        if answer:
            answers[row.name] = answer
    return measured, answers


def agreement(answer: Answer | None, reference: Answer | None) -> Agreement | None:
    """How far `answer` is from `reference`; None where either is missing."""
    if answer is None or reference is None:
        return None
    count = min(len(answer.top), len(reference.top))
    same = float(np.mean(np.equal(answer.top[:count], reference.top[:count])))
    if answer.logits is None or reference.logits is None:
        return Agreement(None, same, count)
    vocabulary = min(answer.logits.shape[-1], reference.logits.shape[-1])  # some libraries pad theirs
    difference = np.abs(answer.logits[:, :vocabulary] - reference.logits[:, :vocabulary])
    return Agreement(float(difference.max()), same, count)


def _run(row: Row, setting: Setting, ids: np.ndarray, work: Path, checks: bool) -> tuple[dict, Answer | None]:
    """One fresh process of a row. Raises Failed."""
    logits = work / "logits.npy"
    logits.unlink(missing_ok=True)
    request = asdict(setting) | {
        "task": "measure",
        "module": row.module,
        "kind": row.kind,
        "folder": str(row.folder.absolute()),
        "options": row.options,
        "ids": ids[: setting.batch, : setting.context].tolist(),
        "check": CHECK if checks else None,
        "logits": str(logits),
    }
    run = ask(row.python, request, work, TIMEOUT_S, setting.threads)
    if run["top"] is None:
        return run, None
    return run, Answer(run["top"], np.load(logits) if logits.is_file() else None)
