"""Tasks that make artifacts with the stages' own code.

A task is plain data with a method `run`. Any process on any machine that sees its folders can run it. `alone` says that
it needs a whole machine for itself.
"""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import cuantiza
from cuantiza.core.errors import UserError
from cuantiza.core.inputs.checkpoints import Model
from cuantiza.core.inputs.corpus import Source
from cuantiza.core.machine import child
from cuantiza.quantize.recipes.registry import Recipe
from cuantiza.quantize.stage import quantize
from cuantiza.sweep.tasks.made import Made


@dataclass(frozen=True)
class Export:
    """Export a checkpoint to the fp32 artifact `output`/<model>/fp32, as `python -m export` does.

    `cwd` is the folder from which an adapter's base is named; None for a model that is no adapter.
    """

    kind: ClassVar[str] = "export"
    alone: ClassVar[bool] = True
    label: str
    model: Model
    output: Path
    cwd: Path | None

    def run(self) -> Made:
        if self.cwd and not self.cwd.is_dir():
            raise UserError(
                f"{self.cwd}: is not on {platform.node()}, and the base of the adapter {self.model.folder} is named from there; "
                "run the sweep in a folder that all machines see"
            )
        # With -P the child finds our code where this process did, and no file of the user's folder in its place.
        command = [sys.executable, "-P", "-m", "cuantiza.export", "--model", self.model.folder, "--output", self.output]
        paths = [str(Path(cuantiza.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            child.run(command, cwd=self.cwd, environment={"PYTHONPATH": os.pathsep.join(paths)})
        except child.Failed as error:
            raise UserError(str(error)) from None
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
        # Several machines may quantize one model with different recipes at once, so each target has a folder and a lock
        # of its own.
        quantize(self.parent, self.recipe, self.target, corpus=self.source, name=self.name)
        return Made.of(self.target)
