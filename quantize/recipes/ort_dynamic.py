"""The recipe ort-dynamic: ONNX Runtime's own quantize_dynamic, to compare ours with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cuantiza.core.inputs.corpus import Split


@dataclass(frozen=True)
class OrtDynamic:
    """Runs ONNX Runtime's own quantize_dynamic, as its documentation advises for transformers."""

    def describe(self) -> str:
        """Describe the recipe in one line, for `cuantiza recipes`."""
        return "ONNX Runtime's own quantize_dynamic"

    def make(self, parent: Path, work: Path, split: Split | None) -> dict:
        """Quantize the fp32 artifact `parent` with the tool, into the folder `work`.

        Nothing is calibrated, so `split` is not read.

        Returns `details` for the manifest. The stage calls this in a process of its own.
        """
        from cuantiza.core.run.exact_int8 import SESSION_OPTIONS
        from cuantiza.core.store import artifact
        from cuantiza.quantize.rewrite.onnxruntime_tools import ort_dynamic

        ort_dynamic(parent / artifact.MODEL, work)
        return dict(SESSION_OPTIONS)
