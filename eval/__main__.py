"""Measures artifacts: writes reports/<model>/report.json, report.md and report.html, and prints the table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cuantiza.core.cli import (
    Parser,
    add_corpus,
    add_folder,
    add_model,
    add_number,
    add_threads,
    check_numbers,
    source_of,
)
from cuantiza.core.errors import UserError, run
from cuantiza.core.inputs.checkpoints import model_name
from cuantiza.core.inputs.defaults import ARTIFACTS, POSITIONS, RECIPES, REPORTS, ROUNDS, TOKENS, WINDOW
from cuantiza.core.store import artifact
from cuantiza.eval.report.schema import PAPER_NAMES
from cuantiza.eval.stage import LANGUAGES, evaluate


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("eval", __doc__, "cuantiza eval --recipes fp32 int8-dynamic int4-weight --without-torch")
    add_model(parser)
    add_folder(parser, "--artifacts", ARTIFACTS, "folder of the artifacts")
    parser.add_argument(
        "--recipes",
        nargs="+",
        default=["fp32", *RECIPES],
        metavar="NAME",
        help="artifacts to measure; the first is the baseline",
    )
    parser.add_argument(
        "--onnx",
        nargs="*",
        type=Path,
        default=[],
        metavar="PATH",
        help="further ONNX files, or folders with a model.onnx, of the same interface",
    )
    parser.add_argument("--without-torch", action="store_true", help="leave out the PyTorch rows")
    add_number(parser, "--tokens", TOKENS, "score documents until this many tokens")
    add_number(parser, "--window", WINDOW, "longest context of a scored token, in tokens")
    parser.add_argument(
        "--protocols",
        nargs="+",
        default=[],
        choices=PAPER_NAMES,
        metavar="NAME",
        help=f"further protocols of perplexity, to compare with papers: {', '.join(PAPER_NAMES)}",
    )
    add_number(parser, "--rounds", ROUNDS, "interleaved rounds of latency")
    add_number(parser, "--positions", POSITIONS, "measure latency up to so many positions")
    add_threads(parser)
    add_folder(parser, "--output", REPORTS, "folder of the reports")
    parser.add_argument("--language", choices=LANGUAGES, default="en", help="language of the pages (default en)")
    add_corpus(parser)
    args = parser.parse_args(arguments)
    check_numbers(args, tokens=2, window=2, rounds=1, positions=2)
    folder = args.artifacts / model_name(args.model)
    if args.artifacts.resolve() == args.output.resolve():
        raise UserError(f"--output {args.output}: is the folder of the artifacts; choose another one (REPORTS=)")
    if not folder.is_dir():
        raise UserError(
            f"{folder}: is not there; run `make export quantize`, or `cuantiza export` and `cuantiza quantize`, first"
        )
    report = evaluate(
        [folder / artifact.name_by(recipe) for recipe in args.recipes],
        corpus=source_of(args),
        tokens=args.tokens,
        window=args.window,
        rounds=args.rounds,
        threads=args.threads,
        protocols=args.protocols,
        positions=args.positions,
        onnx=args.onnx,
        checkpoint=None if args.without_torch else args.model,
        output=args.output / folder.name,
        language=args.language,
    )
    from cuantiza.eval.report.markdown import print_table

    print_table(report, args.language)
    if failed := [item for item in report.left_out if not item.expected]:
        raise UserError(
            f"{'; '.join(f'{item.name}: {item.reason}' for item in failed)} (left out of the report, which has the other rows)"
        )
    return 0


if __name__ == "__main__":
    run(main)
