"""Check the rules of imports, and the types: `python setup/check_tree.py imports types`, as `make lint` does.

In a checkout the stages lie at the top and are imported as `cuantiza.export` and so on, because cuantiza/__init__.py
extends its `__path__` when it runs. Neither import-linter nor mypy runs it. So this makes build/tree, where links to all
files lie as a wheel lays them out, and both read that. Their settings are in pyproject.toml.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD, SETTINGS, PROGRAMS = ROOT / "build", ROOT / "pyproject.toml", Path(sys.executable).parent
TREE = BUILD / "tree"
STAGES = ("export", "quantize", "eval")
CHECKS = {
    "imports": ["lint-imports", "--no-logo", "--cache-dir", BUILD / "import-linter", SETTINGS],
    "types": ["mypy", "--config-file", SETTINGS, "--cache-dir", BUILD / "mypy", "-p", "cuantiza"],
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python setup/check_tree.py", description=__doc__)
    parser.add_argument("checks", nargs="+", choices=CHECKS, metavar="CHECK", help=" or ".join(CHECKS))
    lay_out()
    return max([check(*CHECKS[name]) for name in parser.parse_args().checks])


def lay_out() -> None:
    """Make build/tree: folders that hold links to the files of the checkout."""
    shutil.rmtree(TREE, ignore_errors=True)
    for folder in ("cuantiza", *STAGES, "lab"):
        place = TREE / "cuantiza" / folder if folder in STAGES else TREE / folder
        code = shutil.ignore_patterns("__pycache__", "*.json")
        shutil.copytree(ROOT / folder, place, copy_function=os.symlink, ignore=code, dirs_exist_ok=True)


def check(program: str, *arguments: str | Path) -> int:
    """Run a checker in build/tree; its messages name the files of the checkout. Returns 0 where it finds nothing."""
    done = subprocess.run(
        [PROGRAMS / program, *arguments],
        cwd=TREE,
        env={**os.environ, "PYTHONPATH": str(TREE)},
        capture_output=True,
        text=True,
    )
    output = re.sub(rf"^cuantiza/({'|'.join(STAGES)})/", r"\1/", done.stdout, flags=re.MULTILINE)
    print(output if done.returncode else output.rstrip().splitlines()[-1], done.stderr, sep="\n", end="")
    return min(done.returncode, 1)


if __name__ == "__main__":
    sys.exit(main())
