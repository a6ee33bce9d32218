"""Folders of results: one stage at a time holds a folder, and results in it are replaced whole or not at all.

FOLDER/.cuantiza.lock   marks the folder as ours; the kernel releases the lock on it when the process ends
FOLDER/.tmp-*           work in progress; the next holder of the lock removes what a killed stage left
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from cuantiza.core.errors import UserError, naming

LOCK = ".cuantiza.lock"
_ours = threading.local()  # .folders: those that this thread holds
_HELD = (errno.EAGAIN, errno.EACCES)  # what file systems answer where another process has the lock
_NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS)  # another user's folder, or a read-only mount
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # Lustre without -o flock, NFS without a lock server


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for one stage: create it if needed, and remove what a killed stage left in it.

    Folders that the stage created and put nothing into are removed again. The kernel releases the lock when the process
    ends, however it ends. Raises UserError if `folder` holds files that are not ours, or if this thread holds it already
    and would wait for itself.
    """
    ours, where = _ours.__dict__.setdefault("folders", set()), folder.resolve()
    if where in ours:
        raise UserError(f"{folder}: is read by this very command; choose another output folder (OUT=, REPORTS=, DIST=)")
    lock, made = _held(folder)
    with lock:
        try:
            ours.add(where)
            _sweep(folder)
            yield
        finally:
            ours.discard(where)
            with suppress(OSError):
                _sweep(folder)  # a signal may have interrupted a removal
                if made and [file.name for file in folder.iterdir()] == [LOCK]:
                    (folder / LOCK).unlink()
                    for each in made:  # which NFS refuses as long as the lock is open
                        each.rmdir()


@contextmanager
def held(*paths: Path) -> Iterator[None]:
    """Keep stages from writing into the folders `paths`, which the block only reads.

    No stage writes into a folder without a lock file, such as a copy from elsewhere. Of a folder that belongs to another
    user, or is mounted read-only, the lock is shared with others who read it.
    """
    with ExitStack() as stack:
        for folder in sorted({path.resolve() for path in paths}):  # in one order, or two processes wait for each other
            if not (folder / LOCK).is_file():
                continue
            try:
                stack.enter_context(locked(folder))
            except OSError as error:
                if error.errno not in _NOT_OURS:
                    raise
                with suppress(PermissionError):  # nor may it be read
                    lock = stack.enter_context((folder / LOCK).open("rb"))
                    _hold(lock, folder, fcntl.LOCK_SH)
        yield


def _check(folder: Path) -> None:
    """Raise a UserError if `folder` or one above it is a file or a link to nothing, or if it holds files that are not ours."""
    path = (folder, *folder.parents)
    if broken := next((each for each in path if each.is_symlink() and not each.exists()), None):
        raise UserError(f"{broken}: is a link to nothing; choose another output folder (OUT=, REPORTS=, DIST=)")
    try:
        names = os.listdir(folder)  # noqa: PTH208 - one listing: another run may be starting here
    except FileNotFoundError:  # there is none, or another run has just removed it
        return
    except NotADirectoryError:
        odd = next(each for each in path if each.exists())
        raise UserError(f"{odd}: is a file; choose another output folder (OUT=, REPORTS=, DIST=)") from None
    if names and LOCK not in names:
        raise UserError(
            f"{folder}: holds files that are not ours; move them away or choose another output folder (OUT=, REPORTS=, DIST=)"
        )


def _held(folder: Path) -> tuple[BinaryIO, list[Path]]:
    """Open the lock of `folder`, which is made if it is missing, and wait until this process alone holds it.

    Returns the lock, and the folders that were missing, the innermost first. Raises UserError as `_check` does.
    """
    while True:
        _check(folder)
        made = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = (folder / LOCK).open("ab")
        except FileNotFoundError:  # another run removed the folder that it had made
            continue
        try:
            _hold(lock, folder)
            with suppress(FileNotFoundError):
                if (folder / LOCK).stat().st_ino == os.fstat(lock.fileno()).st_ino:
                    return lock, made
        except BaseException:
            lock.close()
            raise
        lock.close()


def _hold(lock: BinaryIO, folder: Path, how: int = fcntl.LOCK_EX) -> None:
    """Wait until this process holds `lock`, a file of `folder`: alone, or by LOCK_SH with others who only read."""
    try:
        try:
            fcntl.flock(lock, how | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _HELD:
                raise
            print(f"waiting for another run to finish with {folder}", file=sys.stderr)
            fcntl.flock(lock, how)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(f"warning   {folder}: its file system has no locks, so let no other run use it now", file=sys.stderr)


def _sweep(folder: Path) -> None:
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink()


def publish_texts(folder: Path, texts: dict[str, str]) -> bool:
    """Write {name: text} as files of `folder`, each renamed into place, unless all are there already.

    Returns whether anything was written.
    """
    if all(_holds(folder / name, text) for name, text in texts.items()):
        return False
    with staging(folder / "texts") as work:
        for name, text in texts.items():
            (work / name).write_text(text, encoding="utf-8")
        for name in texts:
            (work / name).replace(folder / name)
    return True


def _holds(file: Path, text: str) -> bool:
    try:
        return file.read_bytes() == text.encode()
    except OSError:
        return False


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`. What is left in it at the end of the block is removed.

    A UserError of the block names `target`, which the user knows, and not the temporary folder.
    """
    folder = Path(tempfile.mkdtemp(prefix=".tmp-", dir=target.parent))
    try:
        with naming(folder, target):
            yield folder
    except OSError as error:
        if error.filename is None:  # a failed write names no file; `target` at least tells the disk
            error.filename = str(target)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replace(source: Path, target: Path) -> None:
    """Put folder `source` in the place of `target` by renaming, after everything in it has reached the disk.

    A kill between the two renames leaves no `target`, and an error there leaves the old one. At no moment is there a
    mixture of old and new files.
    """
    for path in source.rglob("*"):
        _fsync(path)
    _fsync(source)
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=".tmp-", dir=target.parent))
        try:
            target.rename(old / "old")
            source.rename(target)
        finally:
            if not target.exists():
                (old / "old").rename(target)
            shutil.rmtree(old, ignore_errors=True)
    else:
        source.rename(target)
    _fsync(target.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
