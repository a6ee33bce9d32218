"""`python -m lab.fuzz` gives each reader thousands of broken files of its format and prints how it reacted."""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path

from cuantiza.core.errors import UserError, run
from cuantiza.core.machine.hardware import cpu_name
from cuantiza.core.machine.progress import report as say
from cuantiza.core.machine.progress import track
from cuantiza.core.store.digests import versions
from lab.fuzz.campaign import campaign
from lab.fuzz.formats import FORMATS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.fuzz", description=__doc__)
    parser.add_argument(
        "--formats",
        nargs="+",
        default=list(FORMATS),
        choices=FORMATS,
        metavar="NAME",
        help="formats to break (default: all)",
    )
    parser.add_argument("--cases", type=int, default=10_000, help="cases per format (default 10,000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random cases (default 0)")
    parser.add_argument(
        "--engine",
        choices=("hypothesis", "atheris"),
        default="hypothesis",
        help="generator of the cases (default hypothesis)",
    )
    parser.add_argument(
        "--findings", type=Path, default=Path("reports/fuzz"), help="folder for the files that were findings"
    )
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    args = parser.parse_args()
    if args.engine == "atheris" and not find_spec("atheris"):
        raise UserError("--engine atheris: atheris is not installed; run `pip install atheris` (Linux only)")
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: its folder does not exist; make it, or name another file")
    if args.cases < 1:
        raise UserError(f"--cases {args.cases}: give 1 or more")
    rows = [
        campaign(name, args.cases, args.seed, args.engine, args.findings)
        for name in track(args.formats, "fuzz", len(args.formats))
    ]
    for row in rows:
        say(
            f"{row['format']:20} {row['cases']:6} cases, {row['accepted']:5} accepted, {row['seconds']:6.0f} s: {row['finding'] or 'no finding'}"
        )
    if args.json:
        about = {"engine": args.engine, "seed": args.seed, "cases": args.cases, "cpu": cpu_name()}
        about["versions"] = versions(args.engine, "onnx", "safetensors", "torch")
        args.json.write_text(json.dumps({**about, "formats": rows}, indent=1) + "\n")
    return 1 if any(row["finding"] for row in rows) else 0


if __name__ == "__main__":
    run(main)
