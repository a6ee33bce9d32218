"""The sha256 of a file: what has not changed is not read again, and whatever has changed is noticed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from cuantiza.core.store import cache, unchanged
from cuantiza.core.store.digests import sha256_file
from cuantiza.core.store.unchanged import has_sha256


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A cache of this test, and the files that were read, in order."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "caches"))
    files: list[Path] = []

    def counted(path: Path) -> str:
        files.append(path)
        return sha256_file(path)

    monkeypatch.setattr(unchanged, "sha256_file", counted)
    return files


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A large file that was written a while ago."""
    path = tmp_path / "model.onnx"
    path.write_bytes(os.urandom(1 << 20))
    time.sleep(2.1)  # longer than the clock of any file system takes to tick
    return path


def test_it_is_read_once(file: Path, read: list[Path]) -> None:
    right = sha256_file(file)
    assert has_sha256(file, right) and has_sha256(file, right) and read == [file]
    assert not has_sha256(file, "0" * 64)  # what is not as expected is read, not believed
    assert len(read) == 2


def test_a_change_is_noticed(file: Path, read: list[Path]) -> None:
    """Also one that keeps the size and sets the time of the last change back."""
    right, times = sha256_file(file), file.stat()
    assert has_sha256(file, right)
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not has_sha256(file, right)
    data[1000] ^= 1
    file.write_bytes(data)
    assert has_sha256(file, right)


def test_a_file_in_its_place_is_noticed(file: Path, read: list[Path]) -> None:
    right, times = sha256_file(file), file.stat()
    assert has_sha256(file, right)
    other = file.with_name("other")
    other.write_bytes(os.urandom(1 << 20))
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(file)
    assert not has_sha256(file, right)


def test_it_is_read_again_the_next_day(file: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    right, now = sha256_file(file), time.time()
    for elapsed, count in ((0, 1), (23 * 3600, 1), (25 * 3600, 2), (0, 3)):  # the last: the clock was set back
        monkeypatch.setattr(unchanged.time, "time", lambda elapsed=elapsed: now + elapsed)
        assert has_sha256(file, right) and len(read) == count


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path: Path, read: list[Path]) -> None:
    """It may change once more within the same tick of the clock."""
    path = tmp_path / "new"
    path.write_bytes(bytes(1 << 20))
    os.utime(path, ns=(time.time_ns(), time.time_ns() + 10**9))
    right = sha256_file(path)
    assert has_sha256(path, right) and has_sha256(path, right) and len(read) == 2


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b'{"x": 1}', b"\xff\xfe", b"[" * 100_000],
    ids=["empty", "cut", "list", "other", "bytes", "deep"],
)
def test_what_is_remembered_may_be_damaged(file: Path, read: list[Path], damage: bytes) -> None:
    right = sha256_file(file)
    assert has_sha256(file, right)
    memory = cache.cache_folder() / "digests.json"
    memory.write_bytes(damage)
    assert has_sha256(file, right) and len(read) == 2
    assert json.loads(memory.read_text())[str(file)]["sha256"] == right
    # A wrong line is not believed either.
    memory.write_text(memory.read_text().replace(right, "0" * 64))
    assert has_sha256(file, right) and not has_sha256(file, "1" * 64)


def test_it_does_not_grow_without_end(file: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unchanged, "_MOST", 3)
    for name in "abcde":
        copy = file.with_name(name)
        os.link(file, copy)
    time.sleep(0.1)  # a new link changes the inode's time
    for name in "abcde":
        assert has_sha256(file.with_name(name), sha256_file(file))
    kept = json.loads((cache.cache_folder() / "digests.json").read_text())
    assert [Path(path).name for path in kept] == ["c", "d", "e"]
