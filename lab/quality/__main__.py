"""Makes docs/quality-peers.md: what our artifacts and other libraries' lose on one checkpoint, text and set of windows.

python -m lab.quality [--models FOLDER ...] [--rows PATTERN ...] [--corpus PATH] [--tokens N]
python -m lab.quality --reprint    writes the page again from its JSON

docs/data/quality-peers.json holds the figures, and rows that are measured again replace those with the same model, text
and tokens; all others stay. It is written after every row. A row whose library is not installed is skipped, with the
reason. Files, and the fp32 artifact's logits, are kept in the folder of --work.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from cuantiza.core.errors import UserError, run
from cuantiza.core.inputs.corpus import Source, Split, load_splits
from cuantiza.core.machine import child
from cuantiza.core.machine.hardware import check_threads, cpu_name, default_threads
from cuantiza.core.machine.progress import report as say
from cuantiza.core.store import artifact, digests, folders
from cuantiza.core.store.artifact import Artifact
from cuantiza.eval.measure.quality import Task, make_task
from cuantiza.eval.measure.size import onnx_bytes
from cuantiza.quantize.decide.calibrate import calibration_windows
from cuantiza.quantize.settings import Calibration
from lab import CORPUS, ES_MINI, ROOT
from lab.bench.child import command
from lab.checkpoints.hard import make as make_hard
from lab.quality import rows as rows_of
from lab.quality import score
from lab.quality.page import JSON, join, publish
from lab.quality.rows import Row

WINDOW = 512  # tokens of a window of the test text
# The windows that peers get: as many as our int4 recipe takes.
CALIBRATION = Calibration(windows=32, tokens=512, minimum=1)
HARD = {"es-mini-twin": "twin", "es-mini-sink": "sink"}
EXPORT_TIMEOUT_S = 3600


def main() -> int:
    args = _arguments()
    if args.reprint:
        publish(json.loads(args.output.read_text(encoding="utf-8")), args.output)
        return 0
    check_threads(args.threads)
    work = args.work.absolute()
    splits = load_splits(Source(str(args.corpus)))
    with folders.locked(work):
        for name in args.models:
            measure(_checkpoint(name, work), args, splits, work)
    return 0


def measure(checkpoint: Path, args: argparse.Namespace, splits: tuple[Split, Split], work: Path) -> None:
    """Measure the wanted rows of one checkpoint, and write page and JSON after each."""
    fp32 = export(checkpoint, work, args.exporter)
    calibration, test = splits
    task = make_task(fp32.path, test, args.tokens, WINDOW)
    windows = calibration_windows(fp32.path, calibration, CALIBRATION)
    folder = fp32.path.parent / "peers"
    folder.mkdir(exist_ok=True)
    file = folder / "calibration.npy"
    np.save(file, windows)
    reference = score.Reference(fp32, work / "logits", args.threads)
    facts = about(fp32, checkpoint, args, task, windows, score.fp32_perplexity(reference, task))
    known = rows_of.all_rows(fp32.path.parent, folder)
    for row in rows_of.select(known, args.rows):
        with folders.staging(folder / "work") as temporary:
            found = measure_row(row, checkpoint, args, file, reference, task, temporary)
        report = join(args.output, facts | {"rows": [found]}, [item.name for item in known])
        publish(report, args.output)


def measure_row(
    row: Row,
    checkpoint: Path,
    args: argparse.Namespace,
    windows: Path,
    reference: score.Reference,
    task: Task,
    temporary: Path,
) -> dict:
    """One element of the JSON's `rows`; one that could not be made or measured has the reason as `skipped`."""
    fields = {"name": row.name, "ours": row.is_ours, "bits": row.bits, "how": row.how}
    try:
        made = rows_of.make(row, checkpoint, str(args.corpus), windows, temporary)
        found = dataclasses.asdict(made) | score.measure(row, reference, task, args.threads, temporary)
    except child.Failed as error:
        reason = str(error).replace(f"{args.work.absolute()}/", "")
        say(f"quality   {checkpoint.name}, {row.name}: skipped ({reason})")
        return fields | {"skipped": reason}
    say(f"quality   {checkpoint.name}, {row.name}: {found['bytes'] / 1e6:.1f} MB, KL {found['kl_divergence']:.5f}")
    return fields | found


def export(checkpoint: Path, work: Path, exporter: str) -> Artifact:
    """The fp32 artifact of `checkpoint`. Raises UserError if the export fails."""
    options = ("--model", checkpoint, "--output", work, "--exporter", exporter)
    try:
        child.run(command(Path(sys.executable), "export", *options), timeout=EXPORT_TIMEOUT_S, cwd=ROOT)
    except child.Failed as error:
        raise UserError(f"--models {checkpoint}: {error}") from None
    return artifact.open_artifact(work / checkpoint.name / "fp32")


def about(
    fp32: Artifact, checkpoint: Path, args: argparse.Namespace, task: Task, windows: np.ndarray, perplexity: float
) -> dict:
    """The fields of one element of the JSON's `models`, without its rows."""
    corpus = args.corpus.resolve()
    return {
        "model": checkpoint.name,
        "fp32": fp32.digest,
        "fp32_bytes": onnx_bytes(fp32.model)["model_bytes"],
        "fp32_perplexity": perplexity,
        "corpus": str(corpus.relative_to(ROOT)) if corpus.is_relative_to(ROOT) else corpus.name,
        "document_tokens": [len(ids) for ids in task.documents],
        "documents_in_split": task.in_split,
        "tokens_sha256": digests.digest(task.documents),
        "window_tokens": task.window,
        "calibration_windows": list(windows.shape),
        "cpu": cpu_name(),
        "threads": args.threads,
    }


def _checkpoint(name: str, work: Path) -> Path:
    """The folder that --models names, or the model that is hard to quantize of that name."""
    if name in HARD:
        made = work / "checkpoints" / name
        if not made.is_dir():
            made.parent.mkdir(parents=True, exist_ok=True)
            make_hard(HARD[name], ES_MINI, made, 0)
        return made
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(f"--models {name}: is not a folder; give a checkpoint's folder, {' or '.join(HARD)}")
    return folder.resolve()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lab.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=[str(ES_MINI), *HARD],
        metavar="FOLDER",
        help="checkpoints (default es-mini, es-mini-twin and es-mini-sink)",
    )
    parser.add_argument("--rows", nargs="+", metavar="PATTERN", help="rows by name, such as 'llama.cpp*' (default all)")
    parser.add_argument(
        "--corpus", type=Path, default=CORPUS, help="text, split as for `make eval` (default corpus/es)"
    )
    parser.add_argument(
        "--tokens", type=int, default=sys.maxsize, help="tokens of the test split to score (default all of it)"
    )
    parser.add_argument(
        "--exporter", choices=("graph", "optimum"), default="graph", help="as for `make export` (default graph)"
    )
    parser.add_argument("--threads", type=int, default=default_threads(), help="threads (default all processors)")
    default = Path("artifacts/quality")
    parser.add_argument("--work", type=Path, default=default, help=f"folder for what is made (default {default})")
    parser.add_argument(
        "--output", type=Path, default=JSON, help=f"JSON file of the figures (default {JSON.relative_to(ROOT)})"
    )
    parser.add_argument("--reprint", action="store_true", help="write the page again from its JSON, without measuring")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
