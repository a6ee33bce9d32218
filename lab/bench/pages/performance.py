"""Makes docs/bench and the tables in README.md and the performance pages from docs/data/bench/*.json.

python -m lab.bench.pages.performance    makes all of them again, after JSON files were copied from reports/bench

The text around the tables is written by hand. The table NAME (one of TABLES) is between the lines `<!-- NAME -->` and
`<!-- end -->`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from cuantiza.core.errors import UserError, run
from cuantiza.core.machine.progress import report as say
from cuantiza.core.pages import plus_minus, table
from cuantiza.core.store import folders
from lab import DATA, DOCS, ROOT
from lab.bench.pages.markdown import page, ratios, speed_table, spread, three_digits
from lab.bench.rounds import PREFILL
from lab.pages import write

FIGURE = DOCS / "figures" / "performance.svg"
# The rows of the first table in docs/performance.md and of its figure: the best choices of ours, then those of others.
CHOSEN = (
    "int8-weight-ort",
    "int4-weight-ort",
    "int8-dynamic-ort",
    "llama.cpp Q8_0",
    "llama.cpp Q4_K_M",
    "llama.cpp Q4_0",
    "onnxruntime-genai's builder int8",
    "onnxruntime-genai's builder int4",
    "OpenVINO int8 weights",
    "optimum int8",
    "PyTorch fp32",
)
# The rows of the README's table: (name in the benchmark, name in docs/accuracy.md). int8-dynamic-ort holds the same
# integers as int8-dynamic, so accuracy is measured once for both; fp32 is the
# baseline.
BOUGHT = (
    ("fp32", None),
    ("int8-dynamic", "int8-dynamic"),
    ("int8-dynamic-ort", "int8-dynamic"),
    ("int8-weight-ort", "int8-weight-ort"),
    ("int4-weight-ort", "int4-weight-ort"),
)

# (theirs, ours): a choice from another library, and our artifact for the same purpose.
PAIRS = (
    ("llama.cpp Q8_0", "int8-weight-ort"),
    ("llama.cpp Q8_0", "int8-dynamic-ort"),
    ("llama.cpp Q4_0", "int4-weight-ort"),
    ("llama.cpp Q4_K_M", "int4-weight-ort"),
    ("optimum int8", "int8-weight-ort"),
    ("optimum int8", "int8-dynamic-ort"),
    ("optimum int8 per channel", "int8-weight-ort"),
    ("optimum int8 per channel", "int8-dynamic-ort"),
    ("CTranslate2 int8", "int8-dynamic-ort"),
    ("CTranslate2 int8", "int8-static-ort"),
    ("OpenVINO int8 weights", "int8-weight-ort"),
    ("OpenVINO int8 weights", "int8-static-ort"),
    ("OpenVINO int8 weights", "int8-dynamic-ort"),
    ("OpenVINO GenAI int8", "int8-weight-ort"),
    ("OpenVINO GenAI int8", "int8-dynamic-ort"),
    ("onnxruntime-genai int8-weight-ort", "int8-weight-ort"),
    ("optimum fp32", "fp32-ort"),
    ("mobius-onnx fp32", "fp32-ort"),
    ("llama.cpp f32", "fp32-ort"),
    ("int8-dynamic-ort", "int8-static-ort"),
    ("int8-weight-ort", "int8-dynamic-ort"),
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

    for file in sorted((DATA / "bench").glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        target = DOCS / "bench" / file.name
        write(target.with_suffix(".md"), page(result, file.stem))
        say(f"performance {target.with_suffix('.md')}: written")
        with folders.staging(target) as work:
            draw(result, work / "figure.svg")
            (work / "figure.svg").replace(target.with_suffix(".svg"))
    with folders.staging(FIGURE) as work:
        draw(chosen(DATA), work / FIGURE.name)
        (work / FIGURE.name).replace(FIGURE)
    for name in TABLES:
        write(ROOT / name, filled(name, (ROOT / name).read_text(encoding="utf-8"), DATA))
        say(f"performance {name}: written")
    return 0


def filled(name: str, text: str, data: Path) -> str:
    """`text` of the page `name` with its tables made from the JSON files in the folder `data` (docs/data).

    Raises UserError if the page has no place for a table, or `data` lacks a file.
    """
    for title, make in TABLES[name].items():
        place = re.compile(rf"(<!-- {re.escape(title)} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        if not place.search(text):
            raise UserError(f"{name}: has no <!-- {title} --> with an <!-- end --> after it; add both lines")
        made = make(data).strip()
        text = place.sub(lambda found, made=made: found[1] + made + found[2], text)
    return text


def chosen(data: Path, run: str = "gpt2") -> dict:
    """The result of `run` with only the rows of CHOSEN that it measured, in that order."""
    result = _load(data, run)
    rows = {row["name"]: row for row in result["rows"] if not row["skipped"]}
    return {**result, "rows": [rows[name] for name in CHOSEN if name in rows]}


def _load(data: Path, name: str) -> dict:
    try:
        return json.loads((data / "bench" / f"{name}.json").read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"docs/data/bench/{name}.json: is not there; copy it from reports/bench") from None


def _median(row: dict, phase: str, at: int) -> str:
    return three_digits(row["settings"][0][phase][at]["median_ms"])


def _rate(row: dict) -> str:
    return f"{row['settings'][0]['generate'][0]['tokens_per_second']:.0f}"


def _chosen(data: Path, run: str = "gpt2") -> str:
    """The table of size and three speeds: reading a prompt, one decode step, and a whole generation."""
    columns = ["file", "MB", "prompt of 512, ms", "token @128, ms", "tokens/s"]
    lines = [
        [
            f"`{row['name']}`" if row["ours"] else row["name"],
            f"{row['bytes'] / 1e6:.1f}",
            _median(row, "prefill", 1),
            _median(row, "decode", 0),
            _rate(row),
        ]
        for row in chosen(data, run)["rows"]
    ]
    return table(columns, lines)


def _bought(data: Path) -> str:
    """The table of size and speed of GPT-2 small (benchmark) and Δ ln ppl of es-mini on corpus/es (accuracy.json)."""
    rows = {row["name"]: row for row in _load(data, "gpt2")["rows"]}
    models = json.loads((data / "accuracy.json").read_text(encoding="utf-8"))["models"]
    es_mini = next(item for item in models if (item["model"], item["corpus"]) == ("es-mini", "corpus/es"))
    quality = {row["name"]: row for row in es_mini["artifacts"]}
    lines = []
    for name, measured in BOUGHT:
        row, loss = rows[name], "baseline"
        if measured:
            found = quality[measured]
            loss = plus_minus(found["delta_ln_ppl"], found["delta_ln_ppl_stderr"], 4, "en")
        lines.append(
            [
                f"`{name}`",
                f"{row['bytes'] / 1e6:.1f}",
                _median(row, "prefill", 1),
                _median(row, "decode", 0),
                _rate(row),
                loss,
            ]
        )
    return table(["artifact", "MB", "prompt of 512, ms", "token @128, ms", "tokens/s", "Δ ln ppl (es-mini)"], lines)


def _speeds(name: str, setting: int) -> Callable[[Path], str]:
    """Return a function that makes the table of medians for the run `name` in its setting number `setting`."""
    return lambda data: table(*speed_table(_load(data, name), setting, lambda item: three_digits(item["median_ms"])))


def _pairs(data: Path, run: str = "gpt2") -> str:
    """The table of PAIRS, as far as `run` measured both."""
    rows = {row["name"]: row["settings"][0] for row in _load(data, run)["rows"] if not row["skipped"]}
    lines = [
        [theirs, f"`{ours}`", *(_ratio(rows[ours][phase][at], rows[theirs][phase][at]) for _, phase, at in SHAPES)]
        for theirs, ours in PAIRS
        if theirs in rows and ours in rows
    ]
    return table(["theirs", "ours", *(title for title, _, _ in SHAPES)], lines)


def _slower(data: Path) -> str:
    """How many times as long a prompt takes each row without what is newer than AVX2, by the medians of the two runs.

    Decoding is limited by memory, whose speed differs from run to run by more than the kernels make.
    """
    with_all, held = ({row["name"]: row for row in _load(data, run)["rows"]} for run in ("gpt2", "gpt2-avx2"))
    lines = [
        [
            name,
            *(
                f"{theirs['median_ms'] / own['median_ms']:.2f}"
                for theirs, own in zip(
                    held[name]["settings"][0]["prefill"], found["settings"][0]["prefill"], strict=True
                )
            ),
        ]
        for name, found in with_all.items()
        if name in held and not (found["skipped"] or held[name]["skipped"])
    ]
    return table(["row", *(f"prefill {count}" for count in PREFILL)], lines)


def _ratio(ours: dict, theirs: dict) -> str:
    found = ratios(ours, theirs)
    return spread(found, *found)


# The tables of each page, by page and name. Each is a function of the folder docs/data.
TABLES: dict[str, dict[str, Callable[[Path], str]]] = {
    "README.md": {"bought": _bought},
    "docs/performance.md": {
        "chosen": _chosen,
        "smollm2-135m": lambda data: _chosen(data, "smollm2-135m"),
    },
    "docs/performance/tables.md": {
        "main": _speeds("gpt2", 0),
        "pairs": _pairs,
        "batch of 8": _speeds("gpt2-batch", 1),
        "one thread": _speeds("gpt2-batch", 2),
        "medium": _speeds("gpt2-medium", 0),
    },
    "docs/performance/avx2.md": {
        "main": _speeds("gpt2-zen3", 0),
        "pairs": lambda data: _pairs(data, "gpt2-zen3"),
        "slower": _slower,
    },
    "docs/performance/amx.md": {
        "main": _speeds("gpt2-amx", 0),
        "pairs": lambda data: _pairs(data, "gpt2-amx"),
    },
    "docs/performance/tried.md": {"ablation": _speeds("gpt2-ablation", 0)},
}

if __name__ == "__main__":
    run(main)
