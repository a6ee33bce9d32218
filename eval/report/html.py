"""Render report.html: one file that needs no other file and no network, for phones and screens, light and dark."""

from __future__ import annotations

import difflib
import re
from html import escape
from pathlib import Path

from markupsafe import Markup

from cuantiza.core.pages import environment
from cuantiza.eval.report import charts
from cuantiza.eval.report.colours import DARK_PAPER, LIGHT_PAPER, palette
from cuantiza.eval.report.columns import MAIN, cells, protocols_of, titles
from cuantiza.eval.report.conclusion import RUINED, conclusion
from cuantiza.eval.report.markdown import left_out, method, protocols, summary, surroundings, timings
from cuantiza.eval.report.schema import Report, Row
from cuantiza.eval.report.wording import LABELS

_TEMPLATES = Path(__file__).resolve().parent / "templates"


def render(report: Report, language: str = "en") -> str:
    """Render the page of `report` in `language`, en or es. All text from the report is escaped."""
    labels, rows, first = LABELS[language], report.artifacts, report.baseline
    layers = charts.layers(rows, labels, language)
    timing_columns, timing_rows = timings(report, language)
    template = environment(_TEMPLATES).get_template("report.html.j2")
    return template.render(
        language=language,
        labels=labels,
        report=report,
        summary=summary(report, language),
        conclusion=[_emphasis(line) for line in conclusion(report, language)],
        columns=[title.replace("× ", "×\N{NO-BREAK SPACE}") for title in titles(MAIN, first, language)],
        rows=[{"kind": _kind(row), "cells": cells(MAIN, row, first, language)} for row in rows],
        tradeoff=Markup(charts.tradeoff([row for row in rows if not row.is_torch], labels, language)),
        latency=Markup(charts.latency(rows, labels, language)),
        layers=Markup(layers) if layers else None,
        torch=any(row.is_torch for row in rows),
        colours=palette(len(rows)),
        light_paper=LIGHT_PAPER,
        dark_paper=DARK_PAPER,
        timing_columns=timing_columns,
        timing_rows=timing_rows,
        texts=_texts(report),
        protocols=protocols(report, language),
        protocol_columns=titles(protocols_of(first), first, language),
        protocol_rows=[cells(protocols_of(first), row, first, language) for row in rows],
        left_out=left_out(report, language),
        method=method(report, language),
        environment=surroundings(report, language),
    )


def _kind(row: Row) -> str:
    """The CSS class of a row of the table."""
    return "ruined" if row.delta_ln_ppl > RUINED else "torch" if row.is_torch else ""


def _emphasis(text: str) -> Markup:
    """Turn the `**` and backticks of the conclusion into HTML, keep figures beside their units, and escape all else."""
    whole = re.sub(r"(?<=\d) (?=%|MB|ms|nats)| (?=±)|(?<=±) ", "\N{NO-BREAK SPACE}", text)
    safe = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(whole))
    return Markup(re.sub(r"`(.+?)`", r"<code>\1</code>", safe))


def _texts(report: Report) -> list[tuple[str, Markup]]:
    """List each continuation once, with the names of all rows that wrote it."""
    names: dict[str, list[str]] = {}
    for row in report.artifacts:
        names.setdefault(row.continuation, []).append(row.name)
    first = report.baseline.continuation
    return [(", ".join(who), _marked(first, text)) for text, who in names.items()]


def _marked(baseline: str, text: str) -> Markup:
    """Mark the words of `text` that differ from those of `baseline`."""
    theirs, ours = (re.findall(r"\s*\S+|\s+$", value) for value in (baseline, text))
    out = []
    for action, _, _, begin, end in difflib.SequenceMatcher(None, theirs, ours, autojunk=False).get_opcodes():
        piece = "".join(ours[begin:end])
        words = piece.lstrip()
        out.append(escape(piece[: len(piece) - len(words)]))
        out.append(escape(words) if action == "equal" or not words else f"<mark>{escape(words)}</mark>")
    return Markup("".join(out))
