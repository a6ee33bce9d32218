"""A reference to an artifact that one task made and other tasks read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cuantiza.core.errors import UserError
from cuantiza.core.store import artifact
from cuantiza.eval.measure.engines import Subject
from cuantiza.eval.measure.size import onnx_bytes


@dataclass(frozen=True)
class Made:
    """An artifact's folder, the sha256 of its content, and its sizes in bytes as defined in docs/report.md."""

    path: Path
    digest: str
    bytes: int
    model_bytes: int

    @classmethod
    def of(cls, path: Path) -> Made:
        """The reference to the artifact in `path`. Raises UserError if it is damaged."""
        found = artifact.open_artifact(path)
        return cls(path, found.digest, **onnx_bytes(found.model))

    def subject(self) -> Subject:
        """The artifact as an object to measure.

        Raises UserError if this machine does not have it, or its content is no longer what the task made.
        """
        found = artifact.open_artifact(self.path)
        if found.digest != self.digest:
            raise UserError(
                f"{self.path}: has changed since this sweep made it; another command writes to the folder of --work, "
                "give this sweep a folder of its own"
            )
        return Subject(str(self.path), "onnx", found.model)
