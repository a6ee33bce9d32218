"""Runs the stages as a user does: their own commands, each in a process of its own, from the repository's root."""

from __future__ import annotations

import subprocess
import sys

from lab import ROOT


def run_stage(*arguments: object) -> None:
    """Run `python -m ARGUMENTS`. If it fails it has printed why, so exit with its status."""
    done = subprocess.run([sys.executable, "-m", *map(str, arguments)], cwd=ROOT, stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(done.returncode if done.returncode > 0 else 128 - done.returncode)
