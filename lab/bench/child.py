"""Talk to lab/bench/worker.py in another interpreter: a request as a JSON file, answers as lines of JSON."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from cuantiza.core.machine.child import Failed, reason, run
from lab import ROOT

_OFFLINE = {"HF_HUB_OFFLINE": "1"}


def command(python: Path, module: str, *arguments: object) -> list[str]:
    """The command line of `module` in the interpreter `python`."""
    return [str(python), "-m", module, *map(str, arguments)]


def require(python: Path) -> None:
    """Raises Failed if there is no such interpreter."""
    if not os.access(python, os.X_OK):
        raise Failed("not installed: run `make peers`")


def ask(python: Path, request: dict, work: Path, timeout: float) -> dict:
    """The answer of `lab.bench.worker` to `request`, which is written to folder `work`.

    Raises Failed if the worker fails, or takes longer than `timeout` seconds.
    """
    answer = run(_worker(python, request, work), timeout=timeout, cwd=ROOT, environment=_OFFLINE)
    return json.loads(answer.splitlines()[-1])


class Resident:
    """A process of `lab.bench.worker` that stays loaded and is stopped except while it answers a question.

    Its whole process group is stopped, so that none of its threads spins while another row is timed. `first` is what
    it says when it has loaded. Each answer must come within `timeout` seconds.
    """

    def __init__(self, python: Path, request: dict, work: Path, timeout: float, threads: int) -> None:
        """`threads` also limits OpenMP and OpenBLAS, which the row's library may use. Raises Failed."""
        arguments = _worker(python, request, work)
        self._timeout = timeout
        self._errors = tempfile.TemporaryFile("w+", dir=work, errors="replace")  # noqa: SIM115 (closed by close)
        # A process group of its own, which can be stopped as a whole. The worker sees to it that it ends with us.
        self._process = subprocess.Popen(
            arguments,
            cwd=ROOT,
            env=os.environ | _OFFLINE | {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            process_group=0,
        )
        try:
            self.first = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, *question: object) -> Any:
        """The answer to a question of `lab.bench.worker.serve`. Raises Failed; after that nothing more can be asked."""
        os.killpg(self._process.pid, signal.SIGCONT)
        try:
            print(json.dumps(question), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise Failed(reason(self._process.wait(), self._said())) from None
        return self._answer()

    def close(self) -> None:
        """Kill the process, whatever it is doing."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        with suppress(BrokenPipeError):  # the process died before it read its last question
            self._process.stdin.close()
        self._process.stdout.close()
        self._errors.close()

    def _answer(self) -> Any:
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(self._timeout):
                raise Failed(f"gave no answer in {self._timeout:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise Failed(reason(self._process.wait(), self._said()))
        os.killpg(self._process.pid, signal.SIGSTOP)
        return json.loads(line)

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read()


def _worker(python: Path, request: dict, work: Path) -> list[str]:
    """The command line of `lab.bench.worker` for `request`, which is written to folder `work`. Raises Failed."""
    require(python)
    path = work / "request.json"
    path.write_text(json.dumps(request), encoding="utf-8")
    return command(python, "lab.bench.worker", path)
