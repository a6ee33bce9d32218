"""Makes sweep.md, sweep.html and the terminal's table from the content of sweep.json."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from cuantiza.core.machine.terminal import new_table, show
from cuantiza.core.pages import count, environment, table
from cuantiza.core.store import folders
from cuantiza.eval.report import charts
from cuantiza.eval.report.columns import cells, titles
from cuantiza.eval.report.wording import LABELS
from cuantiza.sweep.result import Result

JSON, MARKDOWN, HTML = "sweep.json", "sweep.md", "sweep.html"
_NAMES = ("model", "corpus", "recipe", "front")
_FIGURES = ("size", "ratio", "perplexity", "delta", "kl", "same_top", "last_words", "prefill", "decode")
_TEXT = len(_NAMES)  # columns of words; the others hold figures
_TEMPLATES = Path(__file__).resolve().parent / "templates"


def columns() -> list[str]:
    """The titles of the table. Its ratios and differences are to the fp32 of each model."""
    return [*_NAMES, *titles(_FIGURES, None, "en")]


def write(result: Result, output: Path) -> bool:
    """Write the three files, renamed into place, unless the same are there already. Returns whether it wrote them."""
    return folders.publish_texts(output, {MARKDOWN: markdown(result), HTML: html(result), JSON: result.to_json()})


def rows(result: Result) -> list[list[str]]:
    """The cells of the table, in the order of `columns`."""
    found = []
    for group in result.groups():
        first = next(cell for cell in group if cell.is_baseline)
        for cell in group:
            names = [cell.model, cell.corpus, cell.name, "●" if cell.pareto else ""]
            found.append([*names, *cells(_FIGURES, cell, first, "en")])
    return found


def print_table(result: Result) -> None:
    """Print the table on standard output."""
    grid = new_table(headline(result), *columns(), words=_TEXT)
    for line in rows(result):
        grid.add_row(*line)
    show(grid, _TEXT)


def headline(result: Result) -> str:
    models, recipes = count(len(result.models), "model"), count(len(result.recipes) + 1, "recipe")
    corpora = f"{len(result.corpora)} " + ("corpus" if len(result.corpora) == 1 else "corpora")
    return f"{models}, {recipes}, {corpora}: {len(result.cells)} cells"


def method(result: Result) -> list[str]:
    """The sentences that explain the columns."""
    places = {(cell.machine.cpu, cell.machine.threads) for cell in result.cells}
    times = machines = ""
    if result.cells:
        machines = (
            "Measured on " + "; ".join(f"{cpu}, {count(threads, 'thread')}" for cpu, threads in sorted(places)) + "."
        )
        prefill, decode = (result.cells[0].usual(phase).at for phase in ("prefill", "decode"))
        times = (
            f"Prefill: {prefill} tokens. Decode: one token after {decode}. Median of {result.rounds} rounds in turns "
            "with fp32 on the same machine, in brackets the speed-up over it."
        )
    return [
        "● is on the Pareto front of its model and corpus: no other cell is as small, as close to fp32 and as fast in "
        "decoding, and better in one of the three. Figures as measured: a difference within the noise counts.",
        "Perplexity is over whole test documents, every token once, in windows of at most "
        f"{result.window} tokens; ± is one standard error over documents; Δ and KL are paired with the model's fp32.",
        "Last words: the share of sentences whose last word the model has right, in brackets the words that fp32 misses and this "
        "recipe has right (+), and the reverse (−) (docs/report.md).",
        times,
        machines,
        "Versions: " + ", ".join(f"{name} {version}" for name, version in result.versions.items()) + ".",
    ]


def markdown(result: Result) -> str:
    """The text of sweep.md."""
    lines = [
        f"# {headline(result)}",
        "",
        table(columns(), rows(result), left=range(_TEXT)),
        *(f"- {line}" for line in method(result) if line),
    ]
    if result.failed:
        lines += ["", "## Without a result", ""]
        lines += [f"- **{item.cell}**: {item.reason}" for item in result.failed]
    return "\n".join(lines) + "\n"


def html(result: Result) -> str:
    """The text of sweep.html. The page loads nothing from the network, and every value is escaped."""
    labels = LABELS["en"]
    plots = []
    for group in result.groups():
        plots.append((f"{group[0].model} · {group[0].corpus}", Markup(charts.tradeoff(group, labels, "en"))))
    return (
        environment(_TEMPLATES)
        .get_template("sweep.html.j2")
        .render(
            title=headline(result),
            columns=columns(),
            text=_TEXT,
            rows=rows(result),
            plots=plots,
            note=labels["tradeoff_note"],
            method=[line for line in method(result) if line],
            failed=result.failed,
        )
    )
