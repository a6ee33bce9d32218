"""The maintainers' tools: they make the figures in docs/ and attack the product. The wheel does not contain them."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
ES_MINI, CORPUS = ROOT / "models" / "es-mini", ROOT / "corpus" / "es"
