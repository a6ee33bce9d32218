"""ort-static: ONNX Runtime's own quantize_static, as a row to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cuantiza.quantize.settings import CALIBRATION, Calibration

if TYPE_CHECKING:
    from cuantiza.core.inputs.corpus import Split


@dataclass(frozen=True)
class OrtStatic:
    """ONNX Runtime's own quantize_static (QDQ, min-max), as its documentation advises for transformers."""

    calibration: Calibration = CALIBRATION

    def describe(self) -> str:
        """One line for `cuantiza recipes`."""
        return "ONNX Runtime's own quantize_static: QDQ, min-max"

    def make(self, parent: Path, work: Path, split: Split) -> dict:
        """Write what the tool makes of the fp32 artifact `parent` into the folder `work`, calibrated on `split`.

        Returns what the manifest says of it. The work is done in a process of its own.
        """
        from cuantiza.core.run.exact_int8 import SESSION_OPTIONS
        from cuantiza.core.store import artifact
        from cuantiza.quantize.decide.calibrate import calibration_windows
        from cuantiza.quantize.layers import calibrated_on
        from cuantiza.quantize.rewrite.onnxruntime_tools import ort_static

        windows = calibration_windows(parent, split, self.calibration)
        ort_static(parent / artifact.MODEL, work, windows)
        return calibrated_on(windows) | SESSION_OPTIONS
