"""What is measured, by name and place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Subject:
    """`kind` is onnx, torch or torch-dynamic; `path` an ONNX file, or the folder of a checkpoint."""

    name: str
    kind: str
    path: Path
