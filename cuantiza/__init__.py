"""GPT-2 checkpoints to ONNX files that are small, fast on a CPU and measured against the original."""

from pathlib import Path

_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():
    # In a checkout the three stages lie beside this folder; in a wheel they lie inside it.
    __path__.append(str(_root))
