"""Whether a file has the sha256 that it should have, without reading it again while nobody has changed it.

A large file is read once a day at most while its device, inode, size and times stay the same. Any program that writes to it
changes those. What remains unseen for up to a day is a disk that returns other bytes than were written, and somebody
who sets the clock back while writing.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from cuantiza.core.store.cache import cache_folder
from cuantiza.core.store.digests import sha256_file

_FILE = "digests.json"
_LEAST_BYTES = 1 << 20  # smaller files are read each time, which takes about a millisecond
_DAY_S = 24 * 3600
_MOST = 256  # files that are remembered
# A file that is written to right after it was read may keep its time: a clock ticks every few milliseconds, and that of
# a file system which knows whole seconds only (FAT) every two seconds. What is so young is not remembered.
_TICK_NS, _COARSE_TICK_NS = 50_000_000, 2_000_000_000


def has_sha256(path: Path, sha256: str) -> bool:
    """Whether the file at `path` has this sha256, in hex; it is read unless it is known since at most a day.

    Whatever is wrong with what is remembered, a file is never refused for that: it is read then. Raises OSError if the
    file cannot be read.
    """
    cache = cache_folder()
    if cache is None or path.stat().st_size < _LEAST_BYTES:
        return sha256_file(path) == sha256
    name, stamp, now = str(path.absolute()), _stamp(path), time.time()
    known = _read(cache).get(name)
    if known and known["stamp"] == stamp and known["sha256"] == sha256 and 0 <= now - known["read"] < _DAY_S:
        return True
    begun = time.time_ns()
    found = sha256_file(path)
    if found == sha256 and _stamp(path) == stamp and _settled(stamp, begun):
        with suppress(OSError):
            _write(cache, name, {"stamp": stamp, "sha256": found, "read": now})
    return found == sha256


def _stamp(path: Path) -> list[int]:
    """[device, inode, size, time of the last change to the content, time of the last change to the inode], in ns."""
    found = path.stat()
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _settled(stamp: list[int], now: int) -> bool:
    """Whether the file of `stamp` was last changed long enough before `now`, in ns, that a change would show."""
    last = max(stamp[3:])
    return now - last > (_TICK_NS if last % 1_000_000_000 else _COARSE_TICK_NS)


def _read(cache: Path) -> dict[str, dict[str, Any]]:
    """What is remembered, by path; whatever does not look like it is left out."""
    try:
        lines = json.loads((cache / _FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(lines, dict):
        return {}
    return {name: line for name, line in lines.items() if _is_line(line)}


def _is_line(line: object) -> bool:
    return (
        isinstance(line, dict)
        and line.keys() == {"stamp", "sha256", "read"}
        and isinstance(line["read"], int | float)
    )


def _write(cache: Path, name: str, line: dict[str, Any]) -> None:
    """Remember `line` for the file `name`. Of two processes that do so at once, one line may be lost."""
    lines = _read(cache) | {name: line}
    newest = sorted(lines, key=lambda key: lines[key]["read"])[-_MOST:]
    handle, work = tempfile.mkstemp(prefix=".tmp-", dir=cache)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({key: lines[key] for key in newest}, file)
        Path(work).replace(cache / _FILE)
    except BaseException:
        Path(work).unlink(missing_ok=True)
        raise
