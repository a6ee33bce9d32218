"""Write hashes into the pins: `python setup/pin.py setup/*.txt` looks up each `name==version` and rewrites the files.

To upgrade a package, change its version (or add a line) and run this again. `pip install --dry-run` in a new
environment shows which packages a package needs. The hashes come from the package index. They cover the source and all
wheels for Python 3.11 or newer, so one file serves every platform. torch's old hashes are kept, because the index of
its CPU build does not always answer; after an upgrade of torch, delete them by hand.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import InvalidVersion, Version

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cuantiza.core.errors import UserError, run
from cuantiza.core.machine.progress import report as say

INDEX, CPU_INDEX = "https://pypi.org/simple", "https://download.pytorch.org/whl/cpu"
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s\\;]+)")
_OLDEST = 11  # oldest minor version of Python 3 that is supported


def main() -> int:
    parser = argparse.ArgumentParser(prog="python setup/pin.py", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="files with pins to rewrite")
    parser.add_argument("--wheels", type=Path, help="folder with more files whose hashes are added")
    args = parser.parse_args()
    for path in args.files:
        lines = path.read_text(encoding="utf-8").splitlines()
        pins = sorted((match.groups() for line in lines if (match := _PIN.match(line))), key=lambda pin: pin[0].lower())
        torch = kept_hashes(path.read_text(encoding="utf-8"), "torch")
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(lambda pin: hashes(*pin, args.wheels), pins))
        lines = []
        for (name, version), digests in zip(pins, found, strict=True):
            digests = digests | torch if name == "torch" else digests
            if not digests:
                raise UserError(f"{path}: {name}=={version} has no file for Python 3.{_OLDEST}; pin another version")
            lines.append(
                " \\\n    ".join([f"{name}=={version}", *(f"--hash=sha256:{item}" for item in sorted(digests))])
            )
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        say(f"pins      {path}: {len(pins)} packages, {sum(map(len, found))} files")
    return 0


def hashes(name: str, version: str, wheels: Path | None) -> set[str]:
    """The sha256 (hex) of every file of a release that this project may install."""
    indexes = [INDEX, CPU_INDEX] if name == "torch" else [INDEX]
    found = {digest for index in indexes for file, digest in _listing(index, name) if suits(file, version)}
    for path in sorted(wheels.glob("*") if wheels else ()):
        if canonicalize_name(path.name.split("-")[0]) == canonicalize_name(name) and suits(path.name, version):
            with path.open("rb") as file:
                found.add(hashlib.file_digest(file, "sha256").hexdigest())
    return found


def _listing(index: str, name: str) -> list[tuple[str, str]]:
    """(file name, sha256) of every file that an index has of a package."""
    request = urllib.request.Request(
        f"{index}/{canonicalize_name(name)}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read().decode()
    except OSError as error:
        if index == CPU_INDEX:
            return []
        raise UserError(f"{request.full_url}: {error}; run it again when the package index answers") from None
    if not text.startswith("{"):  # this index answers with an HTML page of links
        return [
            (file.replace("%2B", "+"), digest)
            for file, digest in re.findall(r"/([^/#\"]+)#sha256=([0-9a-f]{64})", text)
        ]
    return [(item["filename"], item["hashes"]["sha256"]) for item in json.loads(text)["files"]]


def suits(file: str, version: str) -> bool:
    """Whether `file` has this version (its local part, such as +cpu, is ignored) and is for Python 3.11 or newer."""
    try:
        if not file.endswith(".whl"):
            return parse_sdist_filename(file)[1].public == Version(version).public
        _, found, _, tags = parse_wheel_filename(file)
    except (InvalidSdistFilename, InvalidWheelFilename, InvalidVersion):
        return False
    return found.public == Version(version).public and any(_runs(tag.interpreter, tag.abi) for tag in tags)


def _runs(interpreter: str, abi: str) -> bool:
    match = re.fullmatch(r"(py|cp)(\d)(\d*)", interpreter)
    if not match or match[2] != "3":
        return False
    return match[1] == "py" or abi in ("abi3", "none") or int(match[3] or 0) >= _OLDEST


def kept_hashes(text: str, name: str) -> set[str]:
    """The hashes of a package that a file of pins already has."""
    block = re.search(rf"^{re.escape(name)}==(?:.*\\\n)*.*", text, re.MULTILINE)
    return set(re.findall(r"sha256:([0-9a-f]{64})", block[0])) if block else set()


if __name__ == "__main__":
    run(main)
