"""Work in another interpreter: a request as a JSON file, answers as lines of JSON, one reason where it fails."""

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

from lab import ROOT

_OFFLINE = {"HF_HUB_OFFLINE": "1"}


class Failed(Exception):
    """Why a child gave no answer, in one line."""


def command(python: Path, module: str, *arguments: object) -> list[str]:
    """The command line of `module` in the interpreter `python`."""
    return [str(python), "-m", module, *map(str, arguments)]


def require(python: Path) -> None:
    """Raises Failed where there is no such interpreter."""
    if not os.access(python, os.X_OK):
        raise Failed("not installed: run `make peers`")


def ask(python: Path, request: dict, work: Path, timeout: float) -> dict:
    """What `lab.bench.worker` answers to `request`, which is written to folder `work`, within `timeout` seconds.

    Raises Failed.
    """
    answer = run(_worker(python, request, work), timeout, _OFFLINE)
    return json.loads(answer.splitlines()[-1])


class Resident:
    """A process of `lab.bench.worker` that stays, and stands still but for its turns.

    Between two questions it is stopped as a whole, so that no thread of it spins while another's turn is timed.
    `first` is what it says when it is loaded. Each answer has to be there within `timeout` seconds.
    """

    def __init__(self, python: Path, request: dict, work: Path, timeout: float, threads: int) -> None:
        """`threads` is what the libraries under the row's own may use as well. Raises Failed."""
        arguments = _worker(python, request, work)
        self._timeout = timeout
        self._errors = tempfile.TemporaryFile("w+", dir=work, errors="replace")  # noqa: SIM115 (closed by close)
        # A group of its own, to be stopped as a whole. It sees to it itself that it ends with this process.
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
        """The answer to a question of `lab.bench.worker.serve`. Raises Failed; nothing can be asked any more then."""
        os.killpg(self._process.pid, signal.SIGCONT)
        try:
            print(json.dumps(question), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise Failed(_reason(self._process.wait(), self._said())) from None
        return self._answer()

    def close(self) -> None:
        """End it, whatever it does."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        with suppress(BrokenPipeError):  # a question that it did not live to read
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
            raise Failed(_reason(self._process.wait(), self._said()))
        os.killpg(self._process.pid, signal.SIGSTOP)
        return json.loads(line)

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read()


def run(arguments: list[str], timeout: float, environment: dict[str, str] | None = None) -> str:
    """Standard output of a command in the repository's root. Raises Failed where it fails, or after `timeout` seconds."""
    process = subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=os.environ | (environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # so that it can be killed with all that it started
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise Failed(f"gave no answer in {timeout:.0f} s") from None
    finally:
        # However this ends, Ctrl-C included: nothing of the child stays behind and disturbs the next.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        raise Failed(_reason(process.returncode, errors))
    return output


def _worker(python: Path, request: dict, work: Path) -> list[str]:
    """The command line of `lab.bench.worker` for `request`, which is written to folder `work`. Raises Failed."""
    require(python)
    path = work / "request.json"
    path.write_text(json.dumps(request), encoding="utf-8")
    return command(python, "lab.bench.worker", path)


def _reason(status: int, errors: str) -> str:
    """Why a process failed: by its exit status, and what it said on standard error."""
    if status < 0:
        why = ": most often a lack of memory" if status == -signal.SIGKILL else ""
        return f"died of {signal.Signals(-status).name}{why}"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else f"ended with status {status}"
