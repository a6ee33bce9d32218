"""Long work is never silent in a log: lines on a pipe, also while one item or a child process takes long."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from helpers import ROOT

PROLOGUE = """
import sys, threading, time
sys.path.insert(0, {root!r})
from cuantiza.core.machine.process import isolated
from cuantiza.core.machine.progress import report, track, working
"""


def said(code: str, folder: Path, status: int = 0) -> list[str]:
    """What a program that runs `code` prints to standard error, a pipe, line by line."""
    program = folder / "program.py"
    program.write_text(PROLOGUE.format(root=str(ROOT)) + code, encoding="utf-8")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60)
    assert done.returncode == status and not done.stdout, done.stderr
    return done.stderr.splitlines()


def test_many_items_say_how_far_and_what_is_left(tmp_path: Path) -> None:
    *lines, last = said("for _ in track(range(12), 'work', 12, every=0.3): time.sleep(0.1)", tmp_path)
    assert lines and all(re.fullmatch(r"work: \d+ of 12, about \d+ s left", line) for line in lines), lines
    done = [int(line.split()[1]) for line in lines]
    assert done == sorted(done) and done[0] > 0 and done[-1] < 12
    assert re.fullmatch(r"work: 12 in \d+\.\d s", last)


def test_lines_of_two_threads_stay_whole(tmp_path: Path) -> None:
    code = """
sys.setswitchinterval(1e-6)
def many(letter):
    for _ in range(3000): report(letter * 20)
threads = [threading.Thread(target=many, args=(letter,)) for letter in "ab"]
for thread in threads: thread.start()
for thread in threads: thread.join()"""
    lines = said(code, tmp_path)
    assert sorted(lines) == ["a" * 20] * 3000 + ["b" * 20] * 3000


def test_one_item_that_takes_long_says_so(tmp_path: Path) -> None:
    # Not a whole number of 0.2 s, or a line might be due at the very end, and come after the last one.
    lines = said("for _ in track([1], 'work', 1, every=0.2): time.sleep(1.1)", tmp_path)
    assert len(lines) > 2 and all(re.fullmatch(r"work: 0 of 1, \d s so far", line) for line in lines[:-1]), lines


def test_work_without_a_count(tmp_path: Path) -> None:
    lines = said("with working('export', every=0.2): time.sleep(1)", tmp_path)
    assert len(lines) > 1 and all(re.fullmatch(r"export: \d s so far", line) for line in lines), lines


def test_work_inside_work_is_one_line(tmp_path: Path) -> None:
    code = """
with working("outer", every=0.2):
    for _ in track([1], "inner", 1, every=0.2):
        time.sleep(1.1)
"""
    *lines, last = said(code, tmp_path)
    assert last.startswith("inner: 1 in ") and len(lines) in range(1, 7)
    assert all(re.fullmatch(r"outer: \d s so far; inner: 0 of 1, \d s so far", line) for line in lines), lines


def test_a_line_that_was_printed_anyway_counts(tmp_path: Path) -> None:
    code = """
with working("work", every=3):
    for number in range(40):
        report(str(number))
        time.sleep(0.1)
"""
    assert said(code, tmp_path) == [str(number) for number in range(40)]


def test_quick_work_prints_its_last_line_alone(tmp_path: Path) -> None:
    lines = said("with working('whole'): list(track(range(3), 'work', 3))", tmp_path)
    assert len(lines) == 1 and lines[0].startswith("work: 3 in ")


def test_nothing_is_left_after_the_block(tmp_path: Path) -> None:
    """Neither after an error nor where a loop is broken off: no line, no thread."""
    code = """
def fails():
    with working("fails", every=0.1):
        raise ValueError
def breaks():
    for _ in track(range(9), "breaks", 9, every=0.1):
        break
for work in (fails, breaks):
    try:
        work()
    except ValueError:
        pass
report("end")
deadline = time.monotonic() + 30
while threading.active_count() > 1 and time.monotonic() < deadline:
    time.sleep(0.01)
report(str(threading.active_count()))
"""
    lines = said(code, tmp_path)
    assert lines[lines.index("end") :] == ["end", "1"]


def test_work_that_is_never_finished_does_not_keep_the_process(tmp_path: Path) -> None:
    assert said("kept = track(range(9), 'work', 9, every=30); next(kept); sys.exit(3)", tmp_path, status=3) == []


def test_work_in_a_child_process_shows(tmp_path: Path) -> None:
    code = """
def slow():
    with working("calibrate", every=0.2):
        time.sleep(1)
if __name__ == "__main__":
    isolated(slow, label="quantize")
"""
    lines = said(code, tmp_path)
    assert lines and all(re.fullmatch(r"quantize: \d s so far; calibrate: \d s so far", line) for line in lines), lines
