"""Builds and measures an artifact for each model, recipe and corpus, and writes one page of all of them."""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from cuantiza.core.cli import Parser, add_folder, add_number, add_reading, add_threads, check_numbers, source_of
from cuantiza.core.errors import UserError, run
from cuantiza.core.inputs.defaults import ARTIFACTS, CORPUS, MODEL, RECIPES, REPORTS, ROUNDS, TOKENS, WINDOW
from cuantiza.core.machine.progress import report as say
from cuantiza.core.store import folders
from cuantiza.sweep.driver import Settings, Sweep
from cuantiza.sweep.executor import Executor, Local
from cuantiza.sweep.grid import read_grid


def main(arguments: Sequence[str] | None = None) -> int:
    args = _arguments(arguments)
    settings = Settings(args.tokens, args.window, args.rounds, args.threads, args.shard)
    grid = read_grid(args.models, args.recipes, [source_of(args, corpus) for corpus in args.corpora])
    work = args.work.absolute()
    if work.resolve() == args.output.resolve():
        raise UserError(f"--output {args.output}: is the folder of --work; choose another one")
    with folders.locked(work), folders.locked(args.output):
        start = time.monotonic()
        try:
            with executor(args.ray, args.threads, work) as place:
                sweep = Sweep(grid, settings, work, place)
                sweep.run()
        except BaseException:
            clean(work)
            raise
        _publish(sweep, args.output, time.monotonic() - start)
    return 0


def executor(address: str | None, threads: int, work: Path) -> Executor:
    """The executor: this process, or the cluster at `address`. Raises UserError if this environment has no Ray."""
    if not address:
        return Local()
    try:
        from cuantiza.sweep.on_ray import OnRay
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise UserError(
            f"RAY={address}: this environment has no Ray; `make sweep RAY=...` makes one from setup/ray.txt, and `pip install 'cuantiza[sweep]'` brings it too"
        ) from None
    return OnRay(address, threads, work)


def clean(work: Path) -> None:
    """Wait until interrupted tasks have ended, and remove the temporary folders that they left among the artifacts."""
    for lock in sorted((work / "artifacts").glob(f"*/{folders.LOCK}")):
        with folders.locked(lock.parent):
            pass


def _publish(sweep: Sweep, output: Path, seconds: float) -> None:
    """Write the pages and print the table on the terminal. Raises UserError if a cell has no result."""
    from cuantiza.sweep.page import print_table, write
    from cuantiza.sweep.result import result

    found = result(sweep)
    written = write(found, output)
    print_table(found)
    counts = Counter(cost.kind for cost in sweep.costs)
    times: dict[str, float] = defaultdict(float)
    for cost in sweep.costs:
        times[cost.kind] += cost.seconds
    spent = ", ".join(f"{kind} {count} in {times[kind]:.0f} s" for kind, count in counts.items())
    say(f"tasks     {spent}; {seconds:.0f} s in all")
    say(f"sweep     {output / 'sweep.html'}: {'written' if written else 'up to date'}")
    if sweep.failed:
        cell, reason = next(iter(sweep.failed.items()))
        raise UserError(
            f"{len(sweep.failed)} of {len(sweep.grid.cells)} cells have no result, for example {cell}: {reason}; "
            "mend that and run the command again: finished measurements are kept"
        )


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("sweep", __doc__, "cuantiza sweep --models one two --recipes int8-dynamic int4-weight")
    parser.add_argument(
        "--models", nargs="*", default=[MODEL], metavar="MODEL", help=f"checkpoint folders or hub ids ({MODEL})"
    )
    parser.add_argument(
        "--recipes",
        nargs="*",
        default=list(RECIPES),
        metavar="RECIPE",
        help=f"recipes as for `cuantiza quantize` ({' '.join(RECIPES)}); fp32 is always measured too",
    )
    parser.add_argument(
        "--corpora",
        nargs="*",
        default=[CORPUS],
        metavar="CORPUS",
        help=f"files, folders or hub data set ids ({CORPUS}); the options --corpus-* hold for all of them",
    )
    add_reading(parser)
    parser.add_argument(
        "--ray",
        default=os.environ.get("RAY") or None,
        metavar="ADDRESS",
        help="run on this Ray cluster: host:port, or auto (default: only this process)",
    )
    add_number(parser, "--tokens", TOKENS, "score whole documents until this many tokens")
    add_number(parser, "--window", WINDOW, "longest context of a scored token, in tokens")
    add_number(parser, "--rounds", ROUNDS, "interleaved rounds of latency")
    add_threads(parser)
    add_number(parser, "--shard", 4096, "tokens to score per task")
    add_folder(
        parser, "--work", ARTIFACTS / "sweep", "folder for artifacts and measurements, which all machines must see"
    )
    add_folder(parser, "--output", REPORTS / "sweep", "folder for the page")
    args = parser.parse_args(arguments)
    check_numbers(args, tokens=2, window=2, rounds=1, shard=1)
    return args


if __name__ == "__main__":
    run(main)
