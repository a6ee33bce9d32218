"""`python -m eval compare BASE HEAD`: is anything worse than its budget? Status 0: no, 1: yes, 2: not comparable."""

from __future__ import annotations

import argparse
import os
import traceback
from collections.abc import Sequence
from pathlib import Path

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import add_arguments, load_splits, source_of
from cuantiza.core.machine.threads import check_threads, default_threads
from cuantiza.core.store import artifact, folders

LEAST_ROUNDS = 4  # with fewer, the first stage could never find anything


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m eval compare", description=__doc__)
    options.add_argument("base", metavar="BASE", help="what was: a report.json, its folder, or artifacts/<model>")
    options.add_argument("head", metavar="HEAD", help="what is now, of the same kind")
    options.add_argument("--recipes", nargs="+", metavar="NAME", help="what to compare (default: all that BASE has)")
    options.add_argument(
        "--budgets", type=Path, default=Path("budgets.toml"), help="what may become worse, by how much"
    )
    options.add_argument("--without-latency", action="store_true", help="compare quality and size alone")
    options.add_argument(
        "--format",
        choices=("terminal", "github"),
        default="terminal",
        help="github: append the page to $GITHUB_STEP_SUMMARY too, or print it where that is not set",
    )
    options.add_argument("--output", type=Path, default=Path("reports/compare.md"), help="the page, in Markdown")
    folders = options.add_argument_group("folders of artifacts", "are evaluated here, base and head in turns")
    folders.add_argument(
        "--tokens", type=int, default=12288, help="score whole documents until this many tokens (default 12288)"
    )
    folders.add_argument(
        "--window", type=int, default=512, help="longest context of a scored token, in tokens (default 512)"
    )
    folders.add_argument(
        "--rounds", type=int, default=8, help="rounds of latency, before what looks bad is measured again (default 8)"
    )
    folders.add_argument("--threads", type=int, default=default_threads(), help="threads (default: all processors)")
    add_arguments(folders)
    return options


def main(arguments: Sequence[str]) -> int:
    """The status; 3 for a fault of our own, since 1 is a regression and nothing else."""
    try:
        return _compare(arguments)
    except (UserError, OSError):
        raise
    except Exception:
        traceback.print_exc()
        return 3


def _compare(arguments: Sequence[str]) -> int:
    args = parser().parse_args(arguments)
    check_threads(args.threads)
    for option, least in (("tokens", 2), ("window", 2), ("rounds", LEAST_ROUNDS)):
        if not least <= getattr(args, option) <= 10**9:
            raise UserError(f"--{option} {getattr(args, option)}: give a number from {least} on")
    if args.output.is_dir():
        raise UserError(f"--output {args.output}: is a folder; name a file, such as {args.output / 'compare.md'}")
    from cuantiza.eval.compare.budgets import read_budgets
    from cuantiza.eval.compare.folders import is_artifacts

    budgets = read_budgets(args.budgets)
    base, head = _path("BASE", args.base), _path("HEAD", args.head)
    kinds = [is_artifacts(path) and not (path / "report.json").is_file() for path in (base, head)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"{base} and {head}: one is a folder of artifacts, the other a report; give two reports, or two folders such as artifacts/es-mini"
        )
    comparison = _folders(args, base, head, budgets) if kinds[0] else _reports(args, base, head, budgets)
    if not args.recipes:
        found = {check.recipe for check in comparison.checks}
        comparison.notes.extend(
            f"{args.budgets}: [recipes.{name}] is of no artifact that was compared"
            for name in budgets.recipes
            if name not in found
        )
    return _show(comparison, args)


def _path(side: str, given: str) -> Path:
    """Raises UserError where there is nothing to compare at `given`."""
    if not given:
        raise UserError(
            f"{side}=: is empty; give a report.json, its folder, or a folder of artifacts such as artifacts/es-mini"
        )
    path = Path(given)
    if not path.exists():
        raise UserError(f"{side}={given}: does not exist; give a report.json, its folder, or a folder of artifacts")
    if (path / artifact.MANIFEST).is_file():
        raise UserError(
            f"{side}={given}: is a single artifact; give the folder that holds it, and --recipes {path.name}"
        )
    if path.is_dir() and not (path / "report.json").is_file():
        from cuantiza.eval.compare.folders import is_artifacts

        if not is_artifacts(path):
            raise UserError(
                f"{side}={given}: holds neither report.json nor artifacts; give a report, or a folder such as artifacts/es-mini"
            )
    return path


def _reports(args: argparse.Namespace, base: Path, head: Path, budgets):
    from cuantiza.eval.compare.decide import Comparison, compare_reports
    from cuantiza.eval.compare.reports import read_side

    one, other = read_side(base), read_side(head)
    checks, new = compare_reports(one, other, budgets, args.recipes, not args.without_latency)
    theirs, ours = one.report, other.report
    notes = [
        f"{name}: {theirs.versions.get(name, 'none')} in base, {ours.versions.get(name, 'none')} in head"
        for name in sorted(theirs.versions.keys() | ours.versions.keys())
        if theirs.versions.get(name) != ours.versions.get(name)
    ]
    measured = f"Two reports on {sum(theirs.corpus.document_tokens)} tokens of {theirs.corpus.source}."
    if not args.without_latency:
        measured += (
            f" Latency is relative to {one.baseline} of the same report, on {theirs.machine.cpu}, {theirs.machine.threads} threads:"
            f" a change of {one.baseline} itself cannot be seen."
        )
    return Comparison(theirs.model, str(base), str(head), measured, checks, new, notes)


def _folders(args: argparse.Namespace, base: Path, head: Path, budgets):
    from cuantiza.core.machine.hardware import cpu_name
    from cuantiza.eval.compare.decide import FIRST_LEVEL, Comparison
    from cuantiza.eval.compare.folders import CONFIRMING_ROUNDS, Measure, compare_folders, held

    how = Measure(args.tokens, args.window, 0 if args.without_latency else args.rounds, args.threads)
    split = load_splits(source_of(args))[1]
    with held(base, head):
        model, checks, new, notes = compare_folders(base, head, budgets, args.recipes, split, how)
    measured = f"Evaluated on {cpu_name()}, {args.threads} threads, with the test split of {args.corpus}."
    if how.rounds:
        measured += (
            f" Latency: {how.rounds} rounds of fresh processes, base and head sample by sample in turns,"
            f" {CONFIRMING_ROUNDS} more where one looked slower. Intervals of time are of {100 * (1 - 2 * FIRST_LEVEL):g} %, wider after the second look."
        )
    return Comparison(model, str(base), str(head), measured, checks, new, notes)


def _show(comparison, args: argparse.Namespace) -> int:
    from cuantiza.eval.compare.page import markdown, print_table

    page = markdown(comparison)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with folders.staging(args.output) as work:
        (work / "page").write_text(page, encoding="utf-8")
        (work / "page").replace(args.output)
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if args.format == "github" and summary:
        with Path(summary).open("a", encoding="utf-8") as file:
            file.write(page)
    if args.format == "github" and not summary:
        print(page, end="")
    else:
        print_table(comparison)
    return 1 if comparison.regressions else 0
