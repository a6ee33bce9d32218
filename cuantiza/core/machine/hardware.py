"""The machine and the software that a report was made on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from cuantiza.core.store.digests import versions


def machine(threads: int) -> dict:
    """CPU by name, its logical processors, memory in bytes, operating system, and the threads that were used."""
    return {
        "cpu": cpu_name(),
        "processors": os.cpu_count(),
        "threads": threads,
        "memory_bytes": memory_bytes(),
        "system": platform.platform(),
    }


def software() -> dict[str, str]:
    return versions("onnxruntime", "onnx", "numpy", "tokenizers", "torch", "transformers")


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        for key, value in fields.items():
            if key.strip() in ("model name", "Model"):
                return value.strip()
    return platform.processor() or platform.machine()


def memory_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
