"""`python -m cuantiza.bundle`: artifacts and their report -> dist/<model>, a folder for the Hugging Face Hub.

Upload it with the hub's own client: `hf upload owner/name dist/<model>`.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

from cuantiza.bundle.card import card, rows_of
from cuantiza.bundle.files import assemble, open_all
from cuantiza.core.errors import UserError, run
from cuantiza.core.inputs.checkpoints import checkpoint_digest, model_name, resolve_model
from cuantiza.core.inputs.model_config import read_config
from cuantiza.core.machine.progress import report as say
from cuantiza.core.store import folders
from cuantiza.eval.report.read import read_report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m cuantiza.bundle", description=__doc__)
    parser.add_argument("--model", default="models/es-mini", help="the model that was exported: folder or hub id")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), help="folder of the artifacts")
    parser.add_argument("--reports", type=Path, default=Path("reports"), help="folder of the reports")
    parser.add_argument(
        "--recipes",
        nargs="+",
        default=["int8-dynamic", "int4-weight", "fp16"],
        metavar="NAME",
        help="artifacts beside fp32 (default int8-dynamic int4-weight fp16)",
    )
    parser.add_argument("--output", type=Path, default=Path("dist"), help="folder of the bundles (default dist)")
    args = parser.parse_args()
    name = model_name(args.model)
    source, path = args.artifacts / name, args.reports / name / "report.json"
    if not source.is_dir():
        raise UserError(f"{source}: is not there; run `make export quantize eval` first")
    # What is copied must not be replaced meanwhile; a folder that came from elsewhere has no lock, and no stage at work.
    with folders.locked(source) if (source / folders.LOCK).exists() else nullcontext():
        _bundle(args, name, source, path)
    return 0


def _bundle(args: argparse.Namespace, name: str, source: Path, path: Path) -> None:
    artifacts = open_all(source, args.recipes)
    checkpoint = resolve_model(args.model).folder
    if artifacts[0].manifest.inputs.get("checkpoint") != checkpoint_digest(checkpoint):
        raise UserError(
            f"MODEL={args.model}: has changed since {artifacts[0].path} was exported; run `make export` again"
        )
    report = read_report(path)
    rows = rows_of(report, artifacts, path)
    hub_id = None if Path(args.model).is_dir() else args.model.split("@")[0]
    target = args.output / name
    with folders.locked(args.output), folders.staging(target) as work:
        assemble(artifacts, checkpoint, card(report, rows, name, checkpoint, read_config(checkpoint), hub_id), work)
        work.chmod(0o755)
        folders.replace(work, target)
    say(f"bundle    {target}: {len(artifacts)} graphs; upload it by `hf upload owner/{name} {target}`")


if __name__ == "__main__":
    run(main)
