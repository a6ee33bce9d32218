"""Our functions in child processes: whatever goes wrong in one is one line, and nothing else is printed."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cuantiza.core.errors import TRACEBACK, UserError
from cuantiza.core.machine.process import ChildError, Remote, isolated

from helpers import ROOT


class Odd(Exception):
    """An exception that cannot be made again from its message alone."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} is not {two}")


class Panic(BaseException):
    """As a library in Rust raises it."""


def fail(kind: str) -> None:
    """Go wrong in the way `kind`; a library says something on standard error first, as ONNX Runtime does."""
    os.write(2, b"\x1b[1;31m2026 [E:onnxruntime:, session.cc:1] a coloured line\x1b[m\n")
    if kind == "KeyError":
        {}["n_embd"]
    if kind == "two lines":
        raise ValueError("the first line\n   the second line")
    if kind == "no message":
        raise AssertionError
    if kind == "Odd":
        raise Odd(1, 2)
    if kind == "Panic":
        raise Panic("index out of bounds")
    if (
        kind == "EOFError"
    ):  # what unpickling half a file raises; the pipe to the parent raises the same when that is gone
        raise EOFError("Ran out of input")
    if kind == "OSError":
        raise OSError("no file of that name on the hub")
    if kind == "MemoryError":
        raise MemoryError("Unable to allocate 9 TiB")
    if kind == "exit":
        sys.exit("it is all over")
    if kind == "abort":
        os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n\n")
        ctypes.CDLL(None).abort()
    if kind == "segmentation fault":
        ctypes.string_at(0)


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("KeyError", f"int8-static: KeyError: 'n_embd'; {TRACEBACK}=1 shows where"),
        ("two lines", f"int8-static: ValueError: the first line the second line; {TRACEBACK}=1 shows where"),
        ("no message", f"int8-static: AssertionError; {TRACEBACK}=1 shows where"),
        ("Odd", f"int8-static: Odd: 1 is not 2; {TRACEBACK}=1 shows where"),
        ("Panic", f"int8-static: Panic: index out of bounds; {TRACEBACK}=1 shows where"),
        ("EOFError", f"int8-static: EOFError: Ran out of input; {TRACEBACK}=1 shows where"),
        ("OSError", f"int8-static: OSError: no file of that name on the hub; {TRACEBACK}=1 shows where"),
        ("exit", f"int8-static: SystemExit: it is all over; {TRACEBACK}=1 shows where"),
        (
            "MemoryError",
            "int8-static: there is not enough memory (Unable to allocate 9 TiB); close other programs, or take a "
            "smaller model",
        ),
        ("abort", "int8-static: its process died with exit code -6: what():  std::bad_alloc"),
        ("segmentation fault", "int8-static: its process died with exit code -11: 2026 [E:onnxruntime:, session.cc:1] a coloured line"),
    ],
)  # fmt: skip
def test_what_goes_wrong_in_a_child_is_one_line(kind: str, line: str, capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(ChildError) as raised:
        isolated(fail, kind, label="int8-static")
    assert str(raised.value) == line and raised.value.label == "int8-static"
    assert capfd.readouterr().err == "", "the child prints nothing of its own"


def test_a_traceback_is_there_for_who_asks(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    monkeypatch.setenv(TRACEBACK, "1")
    with pytest.raises(ChildError, match="KeyError: 'n_embd'"):
        isolated(fail, "KeyError")
    shown = capfd.readouterr().err
    assert "Traceback" in shown and '{}["n_embd"]' in shown and "a coloured line" in shown


def mendable(kind: str) -> None:
    if kind == "full disk":
        raise OSError(errno.ENOSPC, "No space left on device", "/there")
    if kind == "package":
        raise ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn")
    raise UserError("config.json: n_layer is not a number")


def test_what_has_a_line_already_keeps_it() -> None:
    with pytest.raises(OSError, match="No space left") as full:
        isolated(mendable, "full disk")
    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, "/there")
    with pytest.raises(ModuleNotFoundError) as missing:
        isolated(mendable, "package")
    assert missing.value.name == "torch.nn"
    with pytest.raises(ChildError, match=r"^config.json: n_layer is not a number$") as told:
        isolated(mendable, "", label="export")
    assert told.value.label == "export"


def lambda_of() -> Callable[[], int]:
    return lambda: 1


def test_a_result_that_cannot_be_sent_is_one_line_too() -> None:
    with pytest.raises(ChildError, match=r"^lambda_of: .*pickle"):
        isolated(lambda_of)


class Counter:
    def __init__(self, start: int) -> None:
        self.count = start

    def add(self, more: int) -> int:
        self.count += more
        print("said by Python", file=sys.stderr)
        os.write(2, b"x" * 1_000_000)  # more than a pipe would hold
        return self.count


def test_an_object_lives_on_between_calls(capfd: pytest.CaptureFixture) -> None:
    with Remote(Counter, 1, label="counter") as remote:
        assert [remote.call("add", 1), remote.call("add", 5)] == [2, 7]
        with pytest.raises(ChildError, match=r"^counter: TypeError: "):
            remote.call("add", "text")
    assert capfd.readouterr().err == "said by Python\n" * 2


def test_an_import_that_fails_in_the_child_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_here.py").write_text(
        "import os\nif os.environ.get('CHILD'): import no_such_module\ndef f(): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import only_here  # type: ignore[import-not-found]

    monkeypatch.setenv("CHILD", "1")
    with pytest.raises(ChildError, match=r"^f: ModuleNotFoundError: No module named 'no_such_module'"):
        isolated(only_here.f)


class Arrays:
    """Gives arrays, and lets the same one change after it was given."""

    def __init__(self) -> None:
        self._large = np.arange(2**20, dtype=np.float32).reshape(4, -1)

    def give(self) -> dict:
        return {
            "large": self._large,
            "part": self._large[1:],
            "turned": self._large.T,
            "small": np.arange(3),
            "text": "ñ",
        }

    def change(self) -> np.ndarray:
        self._large += 1
        return self._large

    def empty(self) -> list[np.ndarray]:
        return [np.zeros((0, 5)), np.zeros((300, 1000), np.int8), np.zeros((3, 10**6), np.int8)[:, ::2]]


@pytest.mark.parametrize("shared", [True, False])
def test_arrays_come_whole_and_are_the_callers_own(shared: bool) -> None:
    wanted = np.arange(2**20, dtype=np.float32).reshape(4, -1)
    with Remote(Arrays if shared else without_memfd, label="arrays") as remote:
        given = remote.call("give")
        assert given["text"] == "ñ" and given["small"].tolist() == [0, 1, 2]
        for name, array in (("large", wanted), ("part", wanted[1:]), ("turned", wanted.T)):
            assert given[name].dtype == np.float32 and np.array_equal(given[name], array)
            given[name][:] = -1  # the child's own array stays as it is
        changed = remote.call("change")
        assert np.array_equal(changed, wanted + 1)
        assert np.array_equal(remote.call("change"), wanted + 2) and np.array_equal(changed, wanted + 1)
        assert [array.shape for array in remote.call("empty")] == [(0, 5), (300, 1000), (3, 500_000)]
    assert np.array_equal(changed, wanted + 1)  # longer than the child lives


def without_memfd() -> Arrays:
    """As on a system that has no anonymous files."""
    del os.memfd_create
    return Arrays()


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no anonymous files")
def test_shared_memory_is_given_back() -> None:
    def held() -> tuple[int, int]:
        maps = sum(b"memfd:cuantiza" in line for line in Path("/proc/self/maps").read_bytes().splitlines())
        return maps, len(list(Path("/proc/self/fd").iterdir()))

    with Remote(Arrays, label="arrays") as remote:
        before = held()
        kept = [remote.call("change") for _ in range(3)]
        assert held()[0] == 3
        del kept
        assert held() == before and before[0] == 0


STARTED_WHILE_IGNORED = """
import signal, sys
sys.path.insert(0, sys.argv[1])
from cuantiza.core.machine.process import isolated
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(isolated(len, "four"))
"""


def test_a_child_that_ignores_signals_is_ended():
    done = subprocess.run(
        [sys.executable, "-c", STARTED_WHILE_IGNORED, ROOT], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "4\n"), done.stderr
