"""How many threads a runtime uses unless told."""

from __future__ import annotations

import os

from cuantiza.core.errors import UserError


def default_threads() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_threads(threads: int) -> None:
    """Raises UserError where `threads` is none, or more than any machine of this size can use."""
    most = 4 * (os.cpu_count() or 1)
    if not 1 <= threads <= most:
        raise UserError(f"--threads {threads}: give a number from 1 to {most}, four for each processor")
