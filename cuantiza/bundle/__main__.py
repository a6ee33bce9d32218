"""Writes artifacts and their measured report to dist/<model>, a folder for the Hugging Face Hub.

Upload it with the hub's own client: `hf upload owner/name dist/<model>`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cuantiza.bundle.card import card, rows_of
from cuantiza.bundle.files import FIRST, assemble, check_names, check_target, graph_name, open_all
from cuantiza.bundle.licence import licence_of
from cuantiza.core.cli import Parser, add_folder, add_model
from cuantiza.core.errors import UserError, run
from cuantiza.core.inputs.checkpoints import checkpoint_digest, model_name, resolve_model
from cuantiza.core.inputs.defaults import ARTIFACTS, DIST, REPORTS, place
from cuantiza.core.machine.progress import report as say
from cuantiza.core.store import folders
from cuantiza.eval.report.read import read_report

BUNDLED = ("int8-dynamic", "int4-weight", "fp16")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("bundle", __doc__, "cuantiza bundle --recipes int8-dynamic fp16")
    add_model(parser)
    add_folder(parser, "--artifacts", ARTIFACTS, "folder of the artifacts")
    add_folder(parser, "--reports", REPORTS, "folder of the reports")
    parser.add_argument(
        "--recipes", nargs="+", default=BUNDLED, metavar="NAME", help=f"artifacts besides fp32 ({' '.join(BUNDLED)})"
    )
    parser.add_argument(
        "--names",
        action="store_true",
        help="print how the graph of each recipe is called in a bundle, and write nothing",
    )
    add_folder(parser, "--output", DIST, "folder of the bundles")
    args = parser.parse_args(arguments)
    check_names(args.recipes)  # before anything is opened
    if args.names:
        print(*(f"{recipe}: onnx/{graph_name(recipe)}" for recipe in dict.fromkeys([FIRST, *args.recipes])), sep="\n")
        return 0
    name = model_name(args.model)
    source, path = args.artifacts / name, args.reports / name / "report.json"
    if not source.is_dir():
        raise UserError(
            f"{source}: is not there; run `make export quantize eval`, or `cuantiza` with each of these, first"
        )
    with folders.held(source):  # the artifacts must not be replaced while they are copied
        _bundle(args, name, source, path)
    return 0


def _bundle(args: argparse.Namespace, name: str, source: Path, path: Path) -> None:
    artifacts = open_all(source, args.recipes)
    checkpoint = resolve_model(args.model).folder
    if artifacts[0].manifest.inputs.get("checkpoint") != checkpoint_digest(checkpoint):
        raise UserError(
            f"MODEL={args.model}: has changed since {artifacts[0].path} was exported; run `make export` or `cuantiza export` again"
        )
    report = read_report(path)
    rows = rows_of(report, artifacts, path)
    hub_id = None if place(args.model).is_dir() else args.model.split("@")[0]
    target = args.output / name
    with folders.locked(args.output), folders.staging(target) as work:
        licence = licence_of(checkpoint, hub_id)
        check_target(target, licence.files)
        assemble(artifacts, licence.files, card(report, rows, name, artifacts[0].path, licence, hub_id), work)
        work.chmod(0o755)
        folders.replace(work, target)
    say(f"bundle    {target}: {len(artifacts)} graphs; upload it by `hf upload owner/{name} {target}`")


if __name__ == "__main__":
    run(main)
