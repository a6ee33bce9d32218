"""sweep.json -> sweep.md, sweep.html and the table on the terminal, from the figures alone."""

from __future__ import annotations

import json
from pathlib import Path

from markupsafe import Markup

from cuantiza.core.machine.terminal import new_table, show
from cuantiza.core.store import folders
from cuantiza.eval.report import charts
from cuantiza.eval.report.conclusion import shape
from cuantiza.eval.report.html import plus_minus, templates
from cuantiza.eval.report.wording import LABELS, number, percent
from cuantiza.sweep.grid import BASELINE
from cuantiza.sweep.result import grouped

JSON, MARKDOWN, HTML = "sweep.json", "sweep.md", "sweep.html"
COLUMNS = (
    "model",
    "corpus",
    "recipe",
    "front",
    "MB",
    "× fp32",
    "perplexity",
    "Δ ln ppl",
    "KL, nats",
    "same top",
    "prefill, ms",
    "decode, ms",
)
_TEXT = 4  # columns of words; the others hold figures
_TEMPLATES = Path(__file__).resolve().parent / "templates"


def write(result: dict, output: Path) -> bool:
    """Write the three files, renamed into place, where they differ from what is there; whether they did."""
    pages = {
        MARKDOWN: markdown(result),
        HTML: html(result),
        JSON: json.dumps(result, indent=1, ensure_ascii=False) + "\n",
    }
    return folders.publish_texts(output, pages)


def rows(result: dict) -> list[list[str]]:
    """The cells of the table, in the order of COLUMNS."""
    found = []
    for group in grouped(result["cells"]):
        base = next(row for row in group if row["recipe"] == BASELINE)
        found += [_row(row, base) for row in group]
    return found


def _row(row: dict, base: dict) -> list[str]:
    def timed(phase: str) -> str:
        item = shape(row, phase)
        return f"{number(item['p50_ms'], 2, 'en')} ({number(item['speedup'], 2, 'en')} ×)"

    is_base = row is base
    return [
        row["model"],
        row["corpus"],
        row["recipe"],
        "●" if row["pareto"] else "",
        number(row["bytes"] / 1e6, 1, "en"),
        number(row["bytes"] / base["bytes"], 3, "en"),
        plus_minus(row["perplexity"], row["perplexity_stderr"], 2, "en"),
        "baseline" if is_base else plus_minus(row["delta_ln_ppl"], row["delta_ln_ppl_stderr"], 4, "en"),
        "" if is_base else number(row["kl_divergence"], 5, "en"),
        "" if is_base else percent(row["top1_agreement"], "en", 1),
        timed("prefill"),
        timed("decode"),
    ]


def print_table(result: dict) -> None:
    """On standard output."""
    table = new_table(headline(result), *COLUMNS, words=_TEXT)
    for line in rows(result):
        table.add_row(*line)
    show(table, _TEXT)


def headline(result: dict) -> str:
    models, recipes = _count(len(result["models"]), "model"), _count(len(result["recipes"]) + 1, "recipe")
    corpora = f"{len(result['corpora'])} " + ("corpus" if len(result["corpora"]) == 1 else "corpora")
    return f"{models}, {recipes}, {corpora}: {len(result['cells'])} cells"


def method(result: dict) -> list[str]:
    """What the columns are, in sentences."""
    shapes = result["cells"][0] if result["cells"] else None
    cells = result["cells"]
    places = {(row["machine"]["cpu"], row["machine"]["threads"]) for row in cells}
    times = ""
    if shapes:
        prefill, decode = shape(shapes, "prefill")["tokens"], shape(shapes, "decode")["position"]
        times = (
            f"Prefill: {prefill} tokens. Decode: one token behind {decode}. Median of {result['rounds']} rounds in turns "
            "with fp32 on the same machine, in brackets the speed-up over it."
        )
    return [
        "● is on the Pareto front of its model and corpus: no other cell is as small, as close to fp32 and as fast in "
        "decoding, and better in one of the three. Figures as measured: a difference within the noise counts.",
        "Perplexity is over whole test documents, every token once, in windows of at most "
        f"{result['window']} tokens; ± is one standard error over documents; Δ and KL are paired with the model's fp32.",
        times,
        "Measured on " + "; ".join(f"{cpu}, {_count(threads, 'thread')}" for cpu, threads in sorted(places)) + ".",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in result["versions"].items()) + ".",
    ]


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def markdown(result: dict) -> str:
    """sweep.md."""
    lines = [
        f"# {headline(result)}",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * _TEXT + "---:|" * (len(COLUMNS) - _TEXT),
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in rows(result)),
        "",
        *(f"- {line}" for line in method(result) if line),
    ]
    if result["failed"]:
        lines += ["", "## Without a result", ""]
        lines += [f"- **{item['cell']}**: {item['reason']}" for item in result["failed"]]
    return "\n".join(lines) + "\n"


def html(result: dict) -> str:
    """sweep.html: one file, no network; whatever the result says is escaped."""
    labels = LABELS["en"]
    plots = []
    for group in grouped(result["cells"]):
        named = [row | {"name": row["recipe"]} for row in group]
        plot = Markup(charts.tradeoff({"artifacts": named}, labels, "en"))
        plots.append((f"{group[0]['model']} · {group[0]['corpus']}", plot))
    return (
        templates(_TEMPLATES)
        .get_template("sweep.html.j2")
        .render(
            title=headline(result),
            columns=COLUMNS,
            text=_TEXT,
            rows=rows(result),
            plots=plots,
            note=labels["tradeoff_note"],
            method=[line for line in method(result) if line],
            failed=result["failed"],
        )
    )
