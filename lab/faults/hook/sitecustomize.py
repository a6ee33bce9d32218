"""Counts the changes that every Python process of a run makes below its output folders, and strikes at one of them.

Python loads this file at its start if PYTHONPATH names its folder. It does nothing unless the variable TORTURE holds a
`lab.faults.laboratory.Trap` as JSON. The pipeline's code is not changed: an audit hook sees each file opened for
writing, each new folder, rename and removal before it happens. At the chosen change it sends a real signal, or really
fills the disk. So a moment between two system calls can be repeated.
"""

import fcntl
import itertools
import json
import os
import sys
import threading
import time

RECORD = 256  # bytes per line of the log, so the log's size divided by this is the number of changes so far
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# Audit event -> positions of (path, directory descriptor) among its arguments.
_CHANGES = {
    "os.mkdir": (0, 2),
    "os.remove": (0, 1),
    "os.rmdir": (0, 1),
    "os.rename": (1, 3),
    "os.chmod": (0, 2),
}


def _install(trap: dict) -> None:
    busy = threading.local()

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            path, _, flags = args
            if not (isinstance(flags, int) and flags & _WRITES):
                return
            directory = -1
        elif event in _CHANGES:
            path, directory = (args[index] for index in _CHANGES[event])
        else:
            return
        if not isinstance(path, str | os.PathLike) or getattr(busy, "here", False):
            return
        busy.here = True
        try:
            place = _absolute(os.fspath(path), directory)
            if any(place == root or place.startswith(root + "/") for root in trap["roots"]):
                number = _log(trap["log"], event, place)
                if number == trap["at"]:
                    _strike(trap)
        finally:
            busy.here = False

    sys.addaudithook(hook)


def _absolute(path: str, directory: object) -> str:
    if isinstance(directory, int) and directory >= 0:
        return os.path.join(os.readlink(f"/proc/self/fd/{directory}"), path)  # noqa: PTH115, PTH118
    return os.path.abspath(path)  # noqa: PTH100


def _log(log: str, event: str, place: str) -> int:
    """Add a line to the log and return the number of this change, counted from 0 over all processes."""
    handle = os.open(log, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        number = os.fstat(handle).st_size // RECORD
        line = f"{time.time():.6f} {event} {place}".encode()[: RECORD - 1]
        os.write(handle, line.ljust(RECORD - 1) + b"\n")
        return number
    finally:
        os.close(handle)


def _strike(trap: dict) -> None:
    if trap["fill"]:
        (_fill_inodes if trap["fill"] == "inodes" else _fill)(trap["disk"], trap["slack"])
    elif trap["delay_s"]:
        threading.Timer(trap["delay_s"], _signal, [trap]).start()
    else:
        _signal(trap)


def _signal(trap: dict) -> None:
    # The run's first process leads the group, so the group's id is that process's id.
    (os.killpg if trap["group"] else os.kill)(os.getpgrp(), trap["signal"])


def _fill(disk: str, slack: int) -> None:
    """Use up all free bytes of `disk`, then give back `slack` of them."""
    handle = os.open(f"{disk}/filler", os.O_WRONLY | os.O_CREAT)
    try:
        for block in (1 << 20, 1 << 12):
            try:
                while True:
                    os.write(handle, bytes(block))
            except OSError:
                pass
        os.ftruncate(handle, max(0, os.fstat(handle).st_size - slack))
    finally:
        os.close(handle)


def _fill_inodes(disk: str, slack: int) -> None:
    """Use up all inodes of `disk`, then give back `slack` of them."""
    folder = f"{disk}/inodes"
    made = []
    try:
        os.mkdir(folder)  # noqa: PTH102
        for number in itertools.count():
            os.close(os.open(f"{folder}/{number}", os.O_WRONLY | os.O_CREAT))
            made.append(f"{folder}/{number}")
    except OSError:
        pass
    for name in made[:slack]:
        os.unlink(name)  # noqa: PTH108


if "TORTURE" in os.environ:
    _install(json.loads(os.environ["TORTURE"]))
