"""Programs in other interpreters: one reason for each failure, and nothing of them is left."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from cuantiza.core.machine.child import Failed, run

from helpers import ROOT


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_the_answer_is_standard_output_in_the_given_place(tmp_path: Path) -> None:
    code = "import os, sys; print(os.getcwd(), os.environ['ONE'], repr(sys.stdin.read())); sys.stderr.write('noise')"
    assert run(python(code), cwd=tmp_path, environment={"ONE": "1"}) == f"{tmp_path} 1 ''\n"


def test_a_child_that_fails_hangs_or_dies_gives_one_reason(tmp_path: Path) -> None:
    with pytest.raises(Failed, match=r"^second: line$"):
        run(python("import sys; sys.exit('first\\nsecond: line\\n')"), timeout=60)
    with pytest.raises(Failed, match=r"^first$"):
        run(python("import sys; sys.exit('error: first\\nwarning: second\\n')"), noise="warning:")
    with pytest.raises(Failed, match=r"^ended with status 3$"):
        run(python("import sys; sys.exit(3)"))
    with pytest.raises(Failed, match=r"^died of SIGKILL: most often a lack of memory$"):
        run(python("import os; os.kill(os.getpid(), 9)"), timeout=60)
    with pytest.raises(Failed, match=r"^gave no answer in 1 s$"):
        run(["sh", "-c", f"sleep 600 & echo $! > {tmp_path}/pid; wait"], timeout=1)
    assert_gone(int((tmp_path / "pid").read_text()))


def test_ctrl_c_lets_the_child_clean_up(tmp_path: Path) -> None:
    """The child removes its files, as a stage does, and what it started ends too."""
    child = f"""
import os, signal, subprocess, sys, time
from pathlib import Path
mark = Path({str(tmp_path / "mark")!r})
try:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    subprocess.Popen(["sleep", "600"])
    mark.touch()
    time.sleep(600)
finally:
    mark.unlink()
"""
    code = f"""
import sys
from cuantiza.core.machine.child import run
try:
    run([sys.executable, "-c", {child!r}])
except KeyboardInterrupt:
    print("interrupted")
"""
    with subprocess.Popen(python(code), cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        while not (tmp_path / "mark").exists():
            time.sleep(0.05)
        parent.send_signal(2)
        assert parent.communicate(timeout=60)[0] == "interrupted\n"
    assert not (tmp_path / "mark").exists()


def test_it_runs_where_only_the_standard_library_is() -> None:
    modules = "cuantiza.core.machine.child, cuantiza.core.machine.hardware, cuantiza.core.errors"
    code = f"import sys; sys.path.insert(0, '.'); import {modules}"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def assert_gone(pid: int) -> None:
    """Within ten seconds there is no such process, or nobody has asked for its status yet."""
    status = Path(f"/proc/{pid}/status")
    deadline = time.monotonic() + 10
    while status.exists() and "(zombie)" not in status.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not status.exists() or "(zombie)" in status.read_text()
