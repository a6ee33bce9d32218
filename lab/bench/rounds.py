"""Measures in interleaved rounds: for each shape, such as a prefill of 512, all rows are timed one after the other.

The order rotates from round to round. Each row has a process of its own, which stays loaded and is stopped (SIGSTOP)
except during its turns, so no thread pool disturbs another. Times that are compared were measured within seconds of
each other. That matters: the speed of a virtual machine was seen to change by a third for tens of seconds, faster for
one kind of work and slower for another (docs/performance.md).
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cuantiza.core.machine.child import Failed
from cuantiza.core.machine.hardware import memory_bytes
from cuantiza.core.machine.progress import track
from lab.bench import limits
from lab.bench.child import Resident
from lab.bench.limits import Limits
from lab.bench.rows import Row
from lab.bench.worker import STEPS, WARM_UP_STEPS

PREFILL, DECODE, GENERATE = (128, 512), (128, 512, 900), (128, 128)
# Larger batches, and fewer threads than the most, are measured on fewer shapes, so that a run stays short.
BATCH_PREFILL, BATCH_DECODE = (128,), (128,)
FEWER_PREFILL, FEWER_DECODE = (512,), (128,)
# The check compares every row's logits with the first row's: after a prefill of 96 tokens, and after each of 32 decode
# steps.
CHECK = (96, 32)
# Each row is loaded this often in the main setting to time the load. The last process stays for the rounds.
LOADS = 3
# The rows that are loaded at once may use this share of the machine's memory, by the sum of their peaks. If all rows
# need more, they are measured in groups.
MEMORY_SHARE = 0.9
TIMEOUT_S = 600

# ("prefill", tokens), ("decode", position) or ("generate", prompt, tokens), in tokens of one sequence.
Case = tuple[str | int, ...]


@dataclass(frozen=True)
class Setting:
    """The number of threads, the batch size, and the shapes that are measured.

    Shapes are prefill lengths, decode positions, and (prompt, new tokens) of a generation, in tokens per sequence.
    """

    threads: int
    batch: int
    prefill: tuple[int, ...]
    decode: tuple[int, ...]
    generate: tuple[int, int] | None

    @property
    def cases(self) -> list[Case]:
        found: list[Case] = [("prefill", count) for count in self.prefill]
        found += [("decode", position) for position in self.decode]
        return found + ([("generate", *self.generate)] if self.generate else [])

    @property
    def context(self) -> int:
        """The length of the longest sequence that any of the shapes needs, in tokens."""
        decode = max(self.decode, default=0) + WARM_UP_STEPS + STEPS
        return max(*self.prefill, decode, sum(self.generate or ()), sum(CHECK))


@dataclass
class Measured:
    """The measurements of a row in a setting.

    `rounds` has one dict per round: samples in ns by case. `base` has the baseline's samples of the same rounds. If the
    row could not be measured, `skipped` says why.
    """

    rounds: list[dict[Case, list[int]]] = field(default_factory=list)
    base: list[dict[Case, list[int]]] = field(default_factory=list)
    load_ns: list[int] = field(default_factory=list)
    peak_rss_bytes: int = 0
    version: str = ""
    skipped: str | None = None


@dataclass(frozen=True)
class Answer:
    """A row's answer to the check: the likeliest token at each position, and float32 logits [positions, V].

    `logits` is None if the library does not give any.
    """

    top: list[int]
    logits: np.ndarray | None


@dataclass(frozen=True)
class Agreement:
    """How well a row agrees with the first row.

    The fields are the largest difference of a logit, and the share of `positions` with the same likeliest token.
    """

    max_logit_difference: float | None
    same_top: float
    positions: int


def settings(threads: list[int], batches: list[int]) -> list[Setting]:
    """All settings to measure: every batch size with the most threads, and the smallest one with fewer threads.

    The main setting (most threads, smallest batch) comes first.
    """
    most, least = max(threads), min(batches)
    found = [Setting(most, least, PREFILL, DECODE, GENERATE)]
    found += [Setting(most, batch, BATCH_PREFILL, BATCH_DECODE, GENERATE) for batch in sorted({*batches} - {least})]
    fewer = sorted({*threads} - {most}, reverse=True)
    return found + [Setting(count, least, FEWER_PREFILL, FEWER_DECODE, None) for count in fewer]


class Others:
    """Measures how busy other processes keep the machine, starting when this object is created."""

    def __init__(self) -> None:
        self._start = self._now()

    def processors(self) -> float | None:
        """How many processors other processes kept busy on average; None if the system has no /proc/stat."""
        if self._start is None:
            return None
        (elapsed, busy), (elapsed_before, busy_before) = self._now(), self._start
        return max(0.0, (busy - busy_before) / max(elapsed - elapsed_before, 1e-9))

    @staticmethod
    def _now() -> tuple[float, float] | None:
        """(wall time in seconds, processor seconds that neither this process nor its children used)."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system, _, _, irq, softirq, steal, *_ = map(int, stat.read_text().split("\n")[0].split()[1:])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return time.monotonic(), busy - sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(
    rows: list[Row], baseline: str, wanted: list[Setting], ids: np.ndarray, rounds: int, work: Path, label: str
) -> tuple[dict[str, list[Measured]], dict[str, Answer], list[Limits]]:
    """Measure all rows in all settings.

    Returns ({row: its measurements in each setting}, {row: its answer to the check}, the machine's limits before each
    round). The prompts are `ids` int64 [batch, context]; `work` is a folder for temporary files. A row that fails in a
    setting is not tried again in that setting. Raises Failed if the limits cannot be measured.
    """
    measured = {row.name: [Measured() for _ in wanted] for row in rows}
    answers: dict[str, Answer] = {}
    found_limits: list[Limits] = []

    def turns() -> Iterator[None]:
        for number, setting in enumerate(wanted):
            found = {row.name: measured[row.name][number] for row in rows}
            if number == 0:
                yield from _load(rows, setting, ids, work, found)
            # Rows of the same precision run next to each other, because they are compared most.
            waiting = sorted((row for row in rows if not found[row.name].skipped), key=lambda row: row.precision)
            base = next((row for row in waiting if row.name == baseline), None)
            while waiting:
                with ExitStack() as stack:
                    group = _Group(setting, ids, work, stack, found, base)
                    yield from group.open(waiting)
                    for round_ in range(rounds):
                        found_limits.append(limits.measure(setting.threads))
                        yield from group.round(round_)
                    answers.update(group.close(checks=number == 0))

    steps = sum(len(rows) * (1 + rounds * len(setting.cases)) for setting in wanted) + (LOADS - 1) * len(rows)
    for _ in track(turns(), label, steps):
        pass
    return measured, answers, found_limits


class _Group:
    """The rows that are loaded at the same time. The baseline is always one of them.

    If the baseline was already measured in an earlier group, it is measured again only for the ratios of this group.
    """

    def __init__(
        self,
        setting: Setting,
        ids: np.ndarray,
        work: Path,
        stack: ExitStack,
        found: dict[str, Measured],
        base: Row | None,
    ) -> None:
        self.setting, self.ids, self.work, self.stack, self.found, self.base = setting, ids, work, stack, found, base
        self.members: list[tuple[Row, Resident, Measured]] = []

    def open(self, waiting: list[Row]) -> Iterator[None]:
        """Load as many rows as memory allows, at least one besides the baseline, and remove them from `waiting`."""
        again = self.base is not None and self.base not in waiting
        if again:
            self._start(self.base, Measured())
        elif self.base is not None:
            waiting.insert(0, waiting.pop(waiting.index(self.base)))
        peaks = [measured.peak_rss_bytes for _, _, measured in self.members]
        while waiting and (len(peaks) < 2 or sum(peaks) + max(peaks) <= MEMORY_SHARE * memory_bytes()):
            row = waiting.pop(0)
            if self._start(row, self.found[row.name]):
                peaks.append(self.found[row.name].peak_rss_bytes)
            yield

    def round(self, number: int) -> Iterator[None]:
        """Time every member on every case. In each round, the next member has the first turn."""
        for _, _, measured in self.members:
            measured.rounds.append({})
        for case in self.setting.cases:
            first = number % max(len(self.members), 1)
            for row, resident, measured in [*self.members[first:], *self.members[:first]]:
                try:
                    measured.rounds[-1][case] = resident.ask(*case)
                except Failed as error:
                    self._drop(row, str(error))
                if self.found[row.name] is measured:
                    yield

    def close(self, checks: bool) -> dict[str, Answer]:
        """Store each member's peak memory and the baseline's rounds. With `checks`, return the answers to the check."""
        answers = {}
        base = next((measured.rounds for row, _, measured in self.members if row == self.base), [])
        for row, resident, measured in list(self.members):
            try:
                measured.peak_rss_bytes = resident.ask("peak")
                measured.base = base
                if checks and self.found[row.name] is measured:
                    logits = self.work / "logits.npy"
                    logits.unlink(missing_ok=True)
                    top = resident.ask("check", *CHECK)
                    if top is not None:
                        answers[row.name] = Answer(top, np.load(logits) if logits.is_file() else None)
            except Failed as error:
                self._drop(row, str(error))
        return answers

    def _start(self, row: Row, measured: Measured) -> bool:
        """Load a row and run its largest prefill, which takes the most memory. Returns whether that worked."""
        try:
            resident = _resident(row, self.setting, self.ids, self.work, measured)
            self.stack.callback(resident.close)
            resident.ask("prefill", max(self.setting.prefill))
            measured.peak_rss_bytes = resident.ask("peak")
        except Failed as error:
            measured.skipped = str(error)
            return False
        self.members.append((row, resident, measured))
        return True

    def _drop(self, row: Row, why: str) -> None:
        _, resident, measured = next(member for member in self.members if member[0] == row)
        self.members = [member for member in self.members if member[0] != row]
        resident.close()
        measured.rounds, measured.skipped = [], why


def _load(rows: list[Row], setting: Setting, ids: np.ndarray, work: Path, found: dict[str, Measured]) -> Iterator[None]:
    """Load and close each row LOADS - 1 times, in turns. `_Group.open` does the last load, which stays."""
    for _ in range(LOADS - 1):
        for row in rows:
            if not found[row.name].skipped:
                try:
                    _resident(row, setting, ids, work, found[row.name]).close()
                except Failed as error:
                    found[row.name].skipped = str(error)
            yield


def _resident(row: Row, setting: Setting, ids: np.ndarray, work: Path, measured: Measured) -> Resident:
    """Start a process that loads a row, and note in `measured` how long that took. Raises Failed."""
    request = {
        "task": "serve",
        "module": row.module,
        "kind": row.kind,
        "folder": str(row.folder.absolute()),
        "threads": setting.threads,
        "options": row.options,
        "ids": ids[: setting.batch, : setting.context].tolist(),
        "logits": str(work / "logits.npy"),
    }
    resident = Resident(row.python, request, work, TIMEOUT_S, setting.threads)
    measured.load_ns.append(resident.first["load_ns"])
    measured.version = resident.first["version"]
    return resident


def agreement(answer: Answer | None, reference: Answer | None) -> Agreement | None:
    """Compare `answer` with `reference`; None if either is missing."""
    if answer is None or reference is None:
        return None
    count = min(len(answer.top), len(reference.top))
    same = float(np.mean(np.equal(answer.top[:count], reference.top[:count])))
    if answer.logits is None or reference.logits is None:
        return Agreement(None, same, count)
    vocabulary = min(answer.logits.shape[-1], reference.logits.shape[-1])  # some libraries pad the vocabulary
    difference = np.abs(answer.logits[:, :vocabulary] - reference.logits[:, :vocabulary])
    return Agreement(float(difference.max()), same, count)
