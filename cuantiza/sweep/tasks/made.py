"""An artifact that a task made and others read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cuantiza.core.errors import UserError
from cuantiza.core.store import artifact
from cuantiza.eval.measure.engines import Subject
from cuantiza.eval.measure.size import onnx_bytes


@dataclass(frozen=True)
class Made:
    """Where an artifact is, the sha256 of its content, and its bytes as in docs/report.md."""

    path: Path
    digest: str
    bytes: int
    model_bytes: int

    @classmethod
    def of(cls, path: Path) -> Made:
        """Raises UserError where it is not whole."""
        found = artifact.open_artifact(path)
        return cls(path, found.digest, **onnx_bytes(found.model))

    def subject(self) -> Subject:
        """What is measured. Raises UserError where it is not on this machine, or not what was made."""
        found = artifact.open_artifact(self.path)
        if found.digest != self.digest:
            raise UserError(f"{self.path}: is not what was made there; another command writes to the folder of --work")
        return Subject(str(self.path), "onnx", found.model)
