"""Large pages: memory that can fill them moves there, and nothing but speed depends on it."""

from __future__ import annotations

import mmap
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from cuantiza.core.machine.process import isolated
from cuantiza.core.run.large_pages import use_large_pages
from cuantiza.core.run.runtime import Options, Runtime
from cuantiza.core.store.artifact import Artifact

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def in_large_pages() -> int:
    """Bytes of this process that are in large pages."""
    return 1024 * int(re.search(r"AnonHugePages:\s+(\d+)", Path("/proc/self/smaps_rollup").read_text())[1])


def filled(size: int) -> tuple[int, int, int, bytes]:
    """(bytes in large pages before, after, bytes reported as moved, content), measured in a process of its own."""
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.write(bytes(range(256)) * (size // 256))
    before = in_large_pages()
    moved = use_large_pages()
    return before, in_large_pages(), moved, block[:1000] + block[-1000:]


@linux
def test_what_fills_large_pages_moves_there():
    size = 64 * 2**20
    before, after, moved, content = isolated(filled, size)
    if not moved:
        pytest.skip("this kernel has no MADV_COLLAPSE")
    assert after - before >= size - 2 * 2**21 and moved >= size - 2 * 2**21
    pattern = bytes(range(256)) * 8
    assert content == pattern[:1000] + pattern[-1000:]


def logits(model: Path, large_pages: bool) -> np.ndarray:
    return Runtime(model, 1, options=Options(large_pages=large_pages)).forward(np.arange(1, 65)[None])


def test_logits_do_not_depend_on_it(es_mini_fp32: Artifact):
    with_it, without = (isolated(logits, es_mini_fp32.model, large) for large in (True, False))
    assert np.array_equal(with_it, without)


def test_a_system_without_them_is_as_it_was(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert use_large_pages() == 0
