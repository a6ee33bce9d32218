"""Tells whether HEAD is worse than BASE by more than its budget. Status 0: no, 1: yes, 2: not comparable."""

from __future__ import annotations

import argparse
import os
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cuantiza.core.cli import Parser, add_corpus, add_number, add_threads, source_of
from cuantiza.core.errors import UserError, drop_output, is_told
from cuantiza.core.inputs.defaults import COMPARE_ROUNDS, REPORTS, TOKENS, WINDOW
from cuantiza.core.store import folders

if TYPE_CHECKING:
    from cuantiza.eval.compare.decide import Comparison


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `cuantiza compare` and return its exit status.

    An unexpected error gives status 3, as does a reader of the table that goes away, because 1 means a regression and
    nothing else.
    """
    try:
        return _compare(arguments)
    except BrokenPipeError:
        drop_output()
        return 3
    except Exception as error:
        if is_told(error):
            raise
        traceback.print_exc()
        return 3


def parser() -> Parser:
    """The options of `cuantiza compare`."""
    parser = Parser("compare", __doc__, "cuantiza compare main/artifacts/es-mini artifacts/es-mini")
    parser.add_argument("base", metavar="BASE", help="what was: a report.json, its folder, or artifacts/<model>")
    parser.add_argument("head", metavar="HEAD", help="what is now, of the same kind")
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help="what to compare (default: all that BASE has)")
    parser.add_argument(
        "--budgets", type=Path, metavar="FILE", help="what may become worse, by how much (budgets.toml if it exists)"
    )
    parser.add_argument("--without-latency", action="store_true", help="compare quality and size alone")
    parser.add_argument(
        "--format",
        choices=("terminal", "github"),
        default="terminal",
        help="github: append the page to $GITHUB_STEP_SUMMARY too, or print it where that is not set",
    )
    default = REPORTS / "compare.md"
    parser.add_argument(
        "--output", type=Path, default=default, metavar="FILE", help=f"the page, in Markdown (default {default})"
    )
    group = parser.add_argument_group("folders of artifacts", "are measured here, base and head in turns")
    add_number(group, "--tokens", TOKENS, "score whole documents until this many tokens")
    add_number(group, "--window", WINDOW, "longest context of a scored token, in tokens")
    add_number(group, "--rounds", COMPARE_ROUNDS, "rounds of latency, before what looks slower is measured again")
    add_threads(group)
    add_corpus(group)
    return parser


def _compare(arguments: Sequence[str] | None) -> int:
    args = parser().parse_args(arguments)
    if args.output.is_dir():
        raise UserError(f"--output {args.output}: is a folder; name a file, such as {args.output / 'compare.md'}")
    above = next(folder for folder in args.output.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UserError(f"--output {args.output}: {above} is a file; choose another place")
    from cuantiza.eval.compare.stage import compare

    comparison = compare(
        args.base,
        args.head,
        recipes=args.recipes,
        budgets=args.budgets,
        latency=not args.without_latency,
        corpus=source_of(args),
        tokens=args.tokens,
        window=args.window,
        rounds=args.rounds,
        threads=args.threads,
    )
    return _show(comparison, args)


def _show(comparison: Comparison, args: argparse.Namespace) -> int:
    from cuantiza.eval.compare.page import markdown, print_table

    page = markdown(comparison)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with folders.staging(args.output) as work:
        (work / "page").write_text(page, encoding="utf-8")
        (work / "page").replace(args.output)
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if args.format == "github" and summary:
        try:
            with Path(summary).open("a", encoding="utf-8") as file:
                file.write(page)
        except OSError as error:
            raise UserError(f"GITHUB_STEP_SUMMARY={summary}: cannot be written ({error.strerror})") from None
    if args.format == "github" and not summary:
        print(page, end="")
    else:
        print_table(comparison)
    return 1 if comparison.regressions else 0
