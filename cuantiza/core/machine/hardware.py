"""This machine: its processor, memory and threads, and how much memory a process took.

Importing this module loads only the standard library, so that it also runs in other libraries' environments.
"""

from __future__ import annotations

import math
import os
import platform
import resource
from pathlib import Path
from typing import Any

from cuantiza.core.errors import UserError
from cuantiza.core.machine import limits


def machine(threads: int) -> dict[str, Any]:
    """The machine as a report describes it: processor, logical processors, `threads` used, memory in bytes, system.

    Where a container may use less of it, `processors_limit` and `memory_limit_bytes` say how much.
    """
    physical = _physical_bytes()
    described: dict[str, Any] = {
        "cpu": cpu_name(),
        "processors": os.cpu_count(),
        "threads": threads,
        "memory_bytes": physical,
        "system": platform.platform(),
    }
    processors, memory = limits.processors(), limits.memory_bytes()
    if processors is not None and processors < (os.cpu_count() or 1):
        described["processors_limit"] = processors
    if memory is not None and memory < physical:
        described["memory_limit_bytes"] = memory
    return described


def software() -> dict[str, str]:
    """Versions of the libraries that a measurement depends on, by distribution, and of Python."""
    from cuantiza.core.store.digests import versions

    return versions("onnxruntime", "onnx", "numpy", "tokenizers", "torch", "transformers")


def cpu_name() -> str:
    """The processor's name as Linux shows it; elsewhere its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        for key, value in fields.items():
            if key.strip() in ("model name", "Model"):
                return value.strip()
    return platform.processor() or platform.machine()


def memory_bytes() -> int:
    """How much memory this process may use, in bytes: the machine's, or what its container is limited to."""
    return min(_physical_bytes(), limits.memory_bytes() or _physical_bytes())


def _physical_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_rss_bytes() -> int:
    """The largest resident set that this process has had so far, in bytes.

    On Linux it is read from /proc, because getrusage() in a child process starts with its parent's peak.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024  # macOS counts bytes, other systems KiB


def default_threads() -> int:
    """How many threads a runtime uses unless told otherwise: the processors that this process may run on.

    A container's quota counts with its last part rounded up, as 1.5 processors are more than one thread can use.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(processors, math.ceil(limits.processors() or processors)))


def check_threads(threads: int) -> None:
    """Raises UserError unless `threads` is between 1 and four for each processor, more than any machine can use."""
    most = 4 * (os.cpu_count() or 1)
    if not 1 <= threads <= most:
        raise UserError(f"--threads {threads}: give a number from 1 to {most}, four for each processor")
