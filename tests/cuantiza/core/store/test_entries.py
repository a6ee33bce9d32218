"""The user's cache folder: whose it has to be, that entries are there whole or not at all, and its bound."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cuantiza.core.store import entries
from cuantiza.core.store.user_cache import VARIABLE, user_cache

from helpers import ROOT

posix = pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder of this test, made."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "caches"))
    found = user_cache()
    assert found == tmp_path / "caches" / "cuantiza" and found.is_dir()
    return found


def add(folder: Path, name: str, size: int) -> Path:
    """Publish an entry with one file of `size` bytes."""
    entry = folder / "packed" / name
    with entries.making(folder) as work:
        assert work is not None
        (work / "weights.bin").write_bytes(bytes(size))
        entries.publish(work, entry)
    return entry


def test_where_the_system_has_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", "a/relative/one")  # is to be ignored
        assert user_cache() == tmp_path / ".cache" / "cuantiza"
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert user_cache() == tmp_path / "xdg" / "cuantiza"
    elif sys.platform == "darwin":
        assert user_cache() == tmp_path / "Library" / "Caches" / "cuantiza"


@pytest.mark.parametrize("off", ["off", "OFF", " off "])
def test_switched_off(off: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(VARIABLE, off)
    with pytest.raises(RuntimeError):
        user_cache()
    assert not list(tmp_path.iterdir())


@posix
def test_it_is_for_its_user_alone(folder: Path) -> None:
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    assert user_cache() == folder and folder.stat().st_mode & 0o777 == 0o700
    for open_to_others in (0o720, 0o702, 0o777):
        folder.chmod(open_to_others)
        with pytest.raises(RuntimeError):
            user_cache()


@posix
def test_it_is_no_link(folder: Path) -> None:
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")
    with pytest.raises(RuntimeError):
        user_cache()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="giving a folder away takes root")
def test_it_is_nobody_elses(folder: Path) -> None:
    os.chown(folder, 12345, -1)
    with pytest.raises(RuntimeError):
        user_cache()


def test_where_no_folder_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file"))
    with pytest.raises(OSError):
        user_cache()


def test_nobody_waits_for_a_maker_and_its_leftovers_go(folder: Path) -> None:
    """Another process makes an entry; it is killed, and the next maker removes what it left."""
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom cuantiza.core.store.entries import making\n"
        "with making(Path(sys.argv[1])) as work:\n    print(work, flush=True)\n    time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as other:
        left = Path(other.stdout.readline().strip())
        with entries.making(folder) as work:
            assert work is None and left.is_dir()
        other.kill()
    assert left.is_dir()
    with entries.making(folder) as work:
        assert work is not None and not left.exists()
    assert not list(folder.glob(".tmp-*"))


def test_an_entry_that_fails_leaves_nothing(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError), entries.making(folder) as work:
        (work / "weights.bin").write_bytes(b"half")
        raise ZeroDivisionError
    assert not list(folder.glob(".tmp-*"))


def test_those_used_longest_ago_go_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "BOUND_BYTES", 250)
    first, second = add(folder, "first", 100), add(folder, "second", 100)
    for age, entry in enumerate((second, first)):
        os.utime(entry, (age, age))
    entries.touch(second)
    third = add(folder, "third", 100)
    assert second.is_dir() and third.is_dir() and not first.exists()
    assert not add(folder, "too-large", 251).exists()
    assert not list(folder.glob(".tmp-*"))


def test_an_entry_takes_the_place_of_another(folder: Path) -> None:
    assert add(folder, "same", 100) == add(folder, "same", 7)
    assert (folder / "packed" / "same" / "weights.bin").stat().st_size == 7
    assert not list(folder.glob(".tmp-*"))
