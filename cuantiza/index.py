"""Fixes the split of a folder of .txt documents: every third one calibrates, the others test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cuantiza.core.cli import Parser
from cuantiza.core.errors import run
from cuantiza.core.inputs.corpus import INDEX, write_index
from cuantiza.core.machine.progress import report


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("index", __doc__, "cuantiza index corpus/es")
    parser.add_argument("folder", type=Path, help=f"folder of the documents; its {INDEX} is written")
    folder = parser.parse_args(arguments).folder
    written = write_index(folder)
    report(f"index     {folder / INDEX}: {'written' if written else 'up to date'}")
    return 0


if __name__ == "__main__":
    run(main)
