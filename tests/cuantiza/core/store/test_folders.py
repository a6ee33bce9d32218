"""Output folders: one process at a time holds one, and a folder with foreign files is refused."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cuantiza.core.errors import UserError
from cuantiza.core.store import folders
from cuantiza.core.store.folders import LOCK, held, locked, replace, staging

from helpers import ROOT


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


HOLD = (
    "import sys\nfrom pathlib import Path\nfrom cuantiza.core.store.folders import locked\n"
    "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.readline()\n"
)


def hold(folder: Path) -> subprocess.Popen:
    """Start a process that takes the lock, prints that it has it, and keeps it until it gets a line on standard input."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, folder],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("end", ["released", "killed"])
def test_lock_waits_for_another_process(tmp_path: Path, end: str) -> None:
    folder = tmp_path / "modelo"
    first = hold(folder)
    assert first.stdout.readline() == "held\n"
    with first, hold(folder) as second:
        assert "waiting for another run" in second.stderr.readline()
        (folder / ".tmp-mine").mkdir()
        time.sleep(0.2)
        assert second.poll() is None and (folder / ".tmp-mine").is_dir()  # the waiting process removes nothing
        if end == "killed":
            first.kill()
        else:
            first.stdin.write("\n")
            first.stdin.flush()
        assert second.stdout.readline() == "held\n"
        assert names(folder) == {".cuantiza.lock"}  # also where the first removed the folder, which it had made
        with hold(folder) as third:
            assert "waiting for another run" in third.stderr.readline()
            second.communicate("\n")
            assert second.returncode == 0
            assert third.stdout.readline() == "held\n"
            third.communicate("\n")


def test_lock_is_released_by_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "modelo"
    with pytest.raises(UserError), locked(folder):
        (folder / "fp32").mkdir()
        raise UserError("bad")
    with hold(folder) as other:
        assert other.stdout.readline() == "held\n"
        other.communicate("\n")


def test_nobody_waits_for_itself(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "modelo")
    with locked(tmp_path / "modelo"):
        with pytest.raises(UserError, match="is read by this very command"), locked(tmp_path / "link"):
            pass
        with locked(tmp_path / "other"):
            pass
    with locked(tmp_path / "modelo"):
        pass


def test_a_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "none")
    for folder in (tmp_path / "link", tmp_path / "link" / "modelo"):
        with pytest.raises(UserError, match=r"link: is a link to nothing.*OUT="), locked(folder):
            pass
    (tmp_path / "none").mkdir()
    with locked(tmp_path / "link"):
        assert names(tmp_path / "none") == {".cuantiza.lock"}


def test_folders_that_were_made_for_nothing_are_removed(tmp_path: Path) -> None:
    with pytest.raises(UserError), locked(tmp_path / "out" / "artifacts" / "modelo"):
        raise UserError("bad")
    assert not names(tmp_path)
    made, empty, used = tmp_path / "made", tmp_path / "empty", tmp_path / "used"
    empty.mkdir()
    for folder in (made, empty, used):
        with pytest.raises(UserError), locked(folder):
            if folder is used:
                (folder / "fp32").mkdir()
            raise UserError("bad")
    assert names(tmp_path) == {"empty", "used"}
    assert names(empty) == {".cuantiza.lock"} and names(used) == {".cuantiza.lock", "fp32"}


def test_other_folders_are_not_locked(tmp_path: Path) -> None:
    with locked(tmp_path / "a"), hold(tmp_path / "b") as other:
        assert other.stdout.readline() == "held\n"
        other.communicate("\n")


def test_foreign_folder(tmp_path: Path) -> None:
    folder = tmp_path / "tesis"
    (folder / "capítulos").mkdir(parents=True)
    (folder / ".tmp-notes").mkdir()
    with pytest.raises(UserError, match=r"tesis: holds files that are not ours.*OUT="), locked(folder):
        pass
    assert names(folder) == {"capítulos", ".tmp-notes"}
    shutil.rmtree(folder / "capítulos")
    shutil.rmtree(folder / ".tmp-notes")
    with locked(folder):  # an empty folder may be used
        assert names(folder) == {".cuantiza.lock"}


def test_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "modelo"):
        with pytest.raises(UserError, match=r"file: is a file.*OUT="), locked(folder):
            pass


def test_an_error_names_the_target_and_not_the_temporary_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised, staging(tmp_path / "int8") as work:
        raise UserError(f"{work}/model.onnx: ONNX Runtime cannot load it ({work}/model.onnx.data)")
    assert (
        str(raised.value)
        == f"{tmp_path}/int8/model.onnx: ONNX Runtime cannot load it ({tmp_path}/int8/model.onnx.data)"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, "no locks here")

    monkeypatch.setattr(folders.fcntl, "flock", refuse)
    with locked(tmp_path / "modelo"), staging(tmp_path / "modelo" / "fp32") as work:
        assert work.is_dir()
    assert "no locks" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_of_a_folder_that_cannot_be_written_to_the_lock_is_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Another user's folder, or a read-only mount. Tests may have the rights to write anywhere, so the answer is given here."""
    with locked(tmp_path / "modelo"), staging(tmp_path / "modelo" / "fp32") as work:
        (work / "model.onnx").touch()
        replace(work, tmp_path / "modelo" / "fp32")
    lock = tmp_path / "modelo" / LOCK
    with held(tmp_path / "modelo"), lock.open("rb") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    whole = Path.open

    def refuse(self: Path, mode: str = "r", *args: object, **options: object) -> object:
        if mode == "ab":
            raise OSError(number, os.strerror(number), str(self))
        return whole(self, mode, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with held(tmp_path / "modelo"), lock.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        with pytest.raises(BlockingIOError):  # but no stage may write meanwhile
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
