"""Progress of long work: a bar with an estimate on a terminal, a quiet line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
_console = Console(stderr=True)


def track(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    """Yield `items`, showing how far `label` has come of `total`."""
    start = time.monotonic()
    if _console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=_console, transient=True) as progress:
            yield from progress.track(items, total=total, description=label)
    else:
        yield from items
    report(f"{label}: {total} in {time.monotonic() - start:.1f} s")


def report(line: str) -> None:
    """One line about what was done."""
    _console.print(line, markup=False, highlight=False, soft_wrap=True)
