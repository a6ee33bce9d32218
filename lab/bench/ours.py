"""Runs this project's artifacts as rows of the benchmark, with the interface that lab/bench/worker.py describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from cuantiza.core.onnx.file import DATA
from cuantiza.core.run.runtime import Options, Runtime
from cuantiza.core.store.artifact import MODEL


def version() -> str:
    return f"onnxruntime {onnxruntime.__version__}"


def files(kind: str, folder: Path) -> list[Path]:
    """The files that count as the size of the artifact in `folder`."""
    return [file for file in (folder / MODEL, folder / DATA) if file.is_file()]


class Engine:
    """The artifact in `folder`. `options` are the fields of Options.

    Its threads spin while they wait, which is fastest. They disturb nobody, since only one row runs at a time.
    """

    def __init__(self, kind: str, folder: Path, threads: int, **options: Any) -> None:
        self._runtime = Runtime(folder / MODEL, threads, spin=True, options=Options(**options))

    def start(self, batch: int, capacity: int) -> None:
        self._cache = self._runtime.cache(batch, capacity)

    def feed(self, ids: np.ndarray) -> np.ndarray:
        return self._runtime.step(self._cache, ids)

    def all_logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits float32 [T, V] of ids [T]."""
        return self._runtime.forward(ids[None])[0]
