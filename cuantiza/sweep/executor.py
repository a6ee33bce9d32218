"""Where tasks run: behind one interface, here or on a cluster (cuantiza/sweep/on_ray.py)."""

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
    """A task that has ended: what it returned, or why it could not be done, and where in how many seconds."""

    task: Task
    value: Any
    error: str | None
    seconds: float
    where: str


class Executor(Protocol):
    """Does tasks. Used in a `with` block, at whose end nothing of it runs any more."""

    def __enter__(self) -> Executor: ...

    def __exit__(self, *_: object) -> None: ...

    def run(self, tasks: Sequence[Task]) -> Iterator[Done]:
        """All of `tasks`, as they end. An error that is not the user's to mend is raised."""
        ...


def perform(task: Task, where: str) -> Done:
    """Do `task` in this process."""
    start = time.perf_counter()
    try:
        value, error = task.run(), None
    except UserError as problem:
        value, error = None, " ".join(str(problem).split())
    return Done(task, value, error, time.perf_counter() - start, where)


class Local:
    """One task after the other, in this process."""

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, tasks: Sequence[Task]) -> Iterator[Done]:
        for task in tasks:
            yield perform(task, platform.node())
