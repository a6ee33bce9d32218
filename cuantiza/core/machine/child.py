"""Run a program in another interpreter or environment to its end, and say in one line why it failed.

For our own functions there is cuantiza/core/machine/process.py. This module imports the standard library only.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_GRACE_S = 10  # for a child that is told to end, to remove its temporary files


class Failed(Exception):
    """Why a child process gave no result, in one line."""


def run(
    command: Sequence[object],
    *,
    timeout: float | None = None,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    noise: str | None = None,
) -> str:
    """Run `command` in `cwd` and return its standard output; its standard input is empty.

    `environment` is added to this process's own. However this function ends (Ctrl-C included), the child and all that
    it started are ended too. Raises Failed if the exit status is not 0, or after `timeout` seconds; the reason is the
    last line on standard error that does not contain `noise`.
    """
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=cwd,
        env=os.environ | (environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # a process group of its own, which can be ended as a whole
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise Failed(f"gave no answer in {timeout:.0f} s") from None
    finally:
        if process.poll() is None:
            end(process)
    if process.returncode:
        raise Failed(reason(process.returncode, errors, noise))
    return output


def end(process: subprocess.Popen[Any]) -> None:
    """End `process` and its group: SIGTERM first, so that it can clean up, then SIGKILL."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def reason(status: int, errors: str, noise: str | None = None) -> str:
    """Why a process failed, by its exit `status` (negative: a signal) and by what it wrote to standard error."""
    if status < 0:
        why = ": most often a lack of memory" if status == -signal.SIGKILL else ""
        name = next((known.name for known in signal.Signals if known == -status), f"signal {-status}")
        return f"died of {name}{why}"
    lines = [line.strip() for line in errors.splitlines() if line.strip() and not (noise and noise in line)]
    return lines[-1].removeprefix("error: ") if lines else f"ended with status {status}"
