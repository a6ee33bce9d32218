"""Check import rules and types over one tree: `python setup/check_tree.py`, the last step of `make lint`.

In a checkout the stages lie at the top and are imported as `cuantiza.export` and so on, because cuantiza/__init__.py
extends its `__path__` at run time. Neither mypy nor import-linter runs that line. So links to all files are laid out in
build/tree as a wheel lays them out, and both read that. Their settings are in pyproject.toml.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "tree"
STAGES = ("export", "quantize", "eval")


def main() -> int:
    lay_out()
    settings, scripts = ROOT / "pyproject.toml", Path(sys.executable).parent
    imports = subprocess.run(
        [scripts / "lint-imports", "--config", settings, "--cache-dir", ROOT / "build/import-linter"],
        cwd=TREE, env={**os.environ, "PYTHONPATH": str(TREE)}, capture_output=True, text=True,
    )  # fmt: skip
    if imports.returncode:
        print(imports.stdout + imports.stderr)
    types = subprocess.run(
        [scripts / "mypy", "--config-file", settings, "--cache-dir", ROOT / "build/mypy", "-p", "cuantiza"],
        cwd=TREE, capture_output=True, text=True,
    )  # fmt: skip
    print(re.sub(rf"^cuantiza/({'|'.join(STAGES)})/", r"\1/", types.stdout, flags=re.MULTILINE) + types.stderr, end="")
    return int(bool(imports.returncode or types.returncode))


def lay_out() -> None:
    """Make build/tree anew: folders that hold links to the files."""
    shutil.rmtree(TREE, ignore_errors=True)
    for folder in ("cuantiza", *STAGES, "lab"):
        place = TREE / "cuantiza" / folder if folder in STAGES else TREE / folder
        ignored = shutil.ignore_patterns("__pycache__", "*.json", "*.md")
        shutil.copytree(ROOT / folder, place, copy_function=os.symlink, ignore=ignored, dirs_exist_ok=True)


if __name__ == "__main__":
    sys.exit(main())
