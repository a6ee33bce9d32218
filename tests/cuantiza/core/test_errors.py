"""SIGINT and SIGTERM at any moment, and a file that is too large: the exit status, and no traceback."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import ROOT, assert_nothing_published, assert_user_error, stage

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals as Linux has them")

CTRL_C = """
import numpy, os, signal, sys, threading, time
sys.path.insert(0, sys.argv[1])
from cuantiza.core.errors import run
from cuantiza.core.machine.process import isolated
def main():
    threading.Timer(float(sys.argv[2]), os.killpg, [0, signal.SIGINT]).start()
    isolated(time.sleep, 60)
if __name__ == "__main__":
    run(main)
"""


@pytest.mark.parametrize("delay_s", [0, 0.03, 0.1, 0.2, 0.4])
def test_ctrl_c_while_a_child_starts(tmp_path: Path, delay_s: float) -> None:
    """Ctrl-C also reaches the child while it imports its modules; the child prints nothing about it."""
    (tmp_path / "program.py").write_text(CTRL_C)
    command = [sys.executable, tmp_path / "program.py", ROOT, str(delay_s)]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    assert (done.returncode, done.stderr) == (130, "")


IN_THE_START = """
import os, signal, sys, threading, time
from multiprocessing import util
sys.path.insert(0, sys.argv[1])
from cuantiza.core.errors import run
from cuantiza.core.machine.process import isolated
other = threading.Thread(target=time.sleep, args=[600], daemon=True)
spawn = util.spawnv_passfds
def spawn_and_signal(*args):
    pid = spawn(*args)
    signal.pthread_kill(other.ident, int(sys.argv[2]))
    time.sleep(0.1)
    return pid
def main():
    other.start()
    from multiprocessing import resource_tracker
    resource_tracker.ensure_running()
    util.spawnv_passfds = spawn_and_signal
    isolated(time.sleep, 60)
run(main)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_the_child_knows_what_to_do(number: int, status: int) -> None:
    """Another thread takes the signal, between the child's start and what it is told; so blocking it does not help."""
    command = [sys.executable, "-c", IN_THE_START, ROOT, str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    assert (done.returncode, done.stderr) == (status, "")


@pytest.mark.parametrize("name", ["export", "quantize"])
@pytest.mark.parametrize("delay_s", [0.1, 0.2])
def test_ctrl_c_while_a_stage_loads_its_modules(tmp_path: Path, name: str, delay_s: float) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", name, "--output", tmp_path], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as run:
        time.sleep(delay_s)
        run.send_signal(signal.SIGINT)
        said = run.communicate()[1]
    # The signal may come during the interpreter's own start; that traceback names no file of ours.
    assert run.returncode in (130, -signal.SIGINT, 1, 2) and str(ROOT / name) not in said


SECOND_SIGNAL = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from cuantiza.core.errors import run
def main():
    try:
        os.kill(os.getpid(), int(sys.argv[2]))
        time.sleep(60)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        time.sleep(0.1)
        print("cleaned")
run(main)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_does_not_break_off_the_cleaning(number: int, status: int) -> None:
    done = subprocess.run([sys.executable, "-c", SECOND_SIGNAL, ROOT, str(int(number))], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, "cleaned\n", "")


SWALLOWED = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from cuantiza.core.errors import run
from cuantiza.core.machine.process import isolated
def main():
    try:
        os.kill(os.getpid(), int(sys.argv[2]))
        time.sleep(60)
    except BaseException:
        pass
    print(isolated(len, "four"))
run(main)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_a_library_swallows_ends_the_run_where_it_would_begin_something(number: int, status: int) -> None:
    done = subprocess.run([sys.executable, "-c", SWALLOWED, ROOT, str(int(number))], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


AT_THE_END = """
import os, signal, sys, threading, time
sys.path.insert(0, sys.argv[1])
from cuantiza.core.errors import run
def main():
    threading.Thread(target=time.sleep, args=[1]).start()
    threading.Timer(0.3, os.kill, [os.getpid(), int(sys.argv[2])]).start()
    return 0
run(main)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_interpreter_ends_says_nothing(number: int) -> None:
    """The interpreter joins threads then, outside of our code (interrupt/36, /50 and /61 of the campaign of seed 0)."""
    done = subprocess.run([sys.executable, "-c", AT_THE_END, ROOT, str(int(number))], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-number, "")


def test_ctrl_c_is_ignored_where_it_was(tmp_path: Path) -> None:
    """A shell starts background jobs with SIGINT ignored, and that stays so."""
    command = f"{sys.executable} -c 'import sys; sys.path.insert(0, sys.argv[1]); import os, signal\n"
    command += 'from cuantiza.core.errors import run\nrun(lambda: os.kill(os.getpid(), signal.SIGINT) or 7)\' "$0"'
    done = subprocess.run(["sh", "-c", f"trap '' INT; {command}", ROOT], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (7, "")


def test_a_file_too_large(tiny_folder: Path, tmp_path: Path) -> None:
    """With `ulimit -f`, or on a file system with such a limit, the error is one line that names the artifact."""
    result = stage(
        "export",
        "--model",
        tiny_folder,
        "--output",
        tmp_path / "artifacts",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000)),
    )
    assert_user_error(result, "tiny/fp32: file too large", "ulimit -f")
    assert_nothing_published(tmp_path / "artifacts")
