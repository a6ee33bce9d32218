"""How much of the machine this process may use: the limits of Linux control groups, by which containers are limited.

Docker (`--cpus 2 --memory 4g`), Kubernetes, Slurm and systemd set them. Both versions are read; their files are
described in the kernel's Documentation/admin-guide/cgroup-v2.rst (`cpu.max`, `memory.max`), cgroup-v1/memory.rst and
scheduler/sched-bwc.rst (`cpu.cfs_quota_us`). This module imports the standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")
_MOUNT = "sys/fs/cgroup"
_UNIFIED = (_MOUNT, f"{_MOUNT}/unified")  # version 2: alone, and beside version 1


def processors(root: Path = _ROOT) -> float | None:
    """Processors' worth of time that this process may use, such as 1.5; None if there is no limit."""
    shares = [_share(*_read(folder / "cpu.max").split()) for folder in _groups(root, "")]
    for folder in _groups(root, "cpu"):
        shares.append(_share(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")))
    return min((share for share in shares if share), default=None)


def memory_bytes(root: Path = _ROOT) -> int | None:
    """How much memory this process may use, in bytes; None if there is no limit."""
    limits = [_number(_read(folder / "memory.max")) for folder in _groups(root, "")]
    limits += [_number(_read(folder / "memory.limit_in_bytes")) for folder in _groups(root, "memory")]
    return min((limit for limit in limits if limit), default=None)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's group and of all above it, whose limits hold too; some may not exist.

    `controller` is one of version 1, or "" for version 2. A container may see itself at the top of the file system,
    under a path that only the system outside knows. So the top is always among the folders.
    """
    mounts, path = [], "/"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, names, own = [*line.split(":", 2), "", ""][:3]
        if controller in names.split(","):
            mounts, path = [names, *names.split(",")], own
    if controller:
        places = [f"{_MOUNT}/{name}" for name in dict.fromkeys([*mounts, controller, "cpu,cpuacct"]) if name]
        places = [place for place in places if controller in Path(place).name.split(",")]
    else:
        places = list(_UNIFIED)
    inner = Path(path.lstrip("/"))
    for place in places:
        if ".." not in inner.parts:  # such a path leads out of what this process sees
            yield root / place / inner
            yield from (root / place / above for above in inner.parents)
        yield root / place


def _share(quota: str = "", period: str = "", *_: str) -> float | None:
    """Processors' worth of time: microseconds of `quota` in each `period`. "max" and -1 are no limit."""
    used, of = _number(quota), _number(period)
    return used / of if used and of else None


def _number(text: str) -> int | None:
    """The positive whole number `text`, or None. Version 1 writes a number beyond any memory for no limit."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 and 0 < int(text) < 2**62 else None


def _read(file: Path) -> str:
    """The text of `file`; empty where it is not there, or may not be read."""
    try:
        return file.read_text().strip()
    except (OSError, UnicodeError):
        return ""
