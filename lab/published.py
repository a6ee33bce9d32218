"""Measures GPT-2 on WikiText-2 as papers do, and writes docs/published.md: our losses beside published ones.

python -m lab.published --models gpt2 gpt2-medium    measures these; it needs a network, or what the hub's cache has
python -m lab.published --reprint                    writes the page again from docs/data/published.json

Models are openai-community's, the text is WikiText-2 (raw) of Salesforce/wikitext: its test split, joined to one text, is
scored whole by the protocols of eval/measure/tokens/protocols.py, and its train split calibrates. Figures of other models stay in
the JSON where they were measured with the same versions, code and text. The stages keep their artifacts in --work.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cuantiza.core.errors import run
from cuantiza.core.inputs.corpus import Source, load_test
from cuantiza.core.machine.hardware import cpu_name, default_threads
from cuantiza.core.machine.process import Remote
from cuantiza.core.machine.progress import report as say
from cuantiza.core.store import digests
from cuantiza.eval.measure.engines import Engine, Subject
from cuantiza.eval.measure.quality import make_task
from cuantiza.eval.measure.score import Scores
from cuantiza.eval.measure.tokens.protocols import measure_protocol
from cuantiza.eval.report.columns import relative_rise
from cuantiza.eval.report.schema import PAPER_NAMES, Protocol
from cuantiza.export.stage import export
from cuantiza.quantize.stage import quantize
from lab import DATA, ROOT, page_folder
from lab.pages import filled, write

JSON = DATA / "published.json"
MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
RECIPES = ("int8-static", "int8-dynamic", "int4-weight")
TEXT = Source("Salesforce/wikitext", "wikitext-2-raw-v1", "test", join=True)
WHOLE, WINDOW = 10**9, 512  # tokens: more than the text has, and a window of the protocol that is not measured here


@dataclass(frozen=True)
class Published:
    """The rise of perplexity that others published for GPT-2 on WikiText, by model, and our recipe to compare."""

    source: str
    recipe: str
    rises: dict[str, str]


PUBLISHED = (
    Published("Intel Neural Compressor, static int8", "int8-static", {"gpt2": "+4.3 %"}),
    Published("Intel Neural Compressor, dynamic int8", "int8-dynamic", {"gpt2": "+2.4 %"}),
    Published(
        "AutoGPTQ, 4 bits in groups of 128",
        "int4-weight",
        dict(zip(MODELS, ("+5.2 %", "+3.8 %", "+1.4 %", "+0.9 %"), strict=True)),
    ),
)
# Perplexities in fp32 that others published for this text, by protocol and model: the check that ours is theirs.
PERPLEXITIES = {
    ("transformers", "gpt2-large"): "16.45 (transformers' documentation)",
    ("gptq", "gpt2-large"): "19.44 (transformers' documentation, without overlap)",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lab.published", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="sizes (default: all four)")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES, help="recipes (default: all three)")
    default = Path("artifacts/published")
    parser.add_argument("--work", type=Path, default=default, help=f"folder of the artifacts (default {default})")
    parser.add_argument("--output", type=Path, default=JSON, help=f"the figures (default {JSON.relative_to(ROOT)})")
    parser.add_argument("--reprint", action="store_true", help="write the page again from the JSON, without measuring")
    args = parser.parse_args()
    if not args.reprint:
        for name in args.models:
            row = measure(name, args.recipes, args.work)
            # Write after every size, so that these figures are safe if a larger size fails.
            write(args.output, json.dumps(join(args.output, about(), row), indent=1) + "\n")
    write_page(args.output)
    return 0


def about() -> dict:
    """What figures of several runs must have in common to stand in one table."""
    return {
        "cpu": cpu_name(),
        "versions": digests.versions("onnxruntime", "onnx", "numpy", "tokenizers"),
        "code": digests.code_digest("cuantiza.quantize.recipes.registry", "cuantiza.eval.measure.tokens.protocols"),
        "text_sha256": load_test(TEXT).sha256,
    }


def join(path: Path, facts: dict, row: dict) -> dict:
    """The content of the file `path` with the row of one model, which takes the place of an older one.

    Rows that were measured under other conditions than `facts` are left out.
    """
    known: list[dict] = []
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        known = found["rows"] if {key: found.get(key) for key in facts} == facts else []
    rows = {item["model"]: item for item in [*known, row]}
    return facts | {"rows": [rows[name] for name in MODELS if name in rows]}


def measure(name: str, recipes: Sequence[str], work: Path) -> dict:
    """Export, quantize and score one model: every protocol's fields (docs/report.md) of every artifact, fp32 first."""
    fp32 = export(f"openai-community/{name}", work)
    items = [fp32, *(quantize(fp32, recipe, corpus=TEXT) for recipe in recipes)]
    task = make_task(fp32.path, load_test(TEXT), WHOLE, WINDOW, PAPER_NAMES)
    reference: dict[str, Scores] = {}
    artifacts = []
    for item in items:
        subject, found = Subject(item.manifest.name, "onnx", item.model), []
        with Remote(Engine, subject, default_threads(), label=subject.name) as remote:
            for paper in task.papers:
                label = f"{name} {subject.name}"
                measured = measure_protocol(paper, task.stream, task.longest, remote, label, reference.get(paper))
                if measured is not None:
                    found.append(measured[0])
                    reference.setdefault(paper, measured[1])
        artifacts.append({"name": subject.name, "protocols": found})
    return {"model": name, "tokens": len(task.stream), "artifacts": artifacts}


def write_page(path: Path) -> None:
    """Write the Markdown page of the JSON file `path` into its folder (`page_folder`): only what was measured."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    tables = []
    for paper in PAPER_NAMES:
        found = {
            (row["model"], item["name"]): Protocol(**protocol)
            for row in fields["rows"]
            for item in row["artifacts"]
            for protocol in item["protocols"]
            if protocol["name"] == paper
        }
        models = [row["model"] for row in fields["rows"] if (row["model"], "fp32") in found]
        if models:
            tables.append((found[models[0], "fp32"], ["", *models], _lines(paper, models, found)))
    text = filled(
        Path(__file__).resolve().parent / "templates/published.md.j2",
        cpu=fields["cpu"],
        onnxruntime=fields["versions"]["onnxruntime"],
        models=" ".join(row["model"] for row in fields["rows"]),
        tables=tables,
    )
    target = (page_folder(path) / path.name).with_suffix(".md")
    write(target, text)
    say(f"published {target}: written")


def _lines(paper: str, models: list[str], found: dict[tuple[str, str], Protocol]) -> list[list[str]]:
    """The lines of one protocol's table: fp32's perplexity, and each published loss with ours below it."""
    lines = [["fp32, perplexity", *(f"{found[model, 'fp32'].perplexity:.2f}" for model in models)]]
    if any((paper, model) in PERPLEXITIES for model in models):
        lines.append(["published", *(PERPLEXITIES.get((paper, model), "") for model in models)])
    for entry in PUBLISHED:
        ours = [found.get((model, entry.recipe)) for model in models]
        if any(ours):
            lines.append([f"`{entry.recipe}`", *(relative_rise(item, "en") if item else "" for item in ours)])
            lines.append([entry.source, *(entry.rises.get(model, "") for model in models)])
    return lines


if __name__ == "__main__":
    run(main)
