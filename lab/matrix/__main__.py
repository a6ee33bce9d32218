"""`python -m lab.matrix` runs each artifact in each runtime, and writes docs/data/runtimes.json and docs/runtimes.md."""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import asdict
from pathlib import Path

from cuantiza.core.cli import add_corpus, source_of
from cuantiza.core.errors import UserError, run
from cuantiza.core.inputs.checkpoints import model_name
from cuantiza.core.inputs.corpus import load_test
from cuantiza.core.machine.hardware import cpu_name, default_threads
from cuantiza.core.machine.progress import report, track
from cuantiza.core.store.folders import staging
from lab.matrix.matrix import (
    FLOATS,
    PREFILL,
    RECIPES,
    TOKENS,
    artifacts,
    cells,
    make_job,
    make_reference,
    target,
    to_json,
    tolerance,
)
from lab.matrix.page import EMULATION, JSON, MARKDOWN, SCHEMA, page
from lab.matrix.programs import programs


def main() -> int:
    known = programs()
    parser = argparse.ArgumentParser(prog="python -m lab.matrix", description=__doc__)
    parser.add_argument("--model", default="models/es-mini", help="the model that was exported: folder or hub id")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), help="folder of the artifacts")
    parser.add_argument(
        "--recipes",
        nargs="+",
        default=list(RECIPES),
        metavar="RECIPE",
        help="artifacts (default: all with their twins)",
    )
    parser.add_argument(
        "--runtimes", nargs="+", default=list(known), metavar="NAME", help=f"of {', '.join(known)} (default: all)"
    )
    parser.add_argument(
        "--threads", type=int, default=default_threads(), help="threads of every runtime (default: all)"
    )
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of the page (default docs)")
    parser.add_argument("--reprint", action="store_true", help="run nothing: print the page again from its JSON")
    add_corpus(parser)
    args = parser.parse_args()
    if args.reprint:
        return reprint(args.output)
    if unknown := [name for name in args.runtimes if name not in known]:
        raise UserError(f"--runtimes {' '.join(unknown)}: no such runtime; choose from {', '.join(known)}")
    if args.threads < 1:
        raise UserError(f"--threads {args.threads}: give a number from 1")
    args.output.mkdir(parents=True, exist_ok=True)
    recipes = tuple(dict.fromkeys(("fp32", *args.recipes)))  # fp32 shows how much quantization changes
    found = artifacts(args.artifacts / model_name(args.model), recipes)
    job = make_job(found["fp32"].path, load_test(source_of(args)), args.threads)
    chosen = [known[name] for name in dict.fromkeys(args.runtimes)]
    rows: dict[str, dict] = {}
    results = []
    original = make_reference(found["fp32"].path, job)
    every = cells(found, chosen, job, original)
    for cell, quantization in track(every, "runtimes", len(found) * len(chosen)):
        rows[cell.recipe] = {
            "recipe": cell.recipe,
            "target": target(cell.recipe),
            "quantization": asdict(quantization),
            "tolerance": tolerance(quantization),
        }
        results.append(to_json(cell))
        report(
            f"runtimes  {cell.recipe} in {cell.runtime}: {cell.status}{f' ({cell.reason.short})' if cell.reason else ''}"
        )
    result = {
        "schema": SCHEMA,
        "model": model_name(args.model),
        "artifacts": [[name, artifact.digest] for name, artifact in found.items()],
        "machine": {"cpu": cpu_name(), "system": platform.platform(), "threads": args.threads},
        "date": time.strftime("%Y-%m-%d"),
        "tokens": TOKENS,
        "prefill": PREFILL,
        "prompt": job["prompt"],
        "generated": job["generate"],
        "floats": FLOATS,
        "deviation": float(original.whole.std()),
        "rows": [rows[name] for name in recipes],
        "runtimes": [{"name": item.name, "title": item.title, "missing": item.missing()} for item in chosen],
        "cells": results,
    }
    publish(result, args.output)
    return 0


def publish(result: dict, output: Path) -> None:
    """Write both files; each is renamed into place."""
    (output / JSON).parent.mkdir(parents=True, exist_ok=True)
    with staging(output / MARKDOWN) as work:
        (work / JSON).parent.mkdir()
        (work / JSON).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (work / MARKDOWN).write_text(page(result, read_emulation(output)), encoding="utf-8")
        for name in (MARKDOWN, JSON):
            (work / name).replace(output / name)
    report(f"runtimes  {output / MARKDOWN}: written")


def reprint(output: Path) -> int:
    """Write the page again from the JSON below `output`. Raises UserError if that is missing or has another schema."""
    path = output / JSON
    result = _read(path)
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise UserError(f"{path}: is not a matrix of runtimes ({SCHEMA}); make it with `make runtimes`")
    publish(result, output)
    return 0


def read_emulation(output: Path) -> dict | None:
    """The results of `python -m lab.matrix.emulation`; None if it has not run."""
    return _read(output / EMULATION) if (output / EMULATION).is_file() else None


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: is not there; make it with `make runtimes`") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error}); make it again") from None


if __name__ == "__main__":
    run(main)
