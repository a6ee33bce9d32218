"""Tasks that make artifacts with the stages' own code.

A task is plain data with a method `run`. Any process on any machine that sees its folders can run it. `alone` says that
it needs a whole machine for itself.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import cuantiza
from cuantiza.core.errors import UserError
from cuantiza.core.inputs.checkpoints import Model
from cuantiza.core.inputs.corpus import Source
from cuantiza.core.store import artifact, folders
from cuantiza.quantize.__main__ import quantize_one
from cuantiza.quantize.recipes import Recipe
from cuantiza.sweep.tasks.made import Made


@dataclass(frozen=True)
class Export:
    """Export a checkpoint to the fp32 artifact `output`/<model>/fp32, as `python -m export` does."""

    kind: ClassVar[str] = "export"
    alone: ClassVar[bool] = True
    label: str
    model: Model
    output: Path

    def run(self) -> Made:
        command = [
            sys.executable,
            "-m",
            "cuantiza.export",
            "--model",
            str(self.model.folder),
            "--output",
            str(self.output),
        ]
        with subprocess.Popen(
            command, cwd=Path(cuantiza.__file__).parents[1], stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                _, said = process.communicate()
            except BaseException:
                process.terminate()  # on SIGTERM the stage removes its temporary folder
                process.wait()
                raise
        if process.returncode:
            last = (said.strip().splitlines() or [f"python -m export: ended with status {process.returncode}"])[-1]
            raise UserError(last.removeprefix("error: "))
        return Made.of(self.output / self.model.folder.resolve().name / "fp32")


@dataclass(frozen=True)
class Quantize:
    """Quantize the fp32 artifact `parent` to `target`, as `python -m quantize` does. `name` is the recipe's name."""

    kind: ClassVar[str] = "quantize"
    alone: ClassVar[bool] = True
    label: str
    parent: Path
    target: Path
    name: str
    recipe: Recipe
    source: Source

    def run(self) -> Made:
        # Several machines may quantize one model with different recipes at once, so each has its own folder and lock.
        with folders.locked(self.target.parent):
            quantize_one(artifact.open_artifact(self.parent), self.target, self.name, self.recipe, self.source)
        return Made.of(self.target)
