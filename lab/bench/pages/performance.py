"""docs/bench/*.json -> their pages and figures, and the tables of docs/performance.md.

python -m lab.bench.pages.performance    all of them anew, from what `make bench` wrote to reports/bench

What stands between the tables is written by hand; a table stands between the lines `<!-- NAME -->` and `<!-- end -->`,
for each NAME of TABLES.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from cuantiza.core.errors import UserError, run
from cuantiza.core.machine.progress import report as say
from cuantiza.core.pages import table
from cuantiza.core.store import folders
from lab import DOCS
from lab.bench.pages.markdown import page, ratios, speed_table, spread, three_digits
from lab.pages import write

PAGE = "performance.md"

# (theirs, ours): what one would use instead, and what of ours one would take for it.
PAIRS = (
    ("llama.cpp Q8_0", "int8-weight-ort"),
    ("llama.cpp Q8_0", "int8-dynamic-ort"),
    ("llama.cpp Q4_0", "int4-weight-ort"),
    ("optimum int8", "int8-weight-ort"),
    ("optimum int8", "int8-dynamic-ort"),
    ("optimum int8 per channel", "int8-weight-ort"),
    ("optimum int8 per channel", "int8-dynamic-ort"),
    ("CTranslate2 int8", "int8-dynamic-ort"),
    ("CTranslate2 int8", "int8-static-ort"),
    ("OpenVINO int8 weights", "int8-weight-ort"),
    ("OpenVINO int8 weights", "int8-static-ort"),
    ("onnxruntime-genai int8-weight-ort", "int8-weight-ort"),
    ("optimum fp32", "fp32-ort"),
    ("mobius-onnx fp32", "fp32-ort"),
    ("llama.cpp f32", "fp32-ort"),
    ("int8-dynamic-ort", "int8-static-ort"),
)
# (title, phase, index) of the main setting's shapes that PAIRS are compared in.
SHAPES = (
    ("prefill 512", "prefill", 1),
    ("decode @128", "decode", 0),
    ("decode @512", "decode", 1),
    ("decode @900", "decode", 2),
)


def main() -> int:
    from lab.bench.pages.plot import draw

    for file in sorted((DOCS / "bench").glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        write(file.with_suffix(".md"), page(result, file.stem))
        say(f"performance {file.with_suffix('.md')}: written")
        with folders.staging(file) as work:
            draw(result, work / "figure.svg")
            (work / "figure.svg").replace(file.with_suffix(".svg"))
    path = DOCS / PAGE
    write(path, filled(path.read_text(encoding="utf-8"), DOCS / "bench"))
    say(f"performance {path}: written")
    return 0


def filled(text: str, folder: Path) -> str:
    """`text` with all tables made of the JSON files in `folder`. Raises UserError where one is missing on either side."""
    for name, make in TABLES.items():
        place = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        if not place.search(text):
            raise UserError(f"docs/{PAGE}: has no <!-- {name} --> with an <!-- end --> behind it")
        made = make(folder).strip()
        text = place.sub(lambda found, made=made: found[1] + made + found[2], text)
    return text


def _load(folder: Path, name: str) -> dict:
    try:
        return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"docs/bench/{name}.json: is not there; copy it from reports/bench") from None


def _speeds(name: str, setting: int) -> Callable[[Path], str]:
    """Medians of a run's setting by its number."""
    return lambda folder: table(
        *speed_table(_load(folder, name), setting, lambda item: three_digits(item["median_ms"]))
    )


def _pairs(folder: Path) -> str:
    result = _load(folder, "gpt2")
    rows = {row["name"]: row["settings"][0] for row in result["rows"]}
    lines = [
        [theirs, f"`{ours}`", *(_ratio(rows[ours][phase][at], rows[theirs][phase][at]) for _, phase, at in SHAPES)]
        for theirs, ours in PAIRS
    ]
    return table(["theirs", "ours", *(title for title, _, _ in SHAPES)], lines)


def _ratio(ours: dict, theirs: dict) -> str:
    found = ratios(ours, theirs)
    return spread(found, *found)


TABLES: dict[str, Callable[[Path], str]] = {
    "main": _speeds("gpt2", 0),
    "pairs": _pairs,
    "batch of 8": _speeds("gpt2-batch", 1),
    "one thread": _speeds("gpt2-batch", 2),
    "ablation": _speeds("gpt2-ablation", 0),
    "medium": _speeds("gpt2-medium", 0),
}

if __name__ == "__main__":
    run(main)
