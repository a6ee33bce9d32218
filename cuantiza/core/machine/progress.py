"""Progress of long work: a bar on a terminal; in a log, a line at least every 30 seconds.

Such a line says what is done, how far it is, and what is left: `calibrate: 5 of 13, about 40 s left`. Work inside other
work is on the same line. All lines go to standard error.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")
EVERY_S = 30.0  # the longest silence in a log


@dataclass(eq=False)
class Work:
    """Work in progress: `done` of `total` items (`total` is None for work that has no count)."""

    label: str
    total: int | None
    every: float
    done: int = 0
    bar: bool = False
    start: float = field(default_factory=time.monotonic)

    def count(self, items: Iterable[T]) -> Iterator[T]:
        """Yield `items`, and count each as done when the next one is asked for."""
        for item in items:
            yield item
            self.done += 1

    def __str__(self) -> str:
        elapsed = time.monotonic() - self.start
        how_far = "" if self.total is None else f"{self.done} of {self.total}, "
        if self.total is None or not self.done:
            return f"{self.label.strip()}: {how_far}{_duration(elapsed)} so far"
        left = elapsed / self.done * (self.total - self.done)
        return f"{self.label.strip()}: {how_far}about {_duration(left)} left"


_bar: Console | None = None  # what shows a bar at the moment; lines go through it, above the bar
# What is in progress in this process, the outermost first, and the thread that prints it while there is any.
_works: list[Work] = []
_changed = threading.Condition()
_printer: threading.Thread | None = None
_printed = time.monotonic()  # when the last line was printed


def track(items: Iterable[T], label: str, total: int, every: float = EVERY_S) -> Iterator[T]:
    """Yield `items`, and show meanwhile how many of `total` are done.

    On a terminal this is a bar; elsewhere a line after `every` seconds without one. A last line gives the time taken.
    """
    global _bar
    with working(label, total, every) as work:
        if sys.stderr.isatty() and not any(other.bar for other in _works):
            # Imported here: rich takes longer to load than a run that finds everything up to date.
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            work.bar, _bar = True, Console(stderr=True)
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            try:
                with Progress(*columns, console=_bar, transient=True) as progress:
                    yield from progress.track(work.count(items), total=total, description=label)
            finally:
                _bar = None
        else:
            yield from work.count(items)
    report(f"{label}: {total} in {time.monotonic() - work.start:.1f} s")


@contextmanager
def working(label: str, total: int | None = None, every: float = EVERY_S) -> Iterator[Work]:
    """Show that the block is at work by a line after `every` seconds without one, and `done` of `total` if it counts.

    The block counts by the yielded Work: with `count`, or by setting `done`. While a bar is on the terminal, nothing is
    printed.
    """
    global _printed
    work = Work(label, total, every)
    with _changed:
        if not _works:
            _printed = work.start
        _works.append(work)
        _start_printer()
        _changed.notify()
    try:
        yield work
    finally:
        # Without the lock: a generator may be closed while the interpreter ends, and a thread that died holds it then.
        _works.remove(work)


def report(line: str) -> None:
    """Print one line about what was done."""
    global _printed
    _printed = time.monotonic()
    if _bar is not None:
        _bar.print(line, markup=False, highlight=False, soft_wrap=True)
    else:
        # In one call: print writes the end of the line in a second one, and another thread may come between.
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def warn(sentences: list[str]) -> None:
    """Print what the user should know of a model or an artifact, though nothing stopped."""
    for text in sentences:
        report(f"warning   {text}")


def _start_printer() -> None:
    """Start the thread that prints, unless it runs. It takes no signals, which belong to the main thread."""
    global _printer
    if _printer is not None:
        return
    _printer = threading.Thread(target=_print_works, name="progress", daemon=True)
    if not hasattr(signal, "pthread_sigmask"):
        _printer.start()
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        _printer.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _print_works() -> None:
    """Print a line whenever nothing was printed for the shortest `every`; end when no work is left."""
    global _printer
    while True:
        with _changed:
            works = list(_works)
            if not works:
                _printer = None
                return
            every = min(work.every for work in works)
            wait = every if any(work.bar for work in works) else _printed + every - time.monotonic()
            if wait > 0:
                _changed.wait(wait)
                continue
        report("; ".join(map(str, works)))


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
