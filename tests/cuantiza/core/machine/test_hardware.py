"""The limits of a container, read from trees of files as Linux shows them; they decide threads and memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cuantiza.core.machine import hardware, limits

from helpers import ROOT

MIB = 2**20
NONE = 2**63 - 4096  # what version 1 writes where memory has no limit


def tree(root: Path, groups: str, **files: str | int) -> Path:
    """A root of files: /proc/self/cgroup with the lines `groups`, and {path below /sys/fs/cgroup: content}."""
    for name, text in {
        "proc/self/cgroup": groups,
        **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


@pytest.mark.parametrize(
    ("groups", "files", "processors", "memory"),
    [
        # Version 2: a container's own view, and one limit alone.
        ("0::/", {"cpu.max": "200000 100000", "memory.max": 512 * MIB}, 2, 512 * MIB),
        ("0::/", {"cpu.max": "50000 100000", "memory.max": "max"}, 0.5, None),
        ("0::/", {"cpu.max": "max 100000", "memory.max": 64 * MIB}, None, 64 * MIB),
        ("0::/", {}, None, None),
        # A path inside: the smallest limit of all groups above holds.
        (
            "0::/a.slice/b.service",
            {"a.slice/cpu.max": "150000 50000", "a.slice/b.service/cpu.max": "max 100000", "cpu.max": "400000 100000"},
            3,
            None,
        ),
        ("0::/a/b/c", {"a/memory.max": 9 * MIB, "a/b/memory.max": 7 * MIB, "a/b/c/memory.max": 8 * MIB}, None, 7 * MIB),
        # A path of the system outside, of which this process sees only the end.
        ("0::/docker/0123", {"cpu.max": "100000 100000", "memory.max": 5 * MIB}, 1, 5 * MIB),
        ("0::/../other", {"cpu.max": "100000 100000", "memory.max": 5 * MIB}, 1, 5 * MIB),
        # Version 1: by the kernel's names of mounts, by links with shorter names, without limits, seen from outside.
        (
            "5:memory:/job\n4:cpu,cpuacct:/job",
            {
                "cpu,cpuacct/job/cpu.cfs_quota_us": 150000,
                "cpu,cpuacct/job/cpu.cfs_period_us": 100000,
                "memory/job/memory.limit_in_bytes": 3 * MIB,
            },
            1.5,
            3 * MIB,
        ),
        (
            "5:memory:/docker/0123\n4:cpuacct,cpu:/docker/0123\n1:name=systemd:/",
            {"cpu/cpu.cfs_quota_us": 400000, "cpu/cpu.cfs_period_us": 100000, "memory/memory.limit_in_bytes": 4 * MIB},
            4,
            4 * MIB,
        ),
        (
            "5:memory:/a\n4:cpu:/",
            {
                "cpu/cpu.cfs_quota_us": -1,
                "cpu/cpu.cfs_period_us": 100000,
                "memory/a/memory.limit_in_bytes": NONE,
                "memory/memory.limit_in_bytes": NONE,
            },
            None,
            None,
        ),
        # Both: version 2 beside version 1, as some systems have it.
        (
            "4:cpu:/\n0::/job",
            {"cpu/cpu.cfs_quota_us": 300000, "cpu/cpu.cfs_period_us": 100000, "unified/job/memory.max": 2 * MIB},
            3,
            2 * MIB,
        ),
        # Files that are empty, or hold what no kernel writes.
        ("", {"cpu.max": "", "memory.max": "lots"}, None, None),
        ("nonsense\n0::", {"cpu.max": "0 0", "memory.max": "-5"}, None, None),
        ("0::/", {"cpu.max": "100000"}, None, None),
    ],
)
def test_limits(tmp_path: Path, groups: str, files: dict, processors: float | None, memory: int | None) -> None:
    root = tree(tmp_path, groups, **files)
    assert (limits.processors(root), limits.memory_bytes(root)) == (processors, memory)


def test_a_system_without_control_groups(tmp_path: Path) -> None:
    assert (limits.processors(tmp_path), limits.memory_bytes(tmp_path)) == (None, None)


@pytest.mark.parametrize(("share", "threads"), [(None, 6), (0.2, 1), (1, 1), (1.5, 2), (2.0, 2), (64, 6)])
def test_a_quota_decides_the_threads(monkeypatch: pytest.MonkeyPatch, share: float | None, threads: int) -> None:
    monkeypatch.setattr(limits, "processors", lambda: share)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert hardware.default_threads() == threads


def test_a_limit_decides_the_memory_and_the_report_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit, usable in ((None, whole), (3 * MIB, 3 * MIB), (2 * whole, whole)):
        monkeypatch.setattr(limits, "memory_bytes", lambda limit=limit: limit)
        monkeypatch.setattr(limits, "processors", lambda limit=limit: limit and 0.5)
        described = hardware.machine(1)
        assert hardware.memory_bytes() == usable and described["memory_bytes"] == whole
        assert described.get("memory_limit_bytes") == (3 * MIB if limit == 3 * MIB else None)
        assert described.get("processors_limit") == (0.5 if limit else None)


def test_it_needs_the_standard_library_only() -> None:
    """The benchmark runs it in other libraries' environments."""
    code = "import sys; from cuantiza.core.machine import hardware; hardware.machine(1); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "numpy" not in loaded.stdout and "cuantiza.core.machine.limits" in loaded.stdout
