"""Work in another interpreter: a request as a JSON file, an answer as a line of JSON, one reason where it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

from bench.models import ROOT


class Failed(Exception):
    """Why a child gave no answer, in one line."""


def command(python: Path, module: str, *arguments: object) -> list[str]:
    """The command line of `module` in the interpreter `python`."""
    return [str(python), "-m", module, *map(str, arguments)]


def require(python: Path) -> None:
    """Raises Failed where there is no such interpreter."""
    if not os.access(python, os.X_OK):
        raise Failed("not installed: run `make peers`")


def ask(python: Path, request: dict, work: Path, timeout: float, threads: int | None = None) -> dict:
    """What `bench.worker` answers to `request`, which is written to folder `work`, within `timeout` seconds.

    `threads` is what the libraries under the row's own may use as well. Raises Failed.
    """
    require(python)
    path = work / "request.json"
    path.write_text(json.dumps(request), encoding="utf-8")
    limits = {} if threads is None else {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    answer = run(command(python, "bench.worker", path), timeout, {"HF_HUB_OFFLINE": "1", **limits})
    return json.loads(answer.splitlines()[-1])


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
    if process.returncode < 0:
        why = ": most often a lack of memory" if process.returncode == -signal.SIGKILL else ""
        raise Failed(f"died of {signal.Signals(-process.returncode).name}{why}")
    if process.returncode:
        lines = [line.strip() for line in errors.splitlines() if line.strip()]
        raise Failed(lines[-1].removeprefix("error: ") if lines else f"ended with status {process.returncode}")
    return output
