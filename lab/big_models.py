"""What big models cost: every step over GPT-2's four sizes, in time and memory -> docs/big-models.json and .md.

python -m lab.big_models --shapes gpt2 gpt2-medium gpt2-large gpt2-xl    measures, a shape at a time; the others that
                                                                           the JSON has stay, where they are of this machine
python -m lab.big_models --steps int8-weight-nearest                     export and this step alone, anew or besides
python -m lab.big_models --reprint                                       the page anew from the JSON

Steps are the stages' own commands. Their memory is the anonymous one: RssAnon of /proc/PID/status, summed over the
process and its children, the largest of samples 20 ms apart. Pages of a mapped file are the page cache's, which gives
them back when somebody needs them.
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
from cuantiza.core.store import digests
from cuantiza.quantize.recipes.registry import RECIPES as RECIPES_BY_NAME
from cuantiza.quantize.recipes.registry import to_json
from lab import ROOT
from lab.checkpoints.random import SHAPES, Shape, checkpoint
from lab.reliability_page import table, wrapped, write

JSON = ROOT / "docs/big-models.json"
ORDER = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
RECIPES = ("int8-dynamic", "int8-static", "int4-weight")
NEAREST = "int8-weight-nearest"
STEPS = (NEAREST, *RECIPES, "eval")
_INTRO = """\
# Big models on a small machine

GPT-2's four sizes with random weights, exported, quantized and evaluated by the commands that a user gives, on {cpu} with
{processors} processors and {memory:.0f} GB. Made by `python -m lab.big_models --shapes {shapes}`; `--reprint` prints this page anew from
[big-models.json](big-models.json).

Memory is the largest sum of anonymous memory (RssAnon) over a step's processes, in samples 20 ms apart; the checkpoint and
the files that are written are mapped or stream, and are the page cache's. `int8-weight-nearest` is the recipe `int8-weight` with weights
rounded to nearest and no calibration; the others are calibrated and rounded by GPTQ. Export includes parity, for which a model below 2 GB is
one file that ONNX Runtime copies as it loads it; a larger one has external data, which it maps. Evaluation is of {tokens} tokens in windows of 512, with one round of latency; a random model's
perplexity says nothing, so of quality the table has only how far each recipe moves it.
"""

_GROWTH = """\
Time grows with the bytes to the power below (least squares over logarithms; 1 is linear): those of the checkpoint, and those of
its blocks, without the embedding, which is three tenths of the smallest model and a twentieth of the largest and needs no
calibration. Memory grows by so many bytes for each byte of the checkpoint (least squares; 1 is a model held once).
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.big_models", description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=ORDER, default=list(ORDER), help="sizes (default: all four)")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="besides export (default: all)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens to evaluate (default 1024)")
    parser.add_argument("--work", type=Path, help="folder to work in: 20 GB for gpt2-xl (a temporary one)")
    parser.add_argument("--output", type=Path, default=JSON, help=f"the figures (default {JSON.relative_to(ROOT)})")
    parser.add_argument("--reprint", action="store_true", help="print the page anew and measure nothing")
    args = parser.parse_args()
    if args.reprint:
        write_page(args.output)
        return 0
    if not sys.platform.startswith("linux"):
        raise UserError("lab/big_models.py: reads /proc, which is Linux's; run it there")
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
        # After every size, so that what was measured is there if a larger one does not come through.
        rows = join(args.output, about, [row])
        write(args.output, json.dumps(about | {"rows": rows}, indent=1) + "\n")
    write_page(args.output)
    return 0


def join(path: Path, about: dict, rows: list[dict]) -> list[dict]:
    """`rows` and those of other sizes in `path`, smallest first, with the steps that only those there have.

    What was measured elsewhere or otherwise is left out.
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
    """Time in seconds and peak of anonymous memory in bytes of export and the `wanted` steps on one size."""
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
    """The file of a recipe in `folder`: `int8-weight`, rounded to nearest, without calibration."""
    recipe = to_json(RECIPES_BY_NAME["int8-weight"]) | {"rounding": "nearest", "smoothing": []}
    path = folder / f"{NEAREST}.json"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def step(arguments: list[object]) -> dict:
    """Run `python -m ARGUMENTS`. Raises UserError where it fails."""
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
    """Bytes of anonymous memory of a process, and of all below it; those that end meanwhile count as none."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
    except OSError:
        return 0, 0
    own = next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)
    return own, sum(sum(anonymous(int(child))) for child in children)


def growth(rows: list[dict], steps: list[str]) -> list[tuple[str, ...]]:
    """Lines of the table: exponents of each step's time, and the slope of its memory, over two or more `rows`."""
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
    """The page beside the JSON at `path`."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    shapes = " ".join(row["shape"] for row in fields["rows"])
    about = {"cpu": fields["cpu"], "memory": fields["memory_bytes"] / 1e9, "tokens": fields["tokens"]}
    steps = [name for name in ("export", *STEPS) if all(name in row["steps"] for row in fields["rows"])]
    parts = [wrapped(_INTRO.format(**about, shapes=shapes, processors=fields["processors"]))]
    for title, key, unit in (
        ("Time, s", "seconds", 1),
        ("Anonymous memory at its peak, GB", "anonymous_bytes", 1e9),
        (
            "Of that, a stage's first process: without parity, and without what sessions hold, GB",
            "anonymous_bytes_of_the_first",
            1e9,
        ),
    ):
        digits = 0 if unit == 1 else 2
        lines = [
            (
                row["shape"],
                f"{row['checkpoint_bytes'] / 1e9:.2f}",
                *(f"{row['steps'][name][key] / unit:.{digits}f}" for name in steps),
            )
            for row in fields["rows"]
        ]
        parts += [f"## {title}\n", table(("model", "checkpoint, GB", *steps), lines)]
    if len(fields["rows"]) > 1:
        parts += ["## How it grows\n", wrapped(_GROWTH), table(("", *steps), growth(fields["rows"], steps))]
    lines = [
        (
            row["shape"],
            *(f"{size / 1e9:.2f}" for size in row["file_bytes"].values()),
            *(f"{(row['ln_ppl'][name] - row['ln_ppl']['fp32']) / row['scored']:+.4f}" for name in RECIPES),
        )
        for row in fields["rows"]
        if "ln_ppl" in row
    ]
    columns = (
        "model",
        *(f"{name}, GB" for name in ("fp32", *RECIPES)),
        *(f"Δ ln ppl {name}" for name in RECIPES),
    )
    parts += ["## Files, and what each recipe moves\n", table(columns, lines)]
    write(path.with_suffix(".md"), "\n".join(parts))
    say(f"big models {path.with_suffix('.md')}: written")


if __name__ == "__main__":
    run(main)
