"""The recipe fp32-ort: unchanged fp32 weights, in the operators that are fastest in ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cuantiza.quantize.settings import Target, for_target

if TYPE_CHECKING:
    from cuantiza.core.inputs.corpus import Split


@dataclass(frozen=True)
class Float:
    """Keeps the fp32 weights, and rewrites the graph for `target`."""

    target: Target

    def describe(self) -> str:
        """Describe the recipe in one line, for `cuantiza recipes`."""
        return for_target("the fp32 weights as they are", self.target)

    def make(self, parent: Path, work: Path, split: Split | None) -> dict:
        """Write the graph of the fp32 artifact `parent`, rewritten for the target, into the folder `work`.

        Nothing is calibrated, so `split` is not read.

        Returns `details` for the manifest. The stage calls this in a process of its own.
        """
        from cuantiza.quantize.steps import write_graph

        return write_graph(parent, work, self.target, lambda model: {})
