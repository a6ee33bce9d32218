"""ort-dynamic: ONNX Runtime's own quantize_dynamic, as a row to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cuantiza.core.inputs.corpus import Split


@dataclass(frozen=True)
class OrtDynamic:
    """ONNX Runtime's own quantize_dynamic, as its documentation advises for transformers."""

    def describe(self) -> str:
        """One line for `cuantiza recipes`."""
        return "ONNX Runtime's own quantize_dynamic"

    def make(self, parent: Path, work: Path, split: Split | None) -> dict:
        """Write what the tool makes of the fp32 artifact `parent` into the folder `work`; no calibration, so no `split`.

        Returns what the manifest says of it. The work is done in a process of its own.
        """
        from cuantiza.core.run.exact_int8 import SESSION_OPTIONS
        from cuantiza.core.store import artifact
        from cuantiza.quantize.rewrite.onnxruntime_tools import ort_dynamic

        ort_dynamic(parent / artifact.MODEL, work)
        return dict(SESSION_OPTIONS)
