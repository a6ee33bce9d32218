"""`python -m cuantiza.sweep` builds and measures an artifact for each model, recipe and corpus, and writes one page."""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from pathlib import Path

from cuantiza.core.errors import UserError, run
from cuantiza.core.machine.progress import report as say
from cuantiza.core.machine.threads import check_threads, default_threads
from cuantiza.core.store import folders
from cuantiza.sweep.driver import Settings, Sweep
from cuantiza.sweep.executor import Executor, Local
from cuantiza.sweep.grid import read_grid


def main() -> int:
    args = _arguments()
    settings = Settings(args.tokens, args.window, args.rounds, args.threads, args.shard)
    grid = read_grid(args.models, args.recipes, args.corpora)
    work = args.work.absolute()
    if work == args.output.absolute():
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
            f"RAY={address}: this environment has no Ray; use one made from setup/ray.txt (`make sweep RAY=...` does)"
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
    counts, times = Counter(cost.kind for cost in sweep.costs), Counter()
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


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cuantiza.sweep", description=__doc__)
    parser.add_argument(
        "--models",
        nargs="*",
        default=["models/es-mini"],
        metavar="MODEL",
        help="checkpoint folders or hub ids (default models/es-mini)",
    )
    parser.add_argument(
        "--recipes",
        nargs="*",
        default=["int8-dynamic", "int8-static"],
        metavar="RECIPE",
        help="recipes as for `python -m quantize` (default int8-dynamic int8-static); fp32 is always measured too",
    )
    parser.add_argument(
        "--corpora",
        nargs="*",
        default=["corpus/es"],
        metavar="CORPUS",
        help="files, folders or hub dataset ids (default corpus/es)",
    )
    parser.add_argument(
        "--ray",
        default=os.environ.get("RAY") or None,
        metavar="ADDRESS",
        help="run on this Ray cluster: host:port, or auto (default: only this process)",
    )
    parser.add_argument(
        "--tokens", type=int, default=12288, help="score whole documents until this many tokens (default 12288)"
    )
    parser.add_argument(
        "--window", type=int, default=512, help="longest context of a scored token, in tokens (default 512)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds of latency (default 3)")
    parser.add_argument(
        "--threads", type=int, default=default_threads(), help="threads of every runtime (default: all processors here)"
    )
    parser.add_argument(
        "--shard", type=int, default=4096, metavar="TOKENS", help="tokens to score per task (default 4096)"
    )
    default = Path("artifacts/sweep")
    parser.add_argument(
        "--work",
        type=Path,
        default=default,
        help=f"folder for artifacts and measurements; all machines must see it (default {default})",
    )
    default = Path("reports/sweep")
    parser.add_argument("--output", type=Path, default=default, help=f"folder for the page (default {default})")
    args = parser.parse_args()
    check_threads(args.threads)
    for option, least in (("tokens", 2), ("window", 2), ("rounds", 1), ("shard", 1)):
        if getattr(args, option) < least:
            raise UserError(f"--{option} {getattr(args, option)}: give {least} or more")
    return args


if __name__ == "__main__":
    run(main)
