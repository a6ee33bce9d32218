"""The recipes fp16 and bf16: weights are stored in 16 bits, and computed with in fp32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cuantiza.quantize.settings import Target, for_target

if TYPE_CHECKING:
    from cuantiza.core.inputs.corpus import Split


@dataclass(frozen=True)
class Half:
    """Stores weights in half the bytes. The graph converts them to fp32 and computes in fp32."""

    dtype: Literal["fp16", "bf16"]
    target: Target = "portable"

    def describe(self) -> str:
        """Describe the recipe in one line, for `cuantiza recipes`."""
        return for_target(f"weights in {self.dtype}, computed in fp32", self.target)

    def make(self, parent: Path, work: Path, split: Split | None) -> dict:
        """Write the graph of the fp32 artifact `parent`, with 16-bit weights, into the folder `work`.

        Nothing is calibrated, so `split` is not read.

        Returns `details` for the manifest. The stage calls this in a process of its own.
        """
        from cuantiza.quantize.rewrite.half import store_half
        from cuantiza.quantize.steps import write_graph

        return write_graph(
            parent, work, self.target, lambda model: {"stored_in_16_bits": store_half(model, self.dtype)}
        )
