"""Measures what text that the model writes itself (`CORPUS=self`) costs beside real text, and writes docs/own-text.md.

python -m lab.own_text               makes the artifacts, scores them, and writes docs/data/own-text.json and the page
python -m lab.own_text --reprint     writes the page again from the JSON

Each recipe is calibrated twice on es-mini: on the calibration split of corpus/es, and on what the model writes. Both are scored on that corpus's test split. Artifacts are kept in the folder of --work.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from cuantiza.core.errors import run
from cuantiza.core.inputs.corpus import Source, load_test
from cuantiza.core.inputs.defaults import SELF, TOKENS, WINDOW
from cuantiza.core.machine.hardware import cpu_name
from cuantiza.core.machine.progress import report as say
from cuantiza.core.pages import plus_minus
from cuantiza.core.store import digests
from cuantiza.eval.measure.engines import Subject
from cuantiza.eval.measure.quality import make_task, measure_quality
from cuantiza.export.stage import export
from cuantiza.quantize.stage import quantize
from lab import CORPUS, DATA, page_folder
from lab.pages import filled, page_parser, write

JSON = DATA / "own-text.json"
RECIPES = ("int8-dynamic", "int8-static", "int4-weight")
TEXTS = {"real": str(CORPUS), "self": SELF}
# All artifacts are scored at once, each in a process of its own: with more threads each, these would only wait.
THREADS = 1
_FIELDS = (
    "perplexity",
    *("delta_ln_ppl", "delta_ln_ppl_stderr", "kl_divergence", "kl_divergence_stderr", "top1_agreement"),
)


def main() -> int:
    parser = page_parser("lab.own_text", __doc__, TOKENS, Path("artifacts/own-text"), JSON)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, help=f"recipes (default {' '.join(RECIPES)})")
    args = parser.parse_args()
    if not args.reprint:
        write(args.output, json.dumps(measure(args.model, args.recipes, args.tokens, args.work), indent=1) + "\n")
    write_page(args.output)
    return 0


def measure(model: Path, recipes: list[str], tokens: int, work: Path) -> dict:
    """Make and score the artifacts of `recipes` on each of TEXTS; return the content of own-text.json."""
    fp32 = export(model, work)
    made = {
        (name, text): quantize(fp32, name, work / text / name, corpus=corpus)
        for name in recipes
        for text, corpus in TEXTS.items()
    }
    subjects = [Subject("fp32", "onnx", fp32.model)]
    subjects += [Subject(f"{name} {text}", "onnx", item.model) for (name, text), item in made.items()]
    task = make_task(fp32.path, load_test(Source(str(CORPUS))), tokens, WINDOW)
    # Without a stream, llama.cpp's protocol is left out, which the page does not show.
    rows = measure_quality(subjects, replace(task, stream=task.stream[:0]), THREADS)
    return {
        "model": model.name,
        "cpu": cpu_name(),
        "versions": digests.versions("onnxruntime", "onnx", "numpy"),
        "tokens": rows["fp32"]["tokens_scored"],
        "documents": len(task.documents),
        "fp32_perplexity": rows["fp32"]["perplexity"],
        "rows": [
            {"recipe": name, "text": text, "calibration": item.manifest.details["calibration"]}
            | {field: rows[f"{name} {text}"][field] for field in _FIELDS}
            for (name, text), item in made.items()
        ],
    }


def write_page(path: Path) -> None:
    """Write the page of the JSON file `path` into its folder (`page_folder`)."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    what = {"real": "real text", "self": "`CORPUS=self`"}
    rows = [
        (
            f"`{row['recipe']}`",
            what[row["text"]],
            f"{row['perplexity']:.2f}",
            plus_minus(row["delta_ln_ppl"], row["delta_ln_ppl_stderr"], 4, "en"),
            plus_minus(row["kl_divergence"], row["kl_divergence_stderr"], 5, "en"),
            f"{100 * row['top1_agreement']:.1f}",
        )
        for row in fields["rows"]
    ]
    own = next(row["calibration"] for row in fields["rows"] if row["text"] == "self")
    text = filled(
        Path(__file__).resolve().parent / "templates/own-text.md.j2",
        model=fields["model"],
        cpu=fields["cpu"],
        onnxruntime=fields["versions"]["onnxruntime"],
        tokens=f"{fields['tokens']:,}",
        documents=fields["documents"],
        fp32=f"{fields['fp32_perplexity']:.2f}",
        windows=own["windows"],
        window=own["tokens_per_window"],
        seed=own["seed"],
        rows=rows,
    )
    target = (page_folder(path) / path.name).with_suffix(".md")
    write(target, text)
    say(f"own text  {target}: written")


if __name__ == "__main__":
    run(main)
