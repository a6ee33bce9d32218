"""The defaults of every command and of the Python API: the embedded model and text, and how much is measured."""

from __future__ import annotations

from pathlib import Path

import cuantiza

MODEL, CORPUS = "models/es-mini", "corpus/es"
SELF = "self"  # CORPUS=self: the model writes the text that calibrates
ARTIFACTS, REPORTS, DIST = Path("artifacts"), Path("reports"), Path("dist")
# The last one holds the integers of the first, in the operators that ONNX Runtime runs fastest.
RECIPES = ("int8-dynamic", "int8-static", "int8-dynamic-ort")
PROMPT = "Me gusta mucho el futbol"
# The tokens of text that an evaluation scores, the longest context of a scored token, and interleaved latency rounds.
TOKENS, WINDOW, ROUNDS = 12288, 512, 3
# Latency is measured up to this many positions: GPT-2's. The last ones of a model for 131,072 would take hours and a KV
# cache of gigabytes.
POSITIONS = 1024
# The rounds of a comparison; with fewer than the least, its first stage could never find anything (docs/compare.md).
COMPARE_ROUNDS, LEAST_COMPARE_ROUNDS = 8, 4


def place(spec: str) -> Path:
    """The path that `spec` names. The embedded model and text are found from any working directory.

    They are next to the package in a checkout, and inside it in a wheel; a path of that name in the working directory
    comes first.
    """
    path = Path(spec)
    return packaged(spec) if spec in (MODEL, CORPUS) and not path.exists() else path


def packaged(name: str) -> Path:
    """The path of a file or folder that lies at the top of the repository, and inside the package in a wheel."""
    found = [path for folder in cuantiza.__path__ if (path := Path(folder, name)).exists()]
    return found[0] if found else Path(name)
