"""Pickles that go from one process to another, with their large arrays in shared memory instead of the pipe.

A pipe takes 64 KiB at a time, and each array would be copied five times on its way. The logits of 512 tokens of GPT-2 are
100 MB: that took longer than to score them. Where the system has no anonymous files (macOS) or allows none, all goes
through the pipe.
"""

from __future__ import annotations

import mmap
import os
import pickle
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

_LEAST_BYTES = 2**20  # a smaller array goes through the pipe


@dataclass(frozen=True)
class Message:
    """A pickled value; arrays of `sizes` bytes that the pickle leaves out are in the open `file`."""

    pickled: bytes
    sizes: tuple[int, ...] = ()
    file: int | None = None


def pack(value: Any) -> Message:
    """Pickle `value`, and write its large arrays to shared memory, which `send` hands over."""
    arrays: list[memoryview] = []

    def is_small(buffer: pickle.PickleBuffer) -> bool:
        if (raw := buffer.raw()).nbytes < _LEAST_BYTES:
            return True
        arrays.append(raw)
        return False

    if hasattr(os, "memfd_create"):
        pickled = pickle.dumps(value, protocol=5, buffer_callback=is_small)
        if not arrays:
            return Message(pickled)
        with suppress(OSError):
            return Message(pickled, tuple(array.nbytes for array in arrays), _written(arrays))
    return Message(pickle.dumps(value, protocol=5))


def send(there: Connection, message: Message) -> None:
    """Send `message`; `receive` at the other end returns its value."""
    try:
        there.send_bytes(pickle.dumps((message.pickled, message.sizes)))
        if message.file is not None:
            reduction.send_handle(there, message.file, os.getppid())
    finally:
        if message.file is not None:
            os.close(message.file)


def receive(here: Connection) -> Any:
    """Return the value that was sent. Its arrays belong to this process alone, which may write to them.

    Raises EOFError or ConnectionResetError where the other end is closed.
    """
    pickled, sizes = pickle.loads(here.recv_bytes())
    if not sizes:
        return pickle.loads(pickled)
    file = reduction.recv_handle(here)
    try:
        places = _places(sizes)
        # A private map: what is written to it stays in this process. It is unmapped when the last array is gone.
        whole = memoryview(mmap.mmap(file, places[-1][1], access=mmap.ACCESS_COPY))
    finally:
        os.close(file)
    return pickle.loads(pickled, buffers=[whole[start:end] for start, end in places])


def _written(arrays: list[memoryview]) -> int:
    """An open file in memory that holds `arrays`."""
    file = os.memfd_create("cuantiza")
    try:
        for array, (start, end) in zip(arrays, _places([array.nbytes for array in arrays]), strict=True):
            while start < end:  # the kernel takes 2 GB at a time
                start += os.pwrite(file, array[start - end :], start)
    except BaseException:
        os.close(file)
        raise
    return file


def _places(sizes: list[int] | tuple[int, ...]) -> list[tuple[int, int]]:
    """Where arrays of `sizes` bytes begin and end in a file; each begins on a page."""
    places, end = [], 0
    for size in sizes:
        start = -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
        end = start + size
        places.append((start, end))
    return places
