"""Measures what a budget of bits is worth: int-mixed beside int4-weight and a rule by place, and writes docs/mixed.md.

python -m lab.accuracy.mixed               makes the artifacts, scores them, and writes docs/data/mixed.json and the page
python -m lab.accuracy.mixed --reprint     writes the page again from the JSON

The rule by place is that of llama.cpp's Q4_K_M: in the first and the last eighth of the layers, and in every third
between them, values and the MLP's last linear layer have 8 bits, and so has the head; all else has 4. Rounding is that of
int4-weight in all rows, so that they differ in bits alone. Artifacts are kept in the folder of --work.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from cuantiza.core.errors import run
from cuantiza.core.inputs.corpus import Source, load_calibration, load_test
from cuantiza.core.inputs.defaults import TOKENS, WINDOW
from cuantiza.core.machine.hardware import cpu_name
from cuantiza.core.machine.progress import report as say
from cuantiza.core.onnx import file as onnx_file
from cuantiza.core.pages import plus_minus
from cuantiza.core.store import digests
from cuantiza.eval.measure.engines import Subject
from cuantiza.eval.measure.quality import make_task, measure_quality
from cuantiza.export.stage import export
from cuantiza.quantize.decide.calibrate import calibration_windows
from cuantiza.quantize.layers import decide
from cuantiza.quantize.mixed import matrix_shapes
from cuantiza.quantize.recipes.budget.int_mixed import MixedWeightOnly
from cuantiza.quantize.recipes.registry import RECIPES
from cuantiza.quantize.recipes.weight_only import WeightOnly
from cuantiza.quantize.rewrite.weight_only import choose_weights, quantize_weights
from cuantiza.quantize.stage import quantize
from cuantiza.quantize.weights.rounding import Grid
from lab import CORPUS, DATA, page_folder
from lab.pages import filled, page_parser, write

JSON = DATA / "mixed.json"
SHARES = ("0.16x",)
THREADS = 1
_RAISED = re.compile(r"(\d+)\.(?:attn\.c_attn|mlp\.c_proj|self_attn\.(?:v|qkv)_proj|mlp\.down_proj)\.")
_FIELDS = ("delta_ln_ppl", "delta_ln_ppl_stderr", "kl_divergence", "kl_divergence_stderr", "top1_agreement")


def main() -> int:
    parser = page_parser("lab.accuracy.mixed", __doc__, TOKENS, Path("artifacts/mixed"), JSON)
    parser.add_argument("--shares", nargs="*", default=SHARES, help=f"further budgets (default {' '.join(SHARES)})")
    args = parser.parse_args()
    if not args.reprint:
        write(args.output, json.dumps(measure(args.model, args.shares, args.tokens, args.work), indent=1) + "\n")
    write_page(args.output)
    return 0


def by_place(model: ir.Model, layers: int) -> dict[str, Grid]:
    """Return the grids of int4-weight for the matrices of `model`, with 8 bits where llama.cpp's rule has more."""
    first, last = layers // 8, 7 * layers // 8
    raised = {n for n in range(layers) if n < first or n >= last or (n - first) % 3 == 2}
    found = {name: _RAISED.search(name) for name in matrix_shapes(model.graph)}
    names = {name for name, place in found.items() if place and int(place[1]) in raised}
    return dict.fromkeys(sorted(names), Grid(8, 32, True, 8))


def make_by_place(fp32: Path, work: Path) -> Path:
    """Write the file of the rule by place into `work`; return its path."""
    recipe = RECIPES["int4-weight"]
    assert isinstance(recipe, WeightOnly)
    work.mkdir(parents=True, exist_ok=True)
    model = onnx_file.load(fp32 / "model.onnx")
    grids = by_place(model, sum(value.name.endswith(".key") for value in model.graph.inputs))
    windows = calibration_windows(fp32, load_calibration(Source(str(CORPUS))), recipe.calibration)
    decisions = decide(model, windows, replace(recipe.plan(), grids=grids), work)
    quantize_weights(model, choose_weights(model, decisions, recipe.table(), grids), "portable")
    onnx_file.save(model, work)
    return work / "model.onnx"


def measure(model: Path, shares: list[str], tokens: int, work: Path) -> dict:
    """Make and score the files; return the content of mixed.json."""
    fp32 = export(model, work)
    files = {
        "int4-weight": quantize(fp32, "int4-weight", corpus=str(CORPUS)).model,
        "rule by place": make_by_place(fp32.path, work / "by-place"),
    }
    budgets = {f"as {name}": str(file.stat().st_size) for name, file in files.items()} | {
        share: share for share in shares
    }
    details = {}
    for name, budget in budgets.items():
        folder = "int-mixed-" + name.replace(" ", "-")
        made = quantize(fp32, MixedWeightOnly(budget), corpus=str(CORPUS), name=folder)
        files[f"int-mixed, {name}"], details[f"int-mixed, {name}"] = made.model, made.manifest.details["mixed"]
    subjects = [Subject("fp32", "onnx", fp32.model), *(Subject(name, "onnx", file) for name, file in files.items())]
    task = make_task(fp32.path, load_test(Source(str(CORPUS))), tokens, WINDOW)
    # Without a stream, llama.cpp's protocol is left out, which the page does not show.
    rows = measure_quality(subjects, replace(task, stream=task.stream[:0]), THREADS)
    whole = fp32.model.stat().st_size
    return {
        "model": model.name,
        "cpu": cpu_name(),
        "versions": digests.versions("onnxruntime", "onnx", "numpy"),
        "tokens": rows["fp32"]["tokens_scored"],
        "documents": len(task.documents),
        "rows": [
            {"name": name, "bytes": file.stat().st_size, "ratio": file.stat().st_size / whole}
            | {field: rows[name][field] for field in _FIELDS}
            for name, file in files.items()
        ],
        "predictions": [
            {
                "name": name,
                "predicted": found["predicted_kl"],
                "measured": found["measured_on_calibration"]["kl_divergence"],
                "bits": [[matrix, part["bits"], part["block"]] for matrix, part in found["matrices"].items()],
            }
            for name, found in details.items()
        ],
    }


def write_page(path: Path) -> None:
    """Write the page of the JSON file `path` into its folder (`page_folder`)."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        (
            row["name"],
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['ratio']:.4f}",
            plus_minus(row["delta_ln_ppl"], row["delta_ln_ppl_stderr"], 4, "en"),
            plus_minus(row["kl_divergence"], row["kl_divergence_stderr"], 5, "en"),
            f"{100 * row['top1_agreement']:.1f}",
        )
        for row in sorted(fields["rows"], key=lambda row: row["bytes"])
    ]
    predictions = [
        (
            found["name"],
            f"{found['predicted']:.5f}",
            f"{found['measured']:.5f}",
            str(sum(bits == 8 for _, bits, _ in found["bits"])),
            *(str(sum((bits, block) == (4, size) for _, bits, block in found["bits"])) for size in (16, 32, 64, 128)),
        )
        for found in fields["predictions"]
    ]
    text = filled(
        Path(__file__).resolve().parent / "mixed.md.j2",
        model=fields["model"],
        cpu=fields["cpu"],
        onnxruntime=fields["versions"]["onnxruntime"],
        tokens=f"{fields['tokens']:,}",
        documents=fields["documents"],
        rows=rows,
        predictions=predictions,
    )
    target = (page_folder(path) / path.name).with_suffix(".md")
    write(target, text)
    say(f"mixed     {target}: written")


if __name__ == "__main__":
    run(main)
