"""Language model checkpoints to ONNX files that are small, fast on a CPU and measured against the original.

`export`, `quantize`, `evaluate`, `compare` and `load` do from Python what the commands of the same names do
(docs/python.md). Nothing heavy is imported before one of them is used.
"""

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cuantiza.core.errors import UserError
    from cuantiza.core.store.artifact import Artifact
    from cuantiza.eval.compare.decide import Comparison
    from cuantiza.eval.compare.stage import compare
    from cuantiza.eval.report.schema import Report
    from cuantiza.eval.stage import evaluate
    from cuantiza.export.stage import export
    from cuantiza.model import Model, load
    from cuantiza.quantize.stage import quantize

__version__ = "0.2.0"
__all__ = [
    "Artifact",
    "Comparison",
    "Model",
    "Report",
    "UserError",
    "compare",
    "evaluate",
    "export",
    "load",
    "quantize",
]

if sys.argv[:1] == ["-m"]:  # Python looks for the module of `python -m cuantiza.NAME`, and Ctrl-C may come at any time
    from cuantiza.core.errors import end_quietly_while_loading

    end_quietly_while_loading()
# From 1.29 on, ONNX Runtime sends telemetry unless this says otherwise when it is loaded, and nothing of ours is loaded
# before this file. Child processes inherit it. What the user has set himself stays.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():
    # In a checkout the three stages lie beside this folder; in a wheel they lie inside it.
    __path__.append(str(_root))

# `export` and `quantize` are packages that can be called (core/stages.py).
_HOMES = {
    "Artifact": "core.store.artifact",
    "Model": "model",
    "Report": "eval.report.schema",
    "UserError": "core.errors",
    "Comparison": "eval.compare.decide",
    "compare": "eval.compare.stage",
    "evaluate": "eval.stage",
    "load": "model",
}


def __getattr__(name: str) -> Any:
    if name in ("export", "quantize"):
        return import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
