"""The user's cache folder: what can be made again at any time, so that a later run is faster.

FOLDER/digests.json   the sha256 of files that have not changed since (cuantiza/core/store/unchanged.py)
FOLDER/packed/KEY/    the packed weights of an artifact (cuantiza/core/run/packed.py)
FOLDER/.lock          held while an entry is made; the kernel releases it when the process ends
FOLDER/.tmp-*         an entry being made; the next maker removes what a killed one left

FOLDER is `cuantiza` in the system's folder for caches, or in the folder that CUANTIZA_CACHE names. CUANTIZA_CACHE=off
switches the cache off. A run never fails because of it: where the disk is full, the folder cannot be written or is somebody else's,
only the speed is lost.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cuantiza.core.store.folders import replace

VARIABLE = "CUANTIZA_CACHE"
OFF = "off"
# All entries together; the least recently used are removed beyond it. About twelve int8 artifacts of GPT-2 small.
BOUND_BYTES = 4 * 2**30
_LOCK = ".lock"


def cache_folder() -> Path | None:
    """The cache's folder, made if it is missing; None where there is none to use.

    It must be a folder of this user's own that no other user may enter or change, since what is in it is run. A link is
    not followed: in a folder that others may write, it could lead anywhere.
    """
    place = _place()
    if place is None:
        return None
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = place.lstat()
        if not stat.S_ISDIR(found.st_mode):
            return None
        if os.name == "posix":  # elsewhere the folder is in the user's profile, which has an access list
            if found.st_uid != os.geteuid():
                return None
            if found.st_mode & 0o022:  # others may have put something there already
                return None
            if found.st_mode & 0o055:
                place.chmod(0o700)
    except OSError:
        return None
    return place


def _place() -> Path | None:
    """Where the cache should be; None if it is switched off, or the system names no such place."""
    given = os.environ.get(VARIABLE, "").strip()
    if given.lower() == OFF:
        return None
    try:
        if given:
            above = Path(given).absolute()
        elif sys.platform == "darwin":
            above = Path.home() / "Library" / "Caches"
        elif sys.platform == "win32":
            above = Path(os.environ["LOCALAPPDATA"])
        else:
            # By the XDG base directory specification, a relative path there is to be ignored.
            named = Path(os.environ.get("XDG_CACHE_HOME", ""))
            above = named if named.is_absolute() else Path.home() / ".cache"
    except (KeyError, RuntimeError):  # RuntimeError: this user has no home
        return None
    return above / "cuantiza"


@contextmanager
def making(cache: Path) -> Iterator[Path | None]:
    """A temporary folder in `cache` to make an entry in; None while another process makes one, which nobody waits for.

    What is left in the folder at the end of the block is removed. Raises OSError where `cache` cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(cache / _LOCK)
    try:
        lock.acquire(timeout=0)
    except (Timeout, NotImplementedError):  # NotImplementedError: a file system without locks
        yield None
        return
    try:
        for leftover in cache.glob(".tmp-*"):  # of a killed maker: a live one would hold the lock
            shutil.rmtree(leftover, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=".tmp-", dir=cache))
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
    finally:
        lock.release()


def publish(work: Path, entry: Path) -> None:
    """Put the folder `work` of `making` in the place of `entry`, whole or not at all, and hold the cache to its bound."""
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
        entry = entry.rename(Path(tempfile.mkdtemp(prefix=".tmp-", dir=entry.parent.parent)) / "old")
        shutil.rmtree(entry.parent, ignore_errors=True)


def _hold_to_bound(entries: Path) -> None:
    """Remove the entries that were used longest ago until the rest takes no more than BOUND_BYTES; called by makers."""
    used = {entry: entry.stat().st_mtime_ns for entry in entries.iterdir()}
    sizes = {entry: sum(file.stat().st_size for file in entry.iterdir()) for entry in used}
    total = sum(sizes.values())
    for entry in sorted(used, key=used.__getitem__):
        if total <= BOUND_BYTES:
            return
        remove(entry)
        total -= sizes[entry]
