"""The maintainers' tools: they make the figures in docs/ and attack the product. The wheel does not contain them."""

import sys
from pathlib import Path
from typing import Any

import cuantiza  # noqa: F401  (switches ONNX Runtime's telemetry off before a file of lab/ imports it)

# OpenVINO sends an event as it is imported. Where it does not find this package, it takes a stub of its own.
_modules: dict[str, Any] = sys.modules
_modules.setdefault("openvino_telemetry", None)

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
DATA = DOCS / "data"  # the figures that pages in docs/ are made of, as JSON
ES_MINI, CORPUS = ROOT / "models" / "es-mini", ROOT / "corpus" / "es"


def page_folder(data: Path) -> Path:
    """The folder of the page that is made of the JSON file `data`: docs/ for docs/data/x.json, else the file's own."""
    return data.parent.parent if data.parent.name == DATA.name else data.parent
