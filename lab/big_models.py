"""Measures time and memory of every step on GPT-2's four sizes, and writes docs/data/big-models.json and docs/big-models.md.

python -m lab.big_models --shapes gpt2 gpt2-medium gpt2-large gpt2-xl    measures these sizes, one after the other
python -m lab.big_models --steps int8-weight-nearest                     measures only export and this step
python -m lab.big_models --reprint                                       writes the page again from the JSON

Figures of other sizes and steps stay in the JSON if they were measured on this machine with the same versions.

The steps are the stages' own commands. Their memory is the anonymous memory (RssAnon in /proc/PID/status), summed over
the process and its children; samples are 20 ms apart and the largest counts. Pages of a mapped file do not count: they
belong to the page cache, which frees them when memory is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from math import log
from pathlib import Path
from statistics import linear_regression

from cuantiza.core.errors import UserError, run
from cuantiza.core.machine.hardware import cpu_name, memory_bytes
from cuantiza.core.machine.progress import report as say
from cuantiza.core.machine.progress import working
from cuantiza.core.pages import signed
from cuantiza.core.store import digests
from cuantiza.quantize.recipes.registry import RECIPES as RECIPES_BY_NAME
from cuantiza.quantize.recipes.registry import to_json
from lab import DATA, ROOT, page_folder
from lab.checkpoints.random import checkpoint
from lab.checkpoints.shapes import SHAPES, Shape
from lab.pages import filled, write

JSON = DATA / "big-models.json"
ORDER = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
RECIPES = ("int8-dynamic", "int8-static", "int4-weight")
NEAREST = "int8-weight-nearest"
STEPS = (NEAREST, *RECIPES, "eval")
# (title, field of a step, bytes or seconds in a unit) of each table of steps.
_TABLES = (
    ("Time, s", "seconds", 1),
    ("Anonymous memory at its peak, GB", "anonymous_bytes", 1e9),
    (
        "Of that, a stage's first process: without parity, and without what sessions hold, GB",
        "anonymous_bytes_of_the_first",
        1e9,
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.big_models", description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=ORDER, default=list(ORDER), help="sizes (default: all four)")
    parser.add_argument(
        "--steps", nargs="+", choices=STEPS, default=STEPS, help="steps to measure, besides export (default: all)"
    )
    parser.add_argument("--tokens", type=int, default=1024, help="tokens to evaluate (default 1024)")
    parser.add_argument(
        "--work", type=Path, help="folder for temporary files; gpt2-xl takes 20 GB (default: the system's)"
    )
    parser.add_argument(
        "--output", type=Path, default=JSON, help=f"JSON file of the figures (default {JSON.relative_to(ROOT)})"
    )
    parser.add_argument("--reprint", action="store_true", help="write the page again from the JSON, without measuring")
    args = parser.parse_args()
    if args.reprint:
        write_page(args.output)
        return 0
    if not sys.platform.startswith("linux"):
        raise UserError("lab/big_models.py: reads /proc, which only Linux has; run it on Linux")
    about = {
        "cpu": cpu_name(),
        "processors": os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "tokens": args.tokens,
        "versions": digests.versions("onnxruntime", "onnx", "onnx-ir", "numpy", "torch"),
    }
    for name in args.shapes:
        with tempfile.TemporaryDirectory(prefix="cuantiza-big-", dir=args.work) as work:
            row = measure(SHAPES[name], Path(work), args.tokens, args.steps)
        # Write after every size, so that these figures are safe if a larger size fails.
        rows = join(args.output, about, [row])
        write(args.output, json.dumps(about | {"rows": rows}, indent=1) + "\n")
    write_page(args.output)
    return 0


def join(path: Path, about: dict, rows: list[dict]) -> list[dict]:
    """Merge `rows` with those in the file `path`: other sizes and other steps are kept. The smallest size comes first.

    The file's rows are dropped if they were measured with other conditions than `about`, such as another machine.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        known = found.pop("rows") if found.items() >= about.items() else []
    except FileNotFoundError:
        known = []
    own = {row["shape"]: row for row in known}
    for row in rows:
        before = own.get(row["shape"], {"steps": {}})
        own[row["shape"]] = before | row | {"steps": before["steps"] | row["steps"]}
    return [own[name] for name in ORDER if name in own]


def measure(shape: Shape, work: Path, tokens: int, wanted: Sequence[str]) -> dict:
    """Measure export and the `wanted` steps on one size: time in seconds, and peak of anonymous memory in bytes."""
    model, out, reports = checkpoint(shape, work), work / "artifacts", work / "reports"
    recipes = {NEAREST: nearest_recipe(work), **{name: name for name in RECIPES}}
    stages = {
        "export": ["export", "--model", model, "--output", out],
        **{
            name: ["quantize", "--model", model, "--recipes", recipe, "--output", out]
            for name, recipe in recipes.items()
        },
        "eval": [
            *("eval", "--model", model, "--recipes", "fp32", *RECIPES, "--artifacts", out, "--output", reports),
            *("--without-torch", "--tokens", tokens, "--rounds", 1),
        ],
    }
    steps = {}
    for name, command in stages.items():
        if name not in ("export", *wanted):
            continue
        steps[name] = step(command)
        say(f"{shape.name:12} {name:20} {steps[name]['seconds']:6.0f} s {steps[name]['anonymous_bytes'] / 1e9:6.2f} GB")
    row = {
        "shape": shape.name,
        "checkpoint_bytes": (model / "model.safetensors").stat().st_size,
        "steps": steps,
    }
    if "eval" not in steps:
        return row
    report = json.loads((reports / model.name / "report.json").read_text(encoding="utf-8"))
    sizes = {path.name: sum(file.stat().st_size for file in path.glob("model.onnx*")) for path in out.glob("*/*")}
    return row | {
        "file_bytes": {name: sizes[name] for name in ("fp32", *RECIPES)},
        "ln_ppl": {row["name"]: sum(row["nll_by_document"]) for row in report["artifacts"]},
        "scored": sum(report["corpus"]["document_tokens"]),
    }


def nearest_recipe(folder: Path) -> Path:
    """Write a recipe to `folder` and return its path: `int8-weight` rounded to nearest, without calibration."""
    recipe = to_json(RECIPES_BY_NAME["int8-weight"]) | {"rounding": "nearest", "smoothing": []}
    path = folder / f"{NEAREST}.json"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def step(arguments: list[object]) -> dict:
    """Run `python -m ARGUMENTS` and return its time and memory. Raises UserError if it fails."""
    start, peak, main = time.monotonic(), 0, 0
    with tempfile.TemporaryFile() as log, working(str(arguments[0])):
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=log
        )
        while process.poll() is None:
            tree = anonymous(process.pid)
            peak, main = max(peak, sum(tree)), max(main, tree[0])
            time.sleep(0.02)
        log.seek(0)
        errors = log.read().decode(errors="replace").strip().splitlines()
    if process.returncode:
        raise UserError(
            f"{arguments[0]} {arguments[-1]}: ended with {process.returncode} ({errors[-1] if errors else ''})"
        )
    return {"seconds": time.monotonic() - start, "anonymous_bytes": peak, "anonymous_bytes_of_the_first": main}


def anonymous(pid: int) -> tuple[int, int]:
    """Anonymous memory in bytes of (a process, all its descendants). A process that has ended counts as 0."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
    except OSError:
        return 0, 0
    own = next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)
    return own, sum(sum(anonymous(int(child))) for child in children)


def growth(rows: list[dict], steps: list[str]) -> list[tuple[str, ...]]:
    """The lines of the growth table, fitted over two or more `rows`.

    For each step they give the exponents of its time over the checkpoint's and the blocks' bytes, and the slope of its
    memory over the checkpoint's bytes.
    """
    shapes = [SHAPES[row["shape"]] for row in rows]
    whole = [row["checkpoint_bytes"] for row in rows]
    blocks = [
        size - 4 * shape.width * (shape.vocabulary + shape.positions) for size, shape in zip(whole, shapes, strict=True)
    ]

    def power(sizes: list[int], name: str) -> str:
        seconds = [log(row["steps"][name]["seconds"]) for row in rows]
        return f"{linear_regression([log(size) for size in sizes], seconds).slope:.2f}"

    def slope(name: str) -> str:
        return f"{linear_regression(whole, [row['steps'][name]['anonymous_bytes'] for row in rows]).slope:.2f}"

    return [
        ("time, power of the checkpoint's bytes", *(power(whole, name) for name in steps)),
        ("time, power of the blocks' bytes", *(power(blocks, name) for name in steps)),
        ("memory, bytes for a byte", *map(slope, steps)),
    ]


def write_page(path: Path) -> None:
    """Write the Markdown page of the JSON file `path` into its folder (`page_folder`)."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    rows = fields["rows"]
    steps = [name for name in ("export", *STEPS) if all(name in row["steps"] for row in rows)]
    tables = []
    for title, key, unit in _TABLES:
        digits = 0 if unit == 1 else 2
        lines = [
            [
                row["shape"],
                f"{row['checkpoint_bytes'] / 1e9:.2f}",
                *(f"{row['steps'][name][key] / unit:.{digits}f}" for name in steps),
            ]
            for row in rows
        ]
        tables.append((title, lines))
    files = [
        [
            row["shape"],
            *(f"{size / 1e9:.2f}" for size in row["file_bytes"].values()),
            *(signed((row["ln_ppl"][name] - row["ln_ppl"]["fp32"]) / row["scored"], 4, "en") for name in RECIPES),
        ]
        for row in rows
        if "ln_ppl" in row
    ]
    columns = ["model", *(f"{name}, GB" for name in ("fp32", *RECIPES)), *(f"Δ ln ppl {name}" for name in RECIPES)]
    text = filled(
        Path(__file__).resolve().parent / "templates/big-models.md.j2",
        cpu=fields["cpu"],
        processors=fields["processors"],
        memory=f"{fields['memory_bytes'] / 1e9:.0f}",
        tokens=fields["tokens"],
        shapes=" ".join(row["shape"] for row in rows),
        steps=steps,
        tables=tables,
        growth=growth(rows, steps) if len(rows) > 1 else [],
        columns=columns,
        files=files,
    )
    target = (page_folder(path) / path.name).with_suffix(".md")
    write(target, text)
    say(f"big models {target}: written")


if __name__ == "__main__":
    run(main)
