"""Makes the chapters for the course's readers: docs/es/cuantizacion.md, docs/en/quantization.md and their figures.

python -m lab.chapters [--artifacts FOLDER] [--report FILE]
python -m lab.chapters --reprint    makes pages and figures again from the JSON, without measuring

Every number is measured on the artifacts or copied from the report, and written to docs/data/quantization.json. The
pages and figures are made only from that JSON, and the same JSON gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from cuantiza.core.errors import UserError, run
from cuantiza.core.inputs.corpus import Source
from cuantiza.core.machine.process import isolated
from cuantiza.core.machine.progress import report as say
from cuantiza.core.store import artifact, folders
from cuantiza.quantize.recipes.registry import PORTABLE
from lab import DATA, ROOT
from lab.chapters.text import PAGES, page

SCHEMA = "cuantiza/chapters/1"

MODEL = ROOT / "models" / "es-mini"
JSON = "data/quantization.json"
RECIPES = tuple(PORTABLE)
ROWS = ("fp32", *RECIPES, "torch-fp32", "torch-dynamic")
# Fields copied from each of the report's rows. Its latencies are copied for these two shapes: a prefill of 512 tokens,
# and a decode step at position 128.
FIELDS = (
    "name",
    "bytes",
    "perplexity",
    "perplexity_stderr",
    "delta_ln_ppl",
    "delta_ln_ppl_stderr",
    "kl_divergence",
    "top1_agreement",
    "continuation",
)
PREFILL, DECODE = 512, 128
# Models and recipes that are copied from docs/data/accuracy.json. They show what outlier channels do to a scale per tensor,
# and compare GPTQ with rounding to nearest.
MODELS, ACCURACY = (
    ("es-mini", "es-mini-twin"),
    ("ort-dynamic", "int8-dynamic", "int8-static", "int4-weight", "int4-weight-nearest"),
)
# Steps that are copied from docs/data/big-models.json: how long a reader with the exercise's model has to wait.
BIG = ("export", "int8-dynamic", "int8-static", "eval")
_MAKE = "run `make chapters`"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lab.chapters", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--artifacts",
        type=Path,
        default=ROOT / "artifacts" / "es-mini",
        help="folder with the artifacts fp32, int8-dynamic and int8-static (default artifacts/es-mini)",
    )
    parser.add_argument(
        "--report",
        type=Path,
        default=ROOT / "reports" / "es-mini" / "report.json",
        help=f"report.json with the rows {', '.join(ROWS)} (default reports/es-mini/report.json)",
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs", help="folder for the pages and figures (default docs)"
    )
    parser.add_argument("--reprint", action="store_true", help="measure nothing: make pages and figures of the JSON")
    args = parser.parse_args()
    if args.reprint:
        publish(json.loads((args.output / JSON).read_text(encoding="utf-8")), args.output)
        say(f"chapters  {args.output}: written")
        return 0
    report = read_report(args.report)
    if report["model"] != MODEL.name:
        raise UserError(
            f"--report {args.report}: is of {report['model']}, but the chapters are about {MODEL.name}; {_MAKE}"
        )
    found = {name: artifact.open_artifact(args.artifacts / name) for name in ("fp32", "int8-dynamic", "int8-static")}
    reported = dict(report["inputs"]["artifacts"])
    if changed := [name for name, item in found.items() if reported.get(name) != item.digest]:
        raise UserError(f"{args.report}: was measured on another {changed[0]} than that in {args.artifacts}; {_MAKE}")
    say("chapters  measuring the artifacts")
    data = _measure(found, report)
    publish(rounded(data), args.output)
    say(f"chapters  {args.output}: written")
    return 0


def _measure(found: dict[str, artifact.Artifact], report: dict) -> dict:
    """The content of quantization.json, unrounded.

    Child processes measure, so that the memory of PyTorch and of the activations is freed afterwards.
    """
    from lab.chapters.exercise import modules_by_kind
    from lab.chapters.measure import measure

    measured = isolated(measure, *found.values(), Source(str(ROOT / "corpus" / "es")), label="chapters")
    return {
        "schema": SCHEMA,
        **asdict(measured),
        "report": pick_report(report),
        "accuracy": pick_accuracy(DATA / "accuracy.json"),
        "gpt2": pick_big(DATA / "big-models.json"),
        "exercise": [asdict(kind) for kind in isolated(modules_by_kind, MODEL, label="chapters")],
    }


def read_report(path: Path) -> dict:
    """Read a report.json that has all of ROWS. Raises UserError if it is missing, is not a report, or lacks a row."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        names = [row["name"] for row in report["artifacts"]]
    except FileNotFoundError:
        raise UserError(f"--report {path}: does not exist; {_MAKE}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--report {path}: is not a report of `make eval`; {_MAKE}") from None
    if missing := [name for name in ROWS if name not in names]:
        raise UserError(
            f"--report {path}: has no row {missing[0]}; {_MAKE}, which measures every row that the chapters show"
        )
    return report


def pick_report(report: dict) -> dict:
    """The part of a report that the chapters show: its rows in the order of ROWS, with median latencies in ms."""
    rows = {row["name"]: row for row in report["artifacts"]}

    def picked(row: dict) -> dict:
        prefill = next(shape for shape in row["prefill"] if shape["tokens"] == PREFILL)
        decode = next(shape for shape in row["decode"] if shape["position"] == DECODE)
        counts = {key: row[key] for key in ("modules_with_weights", "modules_quantized") if key in row}
        times = {"prefill_ms": prefill["p50_ms"], "decode_ms": decode["p50_ms"], "decode_speedup": decode["speedup"]}
        return {key: row[key] for key in FIELDS} | times | {"prefill_speedup": prefill["speedup"]} | counts

    return {
        "prompt": report["prompt"],
        "tokens": rows["fp32"]["tokens_scored"],
        "documents": report["corpus"]["documents"],
        "rounds": report["rounds"],
        "prefill_tokens": PREFILL,
        "decode_position": DECODE,
        "cpu": report["machine"]["cpu"],
        "threads": report["machine"]["threads"],
        "versions": {name: report["versions"][name] for name in ("onnxruntime", "torch", "transformers")},
        "artifacts": [picked(rows[name]) for name in ROWS],
    }


def pick_accuracy(path: Path) -> dict:
    """Read {model: {recipe: {delta_ln_ppl, delta_ln_ppl_stderr}}} on corpus/es from docs/data/accuracy.json.

    Raises UserError if the file lacks one of MODELS or ACCURACY.
    """
    try:
        tables = json.loads(path.read_text(encoding="utf-8"))["models"]
        rows = {
            item["model"]: {row["name"]: row for row in item["artifacts"]}
            for item in tables
            if item["corpus"] == "corpus/es"
        }
        return {
            model: {
                name: {key: rows[model][name][key] for key in ("delta_ln_ppl", "delta_ln_ppl_stderr")}
                for name in ACCURACY
            }
            for model in MODELS
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: lacks what the chapters quote ({error}); run `make accuracy`") from None


def pick_big(path: Path) -> dict:
    """Read how long each step took with a model of GPT-2 small's size from docs/data/big-models.json.

    Returns {cpu, processors, tokens, seconds: {step: s}}. Raises UserError if the file lacks that size or one of BIG.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        steps = next(row["steps"] for row in found["rows"] if row["shape"] == "gpt2")
        seconds = {name: steps[name]["seconds"] for name in BIG}
        return {key: found[key] for key in ("cpu", "processors", "tokens")} | {"seconds": seconds}
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise UserError(f"{path}: lacks what the chapters quote ({error}); run `python -m lab.big_models`") from None


def rounded(value: object) -> object:
    """`value` as JSON stores it, with floats rounded to 10 significant digits. No page shows more digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.10g}") if isinstance(value, float) else value


def publish(data: dict, output: Path) -> None:
    """Write the JSON, every figure and both pages below `output`.

    All files are made first and moved to `output` last, so an error leaves the old ones.
    """
    from lab.chapters.figures import draw

    rooms = {"figures", *(str(Path(name).parent) for name in (JSON, *PAGES.values()))}
    for room in rooms:
        (output / room).mkdir(parents=True, exist_ok=True)
    with folders.staging(output / Path(JSON).name) as work:
        for room in rooms:
            (work / room).mkdir()
        draw(data, work / "figures")
        (work / JSON).write_text(_compact(data), encoding="utf-8")
        for language, name in PAGES.items():
            (work / name).write_text(page(language, data), encoding="utf-8")
        for file in sorted(work.rglob("*.*")):
            file.replace(output / file.relative_to(work))


def _compact(data: dict) -> str:
    """`data` as JSON text with one line per value of a section, so that a diff shows which values changed."""
    lines = []
    for name, section in data.items():
        if not isinstance(section, dict):
            lines.append(f"{json.dumps(name)}: {json.dumps(section, ensure_ascii=False)}")
            continue
        inner = ",\n".join(
            f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in section.items()
        )
        lines.append(f"{json.dumps(name)}: {{\n{inner}\n }}")
    return "{\n " + ",\n ".join(lines) + "\n}\n"


if __name__ == "__main__":
    run(main)
