"""Folders in the user's cache that are made once and read often, whole or not at all.

CACHE/KIND/KEY/   an entry, such as an artifact's packed weights (cuantiza/core/run/packed.py)
CACHE/.lock       held while an entry is made; the kernel releases it when the process ends
CACHE/.tmp-*      an entry being made; the next maker removes what a killed one left
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cuantiza.core.store.folders import replace

# All entries of a kind together; the least recently used are removed beyond it. About fourteen int8 artifacts of GPT-2
# small.
BOUND_BYTES = 4 * 2**30
_LOCK = ".lock"


@contextmanager
def making(cache: Path) -> Iterator[Path | None]:
    """A temporary folder in `cache` to make an entry in; None while another process makes one, which nobody waits for.

    What is left in the folder at the end of the block is removed. Raises OSError where `cache` cannot be written, or
    its file system has no locks.
    """
    with (cache / _LOCK).open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        for leftover in cache.glob(".tmp-*"):  # of a killed maker: a live one would hold the lock
            shutil.rmtree(leftover, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=".tmp-", dir=cache))
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def publish(work: Path, entry: Path) -> None:
    """Put the folder `work` of `making` in the place of `entry`, and hold the entries of its kind to their bound."""
    entry.parent.mkdir(mode=0o700, exist_ok=True)
    if entry.exists():
        remove(entry)
    replace(work, entry)
    _hold_to_bound(entry.parent)


def touch(entry: Path) -> None:
    """Note that `entry` was used now."""
    with suppress(OSError):  # a folder that can only be read
        os.utime(entry)


def remove(entry: Path) -> None:
    """Remove `entry`. Nobody finds half of it: it is renamed first. Processes that have mapped its files keep them."""
    with suppress(OSError):
        aside = Path(tempfile.mkdtemp(prefix=".tmp-", dir=entry.parent.parent))
        entry.rename(aside / "old")
        shutil.rmtree(aside, ignore_errors=True)


def _hold_to_bound(kind: Path) -> None:
    """Remove the entries that were used longest ago until the rest takes no more than BOUND_BYTES; called by makers."""
    used = {entry: entry.stat().st_mtime_ns for entry in kind.iterdir()}
    sizes = {entry: sum(file.stat().st_size for file in entry.iterdir()) for entry in used}
    total = sum(sizes.values())
    for entry in sorted(used, key=used.__getitem__):
        if total <= BOUND_BYTES:
            return
        remove(entry)
        total -= sizes[entry]
