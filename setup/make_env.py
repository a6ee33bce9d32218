"""Make a virtual environment with pinned packages: `python setup/make_env.py .venv setup/default.txt`.

A third argument, such as `.venv`, names a base environment: packages that it has in the pinned version are not
installed again. Every package must match a hash in the pins. The only exception are torch's CUDA packages, if torch's
CPU build is not available. This script runs before anything is installed, so it uses only the standard library. If two
makes run it at once, the second waits.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

# The index of torch's CPU build. PyPI's build for x86-64 Linux includes CUDA.
CPU_INDEX = os.environ.get("TORCH_INDEX", "https://download.pytorch.org/whl/cpu")


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 - an older Python gets its error message here
        print(
            f"error: Python {platform.python_version()} is too old; give 3.11 or newer with PYTHON=python3.11",
            file=sys.stderr,
        )
        return 2
    venv, pins, *rest = map(Path, sys.argv[1:])
    below = rest[0] if rest else None
    venv.parent.mkdir(parents=True, exist_ok=True)
    with (venv.parent / f"{venv.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = venv / ".stamp"
        wanted = f"{hashlib.sha256(pins.read_bytes()).hexdigest()} {platform.python_version()}"
        if below:
            # If the base environment changes, packages that the pins need may be missing.
            wanted += f" on {(below / '.stamp').read_text()}"
        if not (stamp.is_file() and stamp.read_text() == wanted):
            print(f"setting up {venv} (once; a few minutes)", file=sys.stderr)
            install(venv, pins, below)
            stamp.write_text(wanted)
        stamp.touch()
    return 0


def install(venv: Path, pins: Path, below: Path | None) -> None:
    (venv / ".stamp").unlink(missing_ok=True)
    python = venv / "bin" / "python"
    if version_of(python) != platform.python_version():
        # The environment is incomplete, or of another Python version, which keeps packages in another folder.
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
    if below:
        # pip sees the base environment's packages as installed if they have the pinned version. That saves space: torch
        # alone is 0.8 GB.
        site, other = (Path(sysconfig.get_path("purelib", "venv", vars={"base": root})) for root in (venv, below))
        (site / "below.pth").write_text(f"{os.path.relpath(other.absolute(), site.absolute())}\n")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # Install only the packages that the pins name, because others have no hash.
    hashed = ["--require-hashes", "--no-deps"]
    torch = re.search(r"^torch==(\S+)((?:.*\\\n)*.*)", pins.read_text(), re.MULTILINE)
    cpu_build = True
    if torch and sys.platform == "linux":
        with tempfile.TemporaryDirectory() as folder:
            pin = Path(folder) / "torch.txt"
            pin.write_text(f"torch=={torch[1]}+cpu{torch[2]}\n")
            command = [*pip, *hashed, "--retries", "1", "--extra-index-url", CPU_INDEX, "-r", pin]
            cpu_build = not subprocess.run(command, stderr=subprocess.DEVNULL).returncode
    subprocess.run([*pip, *hashed, "-r", pins], check=True)
    if not cpu_build:
        # PyPI's build computes the same, but is larger. pip finds out which CUDA packages it needs.
        print(
            f"no CPU build of torch {torch[1]} with a known hash at {CPU_INDEX}; "
            "took the package index's, whose CUDA packages have no hash here",
            file=sys.stderr,
        )
        subprocess.run([*pip, f"torch=={torch[1]}"], check=True)
    # On another platform a package may need packages that the pins do not name. Find that here, not at run time.
    subprocess.run([python, "-m", "pip", "check", "--quiet", "--disable-pip-version-check"], check=True)


def version_of(python: Path) -> str | None:
    """The version of an environment's interpreter; None if it does not run or has no pip."""
    command = [python, "-c", "import pip, platform; print(platform.python_version())"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        what, mend = "install the packages", "run make again when the package index answers"
        if "venv" in error.cmd:
            what, mend = "make a virtual environment", "install this Python's venv module (Debian: python3-venv)"
        print(f"error: could not {what} (status {error.returncode}); {mend}", file=sys.stderr)
        sys.exit(2)
