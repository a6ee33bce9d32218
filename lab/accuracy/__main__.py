"""Makes docs/accuracy.md: the accuracy lost by every recipe and by common tools' defaults, on easy and hard models.

python -m lab.accuracy [--models FOLDER ...] [--text FILE] [--english FOLDER ...]
python -m lab.accuracy --reprint    writes the page again from the JSON

docs/data/accuracy.json holds the numbers, and lab/accuracy/page.py makes the page only from it. Artifacts and scores are
kept in the folder of --work, so a second run builds and measures only what has changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from cuantiza.core.errors import UserError, run
from cuantiza.core.inputs.corpus import Source, Split, load_splits
from cuantiza.core.inputs.tokenizer import encode, load_tokenizer
from cuantiza.core.machine.hardware import machine, software
from cuantiza.core.machine.progress import report as say
from cuantiza.core.store import artifact, digests, folders
from cuantiza.core.store.artifact import Artifact
from cuantiza.eval.measure.engines import Subject
from cuantiza.eval.measure.quality import Task, make_task, measure_quality
from cuantiza.eval.measure.size import onnx_bytes
from cuantiza.quantize.inspect.costs import COSTS, write_costs
from cuantiza.quantize.recipes.registry import RECIPES, to_json
from lab import ROOT
from lab.accuracy.naive import NAIVE, make_naive
from lab.accuracy.page import ENGLISH, FIELDS, JSON, MARKDOWN, SCHEMA, publish

MODEL, CORPUS, HARD, SEED = ROOT / "models" / "es-mini", "corpus/es", ("twin", "sink"), 0
WINDOW = 512  # tokens
TEXT_TOKENS = 30_000  # tokens of --text to score: about as many as the test split of corpus/es has
# Tokens of each text that the models of --english are scored on: they are large, and slow to score.
ENGLISH_TOKENS = 8_000
SENTENCES = 8
# A recipe for ONNX Runtime (-ort) is measured only if its arithmetic differs from that of the portable recipe.
ROWS = [name for name in RECIPES if not name.endswith("-ort") or name in ("int8-weight-ort", "int4-weight-ort")]
# Not of the models of --english: to choose bits or layers, these measure each matrix by itself.
SEARCHED = ("int8-static-mixed", "int-mixed")
# About twenty artifacts are scored at once, each in a process of its own. With more than one thread each, the threads
# would only wait for each other.
THREADS = 1


@dataclass(frozen=True)
class Text:
    """A text to score: whole documents of the split `test` until `tokens` tokens are reached."""

    name: str
    test: Split
    tokens: int = sys.maxsize


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lab.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="*", type=Path, default=[], metavar="FOLDER", help="more GPT-2 checkpoints to measure"
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="another text, of which the test split is scored")
    parser.add_argument(
        "--english",
        nargs="*",
        type=Path,
        default=[],
        metavar="FOLDER",
        help=f"checkpoints of large models of English, scored on {ENGLISH_TOKENS:,} tokens of {CORPUS} and of {ENGLISH}",
    )
    default = Path("artifacts/accuracy")
    parser.add_argument(
        "--work", type=Path, default=default, help=f"folder where artifacts and scores are kept (default {default})"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("docs"), help="folder for the page and its JSON (default docs)"
    )
    parser.add_argument("--reprint", action="store_true", help="write the page again from its JSON, without measuring")
    args = parser.parse_args()
    if args.reprint:
        _publish(json.loads((args.output / JSON).read_text(encoding="utf-8")), args.output)
        return 0
    for option, given in (("--models", args.models), ("--english", args.english)):
        if odd := next((folder for folder in given if not folder.is_dir()), None):
            raise UserError(f"{option} {odd}: is not a folder; give folders of checkpoints")
    given, english = ([folder.resolve() for folder in some] for some in (args.models, args.english))
    names = [MODEL.name, *(f"{MODEL.name}-{kind}" for kind in HARD), *(folder.name for folder in given + english)]
    if clash := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--models, --english: two models are called {clash!r}; rename one of the folders")
    if args.text and not args.text.is_file():
        raise UserError(f"--text {args.text}: is not a file; give a .txt, .jsonl or .parquet file")
    calibration, test = load_splits(Source(str(ROOT / CORPUS)))
    texts = [Text(CORPUS, test)]
    texts += [Text(args.text.name, load_splits(Source(str(args.text)))[1], TEXT_TOKENS)] if args.text else []
    parts = [Text(CORPUS, test, ENGLISH_TOKENS)]
    parts += [Text(ENGLISH, load_splits(Source(str(ROOT / ENGLISH)))[1], ENGLISH_TOKENS)]
    work = args.work.resolve()
    with folders.locked(work):
        spanish = [MODEL, *(_hard_model(kind, work) for kind in HARD), *given]
        subjects = [(checkpoint, texts, ROWS) for checkpoint in spanish]
        subjects += [(checkpoint, parts, [name for name in ROWS if name not in SEARCHED]) for checkpoint in english]
        result = measure(subjects, calibration, work)
    _publish(result, args.output)
    return 0


def _publish(report: dict, output: Path) -> None:
    """Write the page and its JSON into `output`; for the project's own page also what `cuantiza recipes` prints of it."""
    publish(report, output)
    say(f"accuracy  {output / MARKDOWN}: written")
    if output.resolve() == ROOT / "docs":
        write_costs(output / JSON)
        say(f"accuracy  {COSTS}: written")


def measure(subjects: list[tuple[Path, list[Text], list[str]]], calibration: Split, work: Path) -> dict:
    """Make all artifacts, measure every checkpoint on its texts, and return the content of accuracy.json.

    `subjects` are a checkpoint, its texts and the names of its recipes.
    """
    models: list[dict] = []
    skipped: dict[str, str] = {}
    for checkpoint, texts, recipes in subjects:
        items = make_artifacts(checkpoint, calibration, work, recipes, skipped)
        models += [_measure_on(text, items, work / "scores") for text in texts]
    facts = {"machine": machine(THREADS), "versions": software()}
    return {"schema": SCHEMA, **facts, "models": models, "skipped": skipped}


def make_artifacts(
    checkpoint: Path, calibration: Split, work: Path, recipes: list[str], skipped: dict[str, str]
) -> list[Artifact]:
    """Make all artifacts of `checkpoint`: fp32, one per recipe, int4 rounded to nearest, and those of NAIVE.

    The project's own stages make all but the naive ones; each stage runs in a process of its own. `skipped` is as in
    `naive_artifacts`.
    """
    nearest, folder = work / "int4-weight-nearest.json", work / checkpoint.name
    _write_json(nearest, to_json(dataclasses.replace(RECIPES["int4-weight"], rounding="nearest")))
    _run("-m", "export", "--model", checkpoint, "--output", work)
    common = ("--model", checkpoint, "--output", work, "--corpus", ROOT / CORPUS)
    _run("-m", "quantize", "--recipes", *recipes, nearest, *common)
    items = [artifact.open_artifact(folder / name) for name in ("fp32", *recipes, nearest.stem)]
    sentences = encode(load_tokenizer(folder / "fp32"), first_sentences(calibration))
    return items + naive_artifacts(items[0], sentences, skipped)


def first_sentences(calibration: Split) -> tuple[str, ...]:
    """The first sentence of each of the first 8 documents. A headline has no full stop, so it is not a sentence."""
    found = [re.search(r"^.+?[.!?…](?=\s|$)", text, re.MULTILINE) for text in calibration.documents[:SENTENCES]]
    return tuple(match[0] for match in found if match)


def naive_artifacts(fp32: Artifact, sentences: list[list[int]], skipped: dict[str, str]) -> list[Artifact]:
    """Make the artifacts of NAIVE beside the artifact `fp32`.

    If optimum cannot make one, its name and the reason are added to `skipped`.
    """
    made = []
    for name in NAIVE:
        try:
            made.append(make_naive(name, fp32, fp32.path.parent / name, sentences))
        except UserError as error:
            if not name.startswith("optimum"):
                raise
            skipped.setdefault(name, str(error))
            say(f"accuracy  {name}: skipped ({error})")
    return made


def _measure_on(text: Text, items: list[Artifact], cache: Path) -> dict:
    """One element of accuracy.json's `models`. The first of `items` is the baseline for the others."""
    fp32 = items[0]
    task = make_task(fp32.path, text.test, text.tokens, WINDOW)
    task = dataclasses.replace(
        task, stream=task.stream[:0]
    )  # leaves out llama.cpp's protocol, which the page does not show
    rows = _score(items, task, text, cache)
    whole = onnx_bytes(fp32.model)["model_bytes"]
    artifacts = []
    for item in items[1:]:
        size, row = onnx_bytes(item.model)["model_bytes"], rows[item.manifest.name]
        figures = {"bytes": size, "ratio": size / whole} | {field: row[field] for field in FIELDS}
        artifacts.append({"name": item.manifest.name, **figures})
    return {
        "model": fp32.path.parent.name,
        "corpus": text.name,
        "window_tokens": task.window,
        "tokens_scored": rows["fp32"]["tokens_scored"],
        "documents": len(task.documents),
        "fp32_perplexity": rows["fp32"]["perplexity"],
        "artifacts": artifacts,
    }


def _score(items: list[Artifact], task: Task, text: Text, cache: Path) -> dict[str, dict]:
    """The quality fields (docs/report.md) of each item by its name. Scores in `cache` are not measured again."""
    cache.mkdir(exist_ok=True)
    settings = [
        items[0].digest,
        text.test.sha256,
        text.tokens,
        WINDOW,
        digests.code_digest("cuantiza.eval.measure.quality"),
        software(),
    ]
    files = {item.manifest.name: cache / f"{digests.digest([item.digest, *settings])}.json" for item in items}
    # Artifacts with the same bytes have the same file, so they are measured only once.
    missing = {files[item.manifest.name]: item for item in items if not files[item.manifest.name].is_file()}
    if missing:
        needed = {item.manifest.name: item for item in (items[0], *missing.values())}
        scored = measure_quality([Subject(name, "onnx", item.model) for name, item in needed.items()], task, THREADS)
        for file, item in missing.items():
            _write_json(file, scored[item.manifest.name])
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items()}


def _hard_model(kind: str, work: Path) -> Path:
    """Make es-mini's twin or sink and return its folder.

    It is made again on each run, which takes seconds. The export then sees that the checkpoint is unchanged.
    """
    folder = work / "checkpoints" / f"{MODEL.name}-{kind}"
    shutil.rmtree(folder, ignore_errors=True)
    _run("-m", "lab.checkpoints.hard", kind, MODEL, folder, "--seed", SEED)
    return folder


def _run(*args: object) -> None:
    """Run Python with `args` in the repository's root. If it fails it has printed why, so exit with its status."""
    status = subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, stdout=subprocess.DEVNULL).returncode
    if status:
        sys.exit(status if status > 0 else 128 - status)


def _write_json(path: Path, value: dict) -> None:
    """Write `value` as JSON through a temporary file, so that a reader never sees half of it."""
    new = path.with_name(f".tmp-{path.name}")
    new.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    new.replace(path)


if __name__ == "__main__":
    run(main)
