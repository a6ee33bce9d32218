"""Make a virtual environment with pinned packages: `python setup/make_env.py .venv setup/default.txt`.

A third argument, `.venv`, is an environment that the new one stands on: what that has of the pins is not installed again.
Nothing is installed that the pins have no hash of, but for torch's CUDA packages where its CPU build cannot be had.
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
import sysconfig
import tempfile
from pathlib import Path

# The CPU build of torch; PyPI's own for x86-64 Linux brings CUDA.
CPU_INDEX = os.environ.get("TORCH_INDEX", "https://download.pytorch.org/whl/cpu")


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 - this is where an older one is told
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
            # With other versions there, what the pins ask for may be missing.
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
        # A half-made environment, or one of another Python: its packages would be in the wrong place.
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
    if below:
        # pip takes what it finds there for installed, where the version is the pinned one; torch alone is 0.8 GB.
        site, other = (Path(sysconfig.get_path("purelib", "venv", vars={"base": root})) for root in (venv, below))
        (site / "below.pth").write_text(f"{os.path.relpath(other.absolute(), site.absolute())}\n")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # The pins are all that there is to install: what they do not name has no hash.
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
        # The package index's build does the same, only larger. Which CUDA packages it needs is for pip to find.
        print(
            f"no CPU build of torch {torch[1]} with a known hash at {CPU_INDEX}; "
            "took the package index's, whose CUDA packages have no hash here",
            file=sys.stderr,
        )
        subprocess.run([*pip, f"torch=={torch[1]}"], check=True)
    # What a package asks for on another platform, and the pins leave out, would be missed at run time alone.
    subprocess.run([python, "-m", "pip", "check", "--quiet", "--disable-pip-version-check"], check=True)


def version_of(python: Path) -> str | None:
    """Version of an environment's interpreter; None where it does not run, or has no pip."""
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
