"""Runs tasks in this process. A cluster (cuantiza/sweep/on_ray.py) has the same interface."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cuantiza.core.errors import UserError
from cuantiza.sweep.tasks.build import Export, Quantize
from cuantiza.sweep.tasks.measure import Latency, Quality

Task = Export | Quantize | Quality | Latency


@dataclass(frozen=True)
class Done:
    """A task that has ended: its return value, or the `error` that stopped it, its seconds, and where it ran."""

    task: Task
    value: Any
    error: str | None
    seconds: float
    where: str


class Executor(Protocol):
    """Runs tasks. It is used in a `with` block; when the block ends, none of its tasks runs any more."""

    def __enter__(self) -> Executor: ...

    def __exit__(self, *_: object) -> None: ...

    def run(self, tasks: Sequence[Task]) -> Iterator[Done]:
        """Run all `tasks` and yield each as it ends.

        A UserError goes into Done.error; any other error is a bug and is raised.
        """
        ...


def perform(task: Task, where: str) -> Done:
    """Run `task` in this process."""
    start = time.perf_counter()
    try:
        value, error = task.run(), None
    except UserError as problem:
        value, error = None, " ".join(str(problem).split())
    return Done(task, value, error, time.perf_counter() - start, where)


class Local:
    """Runs one task after the other, in this process."""

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, tasks: Sequence[Task]) -> Iterator[Done]:
        for task in tasks:
            yield perform(task, platform.node())
