"""Measures how much faster `make sweep` gets with more machines, and writes docs/data/sweep-speedup.json and docs/sweep-speedup.md.

make sweep-speedup                measures, in the environment of setup/ray.txt
python -m lab.speedup --reprint   writes the page again from the JSON

A small grid runs without Ray, on one Ray worker, and on two. A worker is a Ray node with one processor of this machine,
to which its processes are bound; the cluster's head offers no processor. Every run starts with nothing, and all runs
must give the same quality figures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from cuantiza.core.errors import UserError, run
from cuantiza.core.inputs.corpus import Source
from cuantiza.core.machine.hardware import cpu_name
from cuantiza.core.machine.progress import report as say
from cuantiza.core.store import digests
from cuantiza.sweep.driver import Settings, Sweep
from cuantiza.sweep.executor import Local
from cuantiza.sweep.grid import read_grid
from lab import DATA, ROOT, page_folder
from lab.checkpoints.hard import make
from lab.pages import filled, write
from lab.speedup.ray_cluster import Cluster

JSON = DATA / "sweep-speedup.json"
RECIPES = ("int8-dynamic", "int8-static", "int8-weight", "int4-weight", "fp16")
SETTINGS = Settings(tokens=12288, window=512, rounds=3, threads=1, shard=2048)
WORKERS = (0, 1, 2)  # 0: this process alone, without Ray
# The page estimates how long a grid of this size takes.
PLAN = {"models": 20, "recipes": 10, "corpora": 5}
PLAN_WORKERS = (1, 2, 10, 50)
KINDS = ("export", "quantize", "quality", "latency")


@dataclass(frozen=True)
class Run:
    """One run of the grid: wall time in seconds, the seconds of every task by kind, and the quality fields by cell."""

    seconds: float
    tasks: dict[str, list[float]]
    quality: dict[str, dict]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.speedup", description=__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="runs of the grid for each number of workers (default 2)")
    parser.add_argument(
        "--output", type=Path, default=JSON, help=f"JSON file of the figures (default {JSON.relative_to(ROOT)})"
    )
    parser.add_argument("--reprint", action="store_true", help="write the page again from the JSON, without measuring")
    args = parser.parse_args()
    if not args.reprint:
        if args.rounds < 1:
            raise UserError(f"--rounds {args.rounds}: give 1 or more")
        write(args.output, json.dumps(measure(args.rounds), indent=1) + "\n")
    fields = json.loads(args.output.read_text(encoding="utf-8"))
    target = (page_folder(args.output) / args.output.name).with_suffix(".md")
    write(target, page(fields))
    say(f"speed-up  {target}: written")
    return 0


def measure(rounds: int) -> dict:
    """Run the grid with each number of workers, in turns. Raises UserError if two runs differ in a quality figure."""
    processors = sorted(os.sched_getaffinity(0))
    if len(processors) < max(WORKERS):
        raise UserError(
            f"this machine has {len(processors)} processors; use one with at least {max(WORKERS)}, one for each worker"
        )
    runs: dict[int, list[Run]] = {workers: [] for workers in WORKERS}
    with tempfile.TemporaryDirectory(prefix="cuantiza-speedup-") as folder:
        twin = Path(folder) / "twin"
        make("twin", ROOT / "models/es-mini", twin)
        models = [str(ROOT / "models/es-mini"), str(twin)]
        for number in range(rounds):
            for workers in WORKERS:
                work = Path(folder) / f"{number}-{workers}"
                runs[workers].append(one(models, workers, processors, work))
                say(f"speed-up  round {number + 1}, workers {workers}: {runs[workers][-1].seconds:.0f} s")
    whole = runs[0][0].quality
    if any(other.quality != whole for own in runs.values() for other in own):
        raise UserError("two runs differ in a quality figure, which is a bug; please report it")
    return {
        "cpu": cpu_name(),
        "versions": digests.versions("ray", "onnxruntime", "numpy"),
        "models": [Path(model).name for model in models],
        "recipes": RECIPES,
        "tokens": SETTINGS.tokens,
        "cells": len(whole),
        "runs": {
            str(workers): [{"seconds": item.seconds, "tasks": item.tasks} for item in own]
            for workers, own in runs.items()
        },
    }


def one(models: list[str], workers: int, processors: list[int], work: Path) -> Run:
    """Run the grid from nothing with `workers` Ray workers; 0 means this process alone, without Ray."""
    grid = read_grid(models, list(RECIPES), [Source(str(ROOT / "corpus/es"))])
    work.mkdir()
    before = os.sched_getaffinity(0)
    try:
        if workers == 0:
            os.sched_setaffinity(0, processors[:1])
            return _done(Sweep(grid, SETTINGS, work, Local()))
        from cuantiza.sweep.on_ray import OnRay

        with (
            Cluster(Path(sys.prefix), [[], *([processor] for processor in processors[:workers])]) as cluster,
            OnRay(cluster.address, SETTINGS.threads, work) as place,
        ):
            return _done(Sweep(grid, SETTINGS, work, place))
    finally:
        os.sched_setaffinity(0, before)


def _done(sweep: Sweep) -> Run:
    start = time.monotonic()
    sweep.run()
    seconds = time.monotonic() - start
    if sweep.failed:
        raise UserError(f"a cell has no result: {next(iter(sweep.failed.values()))}")
    tasks = {kind: [cost.seconds for cost in sweep.costs if cost.kind == kind] for kind in KINDS}
    return Run(seconds, tasks, {str(cell): fields for cell, fields in sorted(sweep.quality.items(), key=str)})


def page(fields: dict) -> str:
    """The text of docs/sweep-speedup.md, from the content of docs/data/sweep-speedup.json."""
    runs = {int(workers): own for workers, own in fields["runs"].items()}
    wall = {workers: statistics.median(item["seconds"] for item in own) for workers, own in runs.items()}
    lines = []
    for workers, own in runs.items():
        spent = [statistics.median(sum(item["tasks"][kind]) for item in own) for kind in KINDS]
        times = " ".join(f"{item['seconds']:.0f}" for item in own)
        name = "one process, no Ray" if workers == 0 else f"{workers} worker" + ("s" if workers > 1 else "")
        lines.append((name, times, f"{wall[1] / wall[workers]:.2f}", *(f"{value:.0f}" for value in spent)))
    counts = {kind: len(runs[1][0]["tasks"][kind]) for kind in KINDS}
    scored = sum(sum(item["tasks"]["quality"]) for item in runs[1])
    typical = {kind: statistics.median(x for item in runs[1] for x in item["tasks"][kind]) for kind in KINDS}
    typical["quality"] = scored / (len(runs[1]) * fields["cells"])
    artifacts = PLAN["models"] * (PLAN["recipes"] - 1) * PLAN["corpora"]
    cells = PLAN["models"] * PLAN["recipes"] * PLAN["corpora"]
    amount = {"export": PLAN["models"], "quantize": artifacts, "quality": cells, "latency": artifacts + PLAN["models"]}
    named = {"export": "exports", "quantize": "quantizations", "quality": "cells to score", "latency": "latencies"}
    said = ", ".join(f"{amount[kind]} {named[kind]} of {typical[kind]:.1f} s" for kind in KINDS)
    rows = []
    for workers in PLAN_WORKERS:
        steps = [max(typical[kind], amount[kind] * typical[kind] / workers) for kind in KINDS]
        rows.append((str(workers), *(f"{value / 60:.1f}" for value in steps), f"{sum(steps) / 3600:.2f}"))
    return filled(
        Path(__file__).resolve().parent / "sweep-speedup.md.j2",
        cells=fields["cells"],
        recipes=len(fields["recipes"]),
        tokens=fields["tokens"],
        rounds=len(runs[0]),
        cpu=fields["cpu"],
        where_columns=["where", "wall, s", "speed-up", *(f"{counts[kind]} × {kind}, s" for kind in KINDS)],
        where_rows=lines,
        plan=PLAN,
        planned=f"{cells:,}",
        tasks=said,
        plan_columns=["workers", *(f"{kind}, min" for kind in KINDS), "all, h"],
        plan_rows=rows,
    )


if __name__ == "__main__":
    run(main)
