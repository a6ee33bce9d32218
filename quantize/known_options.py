"""Keep what each matrix costs on each grid, so that another budget for the same model and text need not measure it again.

Measuring takes most of the time of `int-mixed`, and does not depend on the budget. What is kept is a record of the user's
cache (cuantiza/core/store/records.py), under a key of everything that decides it: an artifact has the same bytes with it
and without.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from cuantiza.core.machine.hardware import default_threads
from cuantiza.core.machine.instructions import kernel_switches, processor
from cuantiza.core.machine.progress import report
from cuantiza.core.store import digests
from cuantiza.core.store.records import read_record, write_record
from cuantiza.quantize.decide.decision import Plan
from cuantiza.quantize.weights.allocate import Option, Options
from cuantiza.quantize.weights.rounding import Grid

_KIND = "sensitivities"


def known_options(path: Path, windows: list[np.ndarray], plan: Plan, measure: Callable[[], Options]) -> Options:
    """Return what `measure()` did or would return for the ONNX file `path`, which it measures by `plan` on `windows`."""
    key = json.dumps(
        {
            "files": digests.graph_hashes(path, digests.sha256_once),
            "windows": [[one.shape, hashlib.sha256(one.tobytes()).hexdigest()] for one in windows],
            "plan": repr(plan),
            "code": digests.code_digest("cuantiza.quantize.mixed"),
            "versions": digests.versions("numpy", "onnx", "onnx-ir", "onnxruntime"),
            # Sums depend on the processor, on how many threads they are split among, and on the kernels.
            "machine": [processor(), default_threads(), kernel_switches()],
        }
    )
    known = read_record(_KIND, key)
    if known is not None:
        report("mixed     what each matrix costs is known from an earlier budget")
        return {name: [Option(**one | {"grid": Grid(**one["grid"])}) for one in some] for name, some in known.items()}
    measured = measure()
    write_record(_KIND, key, {name: [asdict(option) for option in some] for name, some in measured.items()})
    return measured
