"""report.html: one file that needs no other and no network, for a phone as for a screen, in light and dark."""

from __future__ import annotations

import difflib
import re
from html import escape
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cuantiza.eval.report import charts
from cuantiza.eval.report.conclusion import RUINED, conclusion, is_torch, shape
from cuantiza.eval.report.wording import LABELS, METHOD, number, percent

_TEMPLATES = Path(__file__).resolve().parent / "templates"


def templates(folder: Path) -> Environment:
    """The pages' templates in `folder`: what they are given is escaped, and all of it must be given."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(report: dict, language: str = "en") -> str:
    """The page of `report` (docs/report.md) in `language`, en or es. Whatever the report says is escaped."""
    labels, first = LABELS[language], report["artifacts"][0]
    facts = {"window": report["corpus"]["window_tokens"], "first": first["name"], "rounds": report["rounds"]}
    layers = charts.layers(report, labels, language)
    return (
        templates(_TEMPLATES)
        .get_template("report.html.j2")
        .render(
            language=language,
            labels=labels,
            report=report,
            summary=_summary(report, labels, language),
            conclusion=[_emphasis(line) for line in conclusion(report, language)],
            columns=_columns(report, labels),
            rows=[_cells(report, row, labels, language) for row in report["artifacts"]],
            tradeoff=Markup(charts.tradeoff(report, labels, language)),
            latency=Markup(charts.latency(report, labels, language)),
            layers=Markup(layers) if layers else None,
            torch=any(map(is_torch, report["artifacts"])),
            texts=_texts(report),
            protocols=_protocols(report, labels, language),
            method=[line.format(**facts, threads=report["machine"]["threads"]) for line in METHOD[language]],
            environment=_environment(report, labels, language),
        )
    )


def _summary(report: dict, labels: dict, language: str) -> str:
    corpus, scored = report["corpus"], report["artifacts"][0]["tokens_scored"]
    return (
        f"{number(scored, 0, language)} {labels['tokens_scored']} · {corpus['documents']} {labels['of']} "
        f"{corpus['documents_in_split']} {labels['documents']} ({corpus['split']}) · {corpus['source']}"
    )


def _columns(report: dict, labels: dict) -> list[str]:
    first = report["artifacts"][0]
    return [
        labels["artifact"],
        labels["size"],
        labels["ratio"].format(first=first["name"]).replace(" ", "\N{NO-BREAK SPACE}"),
        labels["perplexity"],
        labels["delta"],
        labels["kl"],
        labels["same_top"],
        labels["bits"],
        labels["prefill"].format(at=shape(first, "prefill")["tokens"]),
        labels["decode"].format(at=shape(first, "decode")["position"]),
        labels["load"],
        labels["peak"],
    ]


def _cells(report: dict, row: dict, labels: dict, language: str) -> dict:
    """A row of the table: its name, its other cells, and whether it is ruined or PyTorch's."""
    first = report["artifacts"][0]
    is_first = row is first

    def timed(phase: str) -> str:
        item = shape(row, phase)
        return f"{number(item['p50_ms'], 2, language)} ({number(item['speedup'], 2, language)} ×)"

    cells = [
        number(row["bytes"] / 1e6, 1, language),
        number(row["bytes"] / first["bytes"], 3, language),
        plus_minus(row["perplexity"], row["perplexity_stderr"], 2, language),
        labels["baseline"] if is_first else plus_minus(row["delta_ln_ppl"], row["delta_ln_ppl_stderr"], 4, language),
        "" if is_first else number(row["kl_divergence"], 5, language),
        "" if is_first else percent(row["top1_agreement"], language, 1),
        number(row["bits_per_byte"], 4, language),
        timed("prefill"),
        timed("decode"),
        number(row["load_ms"], 0, language),
        number(row["peak_rss_bytes"] / 1e6, 0, language),
    ]
    kind = "ruined" if row["delta_ln_ppl"] > RUINED else "torch" if is_torch(row) else ""
    return {"name": row["name"], "cells": cells, "kind": kind}


def plus_minus(value: float, stderr: float | None, digits: int, language: str) -> str:
    return number(value, digits, language) + ("" if stderr is None else f" ± {number(stderr, digits, language)}")


def _protocols(report: dict, labels: dict, language: str) -> dict:
    rows = []
    for row in report["artifacts"]:
        llama = row["llama_cpp"]
        shown = plus_minus(llama["perplexity"], llama["perplexity_stderr"], 2, language) if llama else "—"
        cells = [shown, number(row["word_perplexity"], 2, language), number(row["byte_perplexity"], 4, language)]
        rows.append({"name": row["name"], "cells": cells})
    return {"columns": [labels[key] for key in ("artifact", "llama", "word", "byte")], "rows": rows}


def _environment(report: dict, labels: dict, language: str) -> list[tuple[str, str]]:
    machine, corpus = report["machine"], report["corpus"]
    return [
        (labels["processor"], machine["cpu"]),
        (labels["threads"], f"{machine['threads']} {labels['of']} {machine['processors']}"),
        (labels["memory"], f"{number(machine['memory_bytes'] / 2**30, 0, language)} GiB"),
        (labels["system"], machine["system"]),
        (labels["rounds"], str(report["rounds"])),
        (labels["corpus"], f"{corpus['source']} ({corpus['split']}, sha256 {corpus['sha256']})"),
        (labels["versions"], ", ".join(f"{name} {version}" for name, version in report["versions"].items())),
    ]


def _emphasis(text: str) -> Markup:
    """The conclusion's own `**` and backticks as HTML, figures kept with their units; all else escaped."""
    whole = re.sub(r"(?<=\d) (?=%|MB|ms|nats)| (?=±)|(?<=±) ", "\N{NO-BREAK SPACE}", text)
    safe = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(whole))
    return Markup(re.sub(r"`(.+?)`", r"<code>\1</code>", safe))


def _texts(report: dict) -> list[tuple[str, Markup]]:
    """Each continuation once, with the names of all rows that wrote it."""
    names: dict[str, list[str]] = {}
    for row in report["artifacts"]:
        names.setdefault(row["continuation"], []).append(row["name"])
    first = report["artifacts"][0]["continuation"]
    return [(", ".join(who), _marked(first, text)) for text, who in names.items()]


def _marked(baseline: str, text: str) -> Markup:
    """`text` with the words marked that `baseline` has not at their place."""
    theirs, ours = (re.findall(r"\s*\S+|\s+$", value) for value in (baseline, text))
    out = []
    for action, _, _, begin, end in difflib.SequenceMatcher(None, theirs, ours, autojunk=False).get_opcodes():
        piece = "".join(ours[begin:end])
        words = piece.lstrip()
        out.append(escape(piece[: len(piece) - len(words)]))
        out.append(escape(words) if action == "equal" or not words else f"<mark>{escape(words)}</mark>")
    return Markup("".join(out))
