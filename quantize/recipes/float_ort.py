"""fp32-ort: the fp32 weights as they are, in the operators that are fastest in ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cuantiza.quantize.settings import Target, for_target

if TYPE_CHECKING:
    from cuantiza.core.inputs.corpus import Split


@dataclass(frozen=True)
class Float:
    """The fp32 weights as they are, for another target."""

    target: Target

    def describe(self) -> str:
        """One line for `cuantiza recipes`."""
        return for_target("the fp32 weights as they are", self.target)

    def make(self, parent: Path, work: Path, split: Split | None) -> dict:
        """Write the fp32 artifact `parent` for the target into the folder `work`; no calibration, so no `split`.

        Returns what the manifest says of it. The work is done in a process of its own.
        """
        from cuantiza.quantize.steps import write_graph

        return write_graph(parent, work, self.target, lambda model: {})
