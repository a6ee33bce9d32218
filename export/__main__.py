"""Exports a checkpoint to ONNX: the fp32 artifact in artifacts/<model>/fp32. docs/models.md says of which models."""

from __future__ import annotations

from collections.abc import Sequence

from cuantiza.core.cli import Parser, add_folder, add_model
from cuantiza.core.errors import run
from cuantiza.core.inputs.defaults import ARTIFACTS
from cuantiza.export.stage import EXPORTERS, OPSETS, export


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("export", __doc__, "cuantiza export --model datificate/gpt2-small-spanish")
    add_model(parser)
    parser.add_argument(
        "--exporter",
        choices=EXPORTERS,
        default="graph",
        help="graph: this project's own graphs; optimum: some other models, by optimum's exporter",
    )
    parser.add_argument(
        "--opset", type=int, default=21, help=f"ONNX operator set, {OPSETS[0]} to {OPSETS[-1]} (default 21)"
    )
    add_folder(parser, "--output", ARTIFACTS, "folder of the artifacts")
    args = parser.parse_args(arguments)
    export(args.model, args.output, exporter=args.exporter, opset=args.opset)
    return 0


if __name__ == "__main__":
    run(main)
