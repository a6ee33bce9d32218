"""Runs many cases of one format in a child process.

The child reports each case before it reads it, so a case that kills or hangs the child is a finding too.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from hypothesis.errors import Flaky
from hypothesis.strategies import SearchStrategy

from cuantiza.core.errors import UserError
from lab.fuzz.formats import FORMATS

_context = multiprocessing.get_context("spawn")


def campaign(name: str, cases: int, seed: int, engine: str, findings: Path) -> dict:
    """Run `cases` cases of format `name` and return their counts. `engine` is hypothesis or atheris.

    If a case is a finding, its file is copied to the folder `findings`.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cuantiza-fuzz-") as folder:
        here, there = _context.Pipe(duplex=False)
        process = _context.Process(target=_work, args=(there, name, Path(folder), cases, seed, engine))
        process.start()
        there.close()
        last: dict = {"cases": 0, "accepted": 0, "finding": "died before its first case"}
        try:
            # The child's own alarm cannot interrupt C code that hangs, so the parent waits at most 120 s per case.
            while here.poll(120):
                last = here.recv()
            last["finding"] = last["finding"] or f"hung in case {last['cases']}"
        except EOFError:
            process.join()
            if process.exitcode:
                last["finding"] = f"its process died with exit code {process.exitcode} in case {last['cases']}"
        process.kill()
        process.join()
        if last["finding"]:
            findings.mkdir(parents=True, exist_ok=True)
            kept = findings / name.replace(" ", "-").replace("/", "-")
            case = Path(folder) / FORMATS[name].file
            kept.write_bytes(case.read_bytes() if case.is_file() else b"")
            last["finding"] += f" ({kept})"
    return {"format": name, **last, "seconds": time.monotonic() - start}


def _work(there: Connection, name: str, folder: Path, cases: int, seed: int, engine: str) -> None:
    from lab.fuzz.harness import Finding, limit_memory, read_case

    form = FORMATS[name]
    form.prepare(folder)
    content = (folder / form.file).read_bytes()
    state = {"cases": 0, "accepted": 0, "finding": None}
    if not read_case(form, folder, content):
        raise UserError(f"{name}: its reader refuses the valid file")
    limit_memory()

    def attempt(case: bytes) -> None:
        state["cases"] += 1
        there.send(dict(state))
        state["accepted"] += read_case(form, folder, case)

    def guided_attempt(case: bytes) -> None:
        # libFuzzer ends the process as soon as an exception leaves this function, so the finding is sent before that.
        try:
            attempt(case)
        except Finding as finding:
            there.send(state | {"finding": " ".join(str(finding).split())})
            os._exit(0)

    if engine == "atheris":
        from lab.fuzz.guided import run_guided

        (folder / "corpus").mkdir()
        run_guided(guided_attempt, content, folder / "corpus", cases, seed)
    try:
        _run_hypothesis(attempt, form.cases(content), cases, seed)
    except (Finding, Flaky) as found:
        # If a case fails only sometimes, or in different ways, Hypothesis raises Flaky, maybe as a group of findings.
        first = found.exceptions[0] if isinstance(found, BaseExceptionGroup) else found
        state["finding"] = " ".join(str(first).split())
    there.send(dict(state))


def _run_hypothesis(attempt: Callable, strategy: SearchStrategy[bytes], cases: int, seed: int) -> None:
    limits = settings(
        max_examples=cases,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )

    @seeded(seed)
    @limits
    @given(strategy)
    def run(case: bytes) -> None:
        attempt(case)

    run()
