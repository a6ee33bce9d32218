"""How rows are timed: processes that are stopped except in their turns, questions to a worker. No time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

import lab.bench.rounds
from cuantiza.core.machine.child import Failed
from lab.bench import child, worker
from lab.bench.limits import Limits
from lab.bench.rounds import Setting, measure, settings
from lab.bench.rows import Row

from helpers import ROOT

SHORT = Setting(threads=1, batch=1, prefill=(8,), decode=(16,), generate=(8, 4))
BATCH = Setting(threads=1, batch=3, prefill=(8,), decode=(), generate=None)
# The request to a worker that runs the module SPINNER.
SPIN = {"task": "serve", "module": "spinner", "kind": "x", "folder": "", "threads": 1, "options": {}, "ids": [[1]]}


class Fake:
    """A resident process that notes its turns; row `b` fails at its second decode."""

    turns: ClassVar[list[tuple]] = []
    alive: ClassVar[set[str]] = set()

    def __init__(self, python: Path, request: dict, work: Path, timeout: float, threads: int) -> None:
        self.name, self.first = request["kind"], {"load_ns": 1000, "version": "1"}
        self.alive.add(self.name)

    def ask(self, what: str, *shape: int) -> object:
        self.turns.append((self.name, what, *shape))
        if what in ("peak", "check"):
            return 100 if what == "peak" else None
        if self.name == "b" and self.turns.count((self.name, "decode", 16)) == 2:
            raise Failed("broke")
        return [len(self.turns)]

    def close(self) -> None:
        self.alive.discard(self.name)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    monkeypatch.setattr(lab.bench.rounds, "Resident", Fake)
    monkeypatch.setattr(Fake, "turns", [])
    monkeypatch.setattr(lab.bench.rounds.limits, "measure", lambda threads: Limits(threads, 1.0, 1.0, 1.0))
    return Fake.turns


def three() -> list[Row]:
    return [Row(name, name, "", Path(), Path(), "fp32") for name in "abc"]


def test_every_row_has_its_turn_in_each_case_rotated_and_a_failed_one_never_again(
    fakes: list[tuple], tmp_path: Path
) -> None:
    measured, answers, limits = measure(three(), "a", [SHORT], np.zeros((1, 200)), 3, tmp_path, "bench")

    def order(*case: object) -> str:
        return "".join(name for name, *asked in fakes if asked == [*case])

    # There is one more prefill at the start, which measures each row's memory.
    assert order("prefill", 8) == "abc" + "abc" + "bca" + "ac"
    assert order("decode", 16) == "abc" + "bca" + "ac" and order("generate", 8, 4) == "abc" + "ca" + "ac"
    assert not answers and not Fake.alive and [found.threads for found in limits] == [1] * 3
    assert (measured["b"][0].rounds, measured["b"][0].skipped) == ([], "broke")
    found = measured["c"][0]
    assert len(found.rounds) == 3 and set(found.rounds[0]) == {("prefill", 8), ("decode", 16), ("generate", 8, 4)}
    assert found.base == measured["a"][0].rounds and found.load_ns == [1000] * 3 and found.peak_rss_bytes == 100


def test_rows_of_one_precision_stand_side_by_side(fakes: list[tuple], tmp_path: Path) -> None:
    rows = [replace(row, precision=precision) for row, precision in zip(three(), ("fp32", "int8", "fp32"), strict=True)]
    measure(rows, "a", [BATCH], np.zeros((3, 200)), 1, tmp_path, "bench")
    assert "".join(name for name, what, *_ in fakes if what == "prefill") == "acb" + "acb"


def test_what_memory_does_not_hold_is_measured_in_groups_with_the_baseline(
    fakes: list[tuple], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab.bench.rounds, "memory_bytes", lambda: 150)
    measured, *_ = measure(three(), "b", [BATCH], np.zeros((3, 200)), 2, tmp_path, "bench")
    turns = "".join(name for name, what, *_ in fakes if what == "prefill")
    assert turns == "ba" + "ba" + "ab" + "bc" + "bc" + "cb"
    samples = {name: [run["prefill", 8][0] for run in measured[name][0].rounds] for name in "abc"}
    bases = {name: [run["prefill", 8][0] for run in measured[name][0].base] for name in "abc"}
    assert bases["a"] == bases["b"] == samples["b"], "of the first group"
    assert len(samples["c"]) == 2 and min(bases["c"]) > max(samples["b"]), "of the second"


def test_a_process_stands_still_but_for_its_turns_and_fails_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "spinner.py").write_text(SPINNER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        resident = child.Resident(Path(sys.executable), SPIN, tmp_path, 60, 1)
    try:
        assert resident.first["version"] == "1" and resident.first["load_ns"] > 0
        before = resident.ask("decode", 0)[0]
        time.sleep(0.5)
        after = resident.ask("decode", 0)[0]
        assert before < after < before + 0.4e9, "the thread ran on while it was not asked"
        with pytest.raises(Failed, match=r"^ValueError: no such question: nonsense$"):
            resident.ask("nonsense")
    finally:
        resident.close()


def test_settings_are_full_for_the_most_threads_and_short_for_the_others() -> None:
    main, batch, single = settings([1, 2], [8, 1])
    assert (main.threads, main.batch, main.prefill, main.decode) == (2, 1, (128, 512), (128, 512, 900))
    assert (batch.threads, batch.batch, batch.decode) == (2, 8, (128,)) and batch.generate == (128, 128)
    assert (single.threads, single.batch, single.decode, single.generate) == (1, 1, (128,), None)
    assert main.context == 923 < 1024 and len(settings([1], [1])) == 1


class Clock:
    """A clock whose time passes only when an engine says so."""

    now = 0

    def perf_counter_ns(self) -> int:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(worker, "time", fake)
    return fake


def serve(engine: type, *questions: list, logits: Path = Path()) -> list:
    """The worker's answers to `questions`, after it is loaded."""
    fields = {
        "kind": "x",
        "folder": "y",
        "threads": 1,
        "options": {},
        "ids": [list(range(64))] * 2,
        "logits": str(logits),
    }
    _, *answers = worker.serve(module_of(engine), fields, map(json.dumps, questions))
    return answers


def module_of(engine: type) -> types.SimpleNamespace:
    return types.SimpleNamespace(Engine=lambda kind, folder, threads: engine(), version=lambda: "1")


def test_a_decode_sample_is_one_step_after_a_cache_that_grows(clock: Clock) -> None:
    class Engine:
        def start(self, batch: int, capacity: int) -> None:
            self.length, self.capacity = 0, capacity

        def feed(self, ids: np.ndarray) -> None:
            assert ids.shape[0] == 2 and ids[0, 0] == self.length
            clock.now += 1000 * self.length + ids.shape[1]
            self.length += ids.shape[1]
            assert self.length <= self.capacity

    prefill, decode = serve(Engine, ["prefill", 8], ["decode", 16])
    assert prefill == [8] and decode == [1000 * position + 1 for position in range(19, 39)]


def test_a_library_that_only_generates_tells_when_each_token_is_there(clock: Clock) -> None:
    class Engine:
        steps = False

        def generate(self, ids: np.ndarray, count: int) -> list[list[int]]:
            clock.now += 100 * ids.shape[1] + 7 * (count - 1)
            return [[5] * count for _ in ids]

        def times(self, ids: np.ndarray, count: int) -> list[int]:
            return [100 * ids.shape[1] + 7 * step for step in range(count)]

    asked = (["prefill", 8], ["decode", 16], ["generate", 8, 4], ["check", 8, 4])
    assert serve(Engine, *asked) == [[800], [7] * 20, [821], [5]]


def test_generation_feeds_the_likeliest_token_and_never_the_last(clock: Clock) -> None:
    fed: list[list[int]] = []

    class Engine:
        def start(self, batch: int, capacity: int) -> None:
            fed.clear()

        def feed(self, ids: np.ndarray) -> np.ndarray:
            clock.now += 1
            fed.append(ids[0].tolist())
            return np.eye(10, dtype=np.float32)[(ids[:, -1] + 1) % 10]

    serve(Engine, ["generate", 3, 4])
    assert fed == [[0, 1, 2], [3], [4], [5]]


def test_the_check_keeps_logits_that_the_next_call_overwrites(clock: Clock, tmp_path: Path) -> None:
    class Engine:
        def start(self, batch: int, capacity: int) -> None:
            self.buffer = np.zeros((1, 10), np.float32)

        def feed(self, ids: np.ndarray) -> np.ndarray:
            if len(ids) == 1:
                self.buffer[:] = np.eye(10)[ids[0, -1] % 10]
            clock.now += 1
            return self.buffer

    file = tmp_path / "logits.npy"
    assert serve(Engine, ["check", 3, 2], logits=file) == [[2, 3, 4]]
    assert np.load(tmp_path / "logits.npy").argmax(axis=1).tolist() == [2, 3, 4]


def test_a_batch_that_is_too_large_is_refused() -> None:
    class Engine:
        max_batch = 1

    with pytest.raises(ValueError, match="batches of at most 1"):
        serve(Engine, ["prefill", 8])


def test_a_peer_that_is_not_installed_says_what_installs_it() -> None:
    with pytest.raises(Failed, match="make peers"):
        child.ask(Path("/nowhere/python"), {}, Path(), timeout=1)


def test_who_dies_leaves_no_process_that_stands_still(tmp_path: Path) -> None:
    (tmp_path / "spinner.py").write_text(SPINNER)
    code = """
import json, os, signal, sys
from pathlib import Path
from lab.bench.child import Resident
resident = Resident(Path(sys.executable), json.loads(sys.argv[1]), Path(sys.argv[2]), 60, 1)
print(resident._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(SPIN), tmp_path],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        capture_output=True,
        text=True,
    )
    assert_gone(int(done.stdout))


def assert_gone(pid: int) -> None:
    """Assert that within ten seconds the process is gone, or a zombie whose status nobody has read yet."""
    status = Path(f"/proc/{pid}/status")
    deadline = time.monotonic() + 10
    while status.exists() and "(zombie)" not in status.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not status.exists() or "(zombie)" in status.read_text()


# A module whose thread spins. A step returns how many ns of processor time the process has used.
SPINNER = """
import threading, time
def version(): return "1"
class Engine:
    steps = False
    def __init__(self, kind, folder, threads):
        threading.Thread(target=self.spin, daemon=True).start()
    def spin(self):
        while True: pass
    def times(self, ids, count):
        used = time.process_time_ns()
        return [number * used for number in range(count)]
"""
