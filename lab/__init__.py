"""How the figures in docs/ are made, and how the product is attacked. Stays in the repository: no wheel has it."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
ES_MINI, CORPUS = ROOT / "models" / "es-mini", ROOT / "corpus" / "es"
