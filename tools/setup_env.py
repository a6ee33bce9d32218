"""Make a virtual environment with pinned packages: `python tools/setup_env.py .venv pins/default.txt`.

Runs before anything is installed, so it uses the standard library alone. Two makes at once take turns.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

# The CPU build of torch; PyPI's own for x86-64 Linux brings 3 GB of CUDA.
CPU_INDEX = os.environ.get("TORCH_INDEX", "https://download.pytorch.org/whl/cpu")


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 - this is where an older one is told
        print(
            f"error: Python {platform.python_version()} is too old; give 3.11 or newer with PYTHON=python3.11",
            file=sys.stderr,
        )
        return 2
    venv, pins = Path(sys.argv[1]), Path(sys.argv[2])
    venv.parent.mkdir(parents=True, exist_ok=True)
    with (venv.parent / f"{venv.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = venv / ".stamp"
        wanted = hashlib.sha256(pins.read_bytes()).hexdigest() + f" {sys.version_info.major}.{sys.version_info.minor}"
        if not (stamp.is_file() and stamp.read_text() == wanted):
            print(f"setting up {venv} (once; a few minutes)", file=sys.stderr)
            install(venv, pins)
            stamp.write_text(wanted)
        stamp.touch()
    return 0


def install(venv: Path, pins: Path) -> None:
    stamp = venv / ".stamp"
    stamp.unlink(missing_ok=True)
    if not (venv / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    pip = [venv / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    torch = re.search(r"^torch==(\S+)", pins.read_text(), re.MULTILINE)
    if torch and sys.platform == "linux":
        # Where the CPU index cannot be reached, PyPI's build does the same, only larger.
        command = [*pip, "--retries", "1", "--no-deps", "--extra-index-url", CPU_INDEX, f"torch=={torch[1]}+cpu"]
        if subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
            print(
                f"no CPU build of torch {torch[1]} at {CPU_INDEX}; taking the one of the package index", file=sys.stderr
            )
    subprocess.run([*pip, "-r", pins], check=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        print(
            f"error: {Path(error.cmd[0]).name} could not install the packages (status {error.returncode}); run make again when the index answers",
            file=sys.stderr,
        )
        sys.exit(2)
