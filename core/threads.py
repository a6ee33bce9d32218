"""How many threads a runtime uses unless told."""

from __future__ import annotations

import os


def default_threads() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
