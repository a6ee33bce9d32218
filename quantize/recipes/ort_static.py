"""The recipe ort-static: ONNX Runtime's own quantize_static, to compare ours with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cuantiza.quantize.settings import CALIBRATION, Calibration

if TYPE_CHECKING:
    from cuantiza.core.inputs.corpus import Split


@dataclass(frozen=True)
class OrtStatic:
    """Runs ONNX Runtime's own quantize_static (QDQ, min-max), as its documentation advises for transformers."""

    calibration: Calibration = CALIBRATION

    def describe(self) -> str:
        """Describe the recipe in one line, for `cuantiza recipes`."""
        return "ONNX Runtime's own quantize_static: QDQ, min-max"

    def make(self, parent: Path, work: Path, split: Split) -> dict:
        """Quantize the fp32 artifact `parent` with the tool, into the folder `work`, calibrated on `split`.

        Returns `details` for the manifest. The stage calls this in a process of its own.
        """
        from cuantiza.core.run.exact_int8 import SESSION_OPTIONS
        from cuantiza.core.store import artifact
        from cuantiza.quantize.decide.calibrate import calibration_windows
        from cuantiza.quantize.layers import calibrated_on
        from cuantiza.quantize.rewrite.onnxruntime_tools import ort_static

        windows = calibration_windows(parent, split, self.calibration)
        ort_static(parent / artifact.MODEL, work, windows)
        return calibrated_on(windows, split) | SESSION_OPTIONS
