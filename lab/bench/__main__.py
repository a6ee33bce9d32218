"""`python -m lab.bench` measures the speed of this project's artifacts and of other libraries (peers) side by side.

It writes reports/bench/<shape>.json, .md and .svg.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from cuantiza.core.errors import UserError, run
from cuantiza.core.machine.child import Failed
from cuantiza.core.machine.hardware import check_threads
from cuantiza.core.machine.progress import report as say
from cuantiza.core.machine.progress import track, working
from cuantiza.core.store import folders
from lab.avx2 import HELD_TO, is_held
from lab.bench import rows
from lab.bench.rounds import Others, measure, settings
from lab.bench.rows import Prepared, Row
from lab.checkpoints import random as models
from lab.checkpoints.shapes import SHAPES, Shape


def main() -> int:
    args = _arguments()
    work = args.work.absolute()
    with folders.locked(work):
        for name in dict.fromkeys(args.shapes):
            with folders.staging(work / name) as temporary, working(f"bench     {name}"):
                result = benchmark(SHAPES[name], args, work, temporary)
            name += ("-ablation" if args.ablation else "") + (f"-{HELD_TO.lower()}" if is_held() else "")
            _publish(result, name, args.output)
    return 0


def benchmark(shape: Shape, args: argparse.Namespace, work: Path, temporary: Path) -> dict:
    """Prepare and measure all rows of one shape. Files in `work` are kept for later runs; `temporary` is not."""
    from lab.bench.schema import result

    artifacts = work / shape.name
    chosen = _rows(args, artifacts, work / "peers" / shape.name)
    checkpoint = models.checkpoint(shape, work / "checkpoints")
    rows.export(checkpoint, work)
    prepared, failed = prepare(chosen, shape, checkpoint, artifacts, temporary)
    baseline = args.baseline or chosen[0].name
    for needed in (chosen[0].name, baseline):
        if needed in failed:
            raise UserError(f"{needed}: every row is compared with it, but it could not be made ({failed[needed]})")
    wanted = settings(args.threads, args.batches)
    ids = models.prompts(shape, max(args.batches), max(setting.context for setting in wanted))
    present = [row for row in chosen if row.name in prepared]
    others = Others()
    try:
        measured, answers, limits = measure(
            present, baseline, wanted, ids, args.rounds, temporary, f"bench {shape.name}"
        )
    except Failed as error:
        raise UserError(f"the machine's limits could not be measured: {error}") from None
    busy = others.processors()
    return result(shape, chosen, prepared, failed, wanted, measured, answers, limits, args.rounds, baseline, busy)


def prepare(
    chosen: list[Row], shape: Shape, checkpoint: Path, artifacts: Path, temporary: Path
) -> tuple[dict[str, Prepared], dict[str, str]]:
    """Make the files of all rows: ({row: its files}, {row: why it has none}).

    Peers come last, because some of them run one of our artifacts.
    """
    prepared: dict[str, Prepared] = {}
    failed: dict[str, str] = {}
    own = [row for row in chosen if row.is_ours]
    peers = [row for row in chosen if not row.is_ours]
    # A peer may run any of our artifacts, so all of them are made, even if not all are measured.
    extra = [row for row in rows.our_rows(artifacts) if row.kind not in {row.kind for row in own}] if peers else []
    inputs: dict = {}
    order = [*own, *extra, *peers]
    for row in track(order, f"prepare {shape.name}", len(order)):
        try:
            if row.is_ours:
                prepared[row.name] = rows.prepare_ours(row, shape, checkpoint)
            else:
                inputs = inputs or rows.peer_inputs(checkpoint, artifacts)
                prepared[row.name] = rows.prepare_peer(row, checkpoint, artifacts, inputs, temporary)
        except Failed as error:
            failed[row.name] = str(error)
            say(f"bench     {row.name}: skipped ({error})")
    return prepared, failed


def _rows(args: argparse.Namespace, artifacts: Path, peers: Path) -> list[Row]:
    if args.ablation:
        found = rows.ablation_rows(artifacts)
    else:
        found = rows.our_rows(artifacts) + ([] if args.without_peers else rows.peer_rows(peers))
    return rows.select(found, args.rows, args.baseline)


def _publish(result: dict, name: str, output: Path) -> None:
    """Write <name>.json, .md and .svg to the folder `output`, and print the main table on the terminal."""
    from lab.bench.pages.markdown import page, print_table
    from lab.bench.pages.plot import draw

    output.mkdir(parents=True, exist_ok=True)
    with folders.staging(output / name) as staged:
        (staged / f"{name}.json").write_text(json.dumps(result, ensure_ascii=False) + "\n", encoding="utf-8")
        draw(result, staged / f"{name}.svg")
        (staged / f"{name}.md").write_text(page(result, name), encoding="utf-8")
        for file in sorted(staged.iterdir()):
            shutil.move(file, output / file.name)
    print_table(result)
    say(f"bench     {output / name}.md: written")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m lab.bench", description=__doc__)
    parser.add_argument(
        "--shapes", nargs="+", default=["es-mini", "gpt2"], choices=SHAPES, help="models (default es-mini gpt2)"
    )
    parser.add_argument("--rows", nargs="+", metavar="PATTERN", help="rows by name, such as 'int8-*' (default all)")
    parser.add_argument("--without-peers", action="store_true", help="measure only our own rows")
    parser.add_argument(
        "--ablation",
        action="store_true",
        help="measure the gain of each of our design choices instead of the usual rows",
    )
    parser.add_argument("--baseline", metavar="ROW", help="row that speed-ups are relative to (default: the first row)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument(
        "--threads",
        nargs="+",
        type=int,
        default=[1, 2],
        help="numbers of threads; the largest is the main setting (default 1 2)",
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="batch sizes (default 1 8)")
    default = Path("artifacts/bench")
    parser.add_argument(
        "--work",
        type=Path,
        default=default,
        help=f"folder where checkpoints and artifacts are kept (default {default})",
    )
    default = Path("reports/bench")
    parser.add_argument("--output", type=Path, default=default, help=f"folder for the reports (default {default})")
    args = parser.parse_args()
    for threads in args.threads:
        check_threads(threads)
    for option in ("rounds", "batches"):
        given = getattr(args, option)
        if min(given if isinstance(given, list) else [given]) < 1:
            raise UserError(f"--{option}: has a number below 1; give 1 or more")
    return args


if __name__ == "__main__":
    run(main)
