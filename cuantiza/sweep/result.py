"""sweep.json: every cell of a grid with what was measured, and which of them are on the Pareto front."""

from __future__ import annotations

from cuantiza.core.machine.hardware import software
from cuantiza.core.store import digests
from cuantiza.eval.report.conclusion import shape
from cuantiza.sweep.driver import Sweep

SCHEMA = "cuantiza/sweep/1"


def result(sweep: Sweep) -> dict:
    """The content of sweep.json (docs/sweep.md); cells without a result are in `failed`, with the reason."""
    cells = []
    for cell in (cell for cell in sweep.grid.cells if cell in sweep.quality and cell in sweep.latency):
        made = sweep.made[cell]
        names = {"model": cell.model, "recipe": cell.recipe, "corpus": cell.corpus}
        size = {"artifact": made.digest, "bytes": made.bytes, "model_bytes": made.model_bytes}
        cells.append(names | size | sweep.quality[cell] | sweep.latency[cell])
    for group in grouped(cells):
        best = front(group)
        for row in group:
            row["pareto"] = row in best
    found = {
        "schema": SCHEMA,
        "models": list(sweep.grid.models),
        "recipes": list(sweep.grid.recipes),
        "corpora": {
            name: {"source": corpus.source.spec, "test_sha256": corpus.test.sha256}
            for name, corpus in sweep.grid.corpora.items()
        },
        "window": sweep.settings.window,
        "rounds": sweep.settings.rounds,
        "versions": software(),
        "cells": cells,
        "failed": [{"cell": str(cell), "reason": reason} for cell, reason in sweep.failed.items()],
    }
    return found | {"sha256": digests.digest(found)}


def grouped(cells: list[dict]) -> list[list[dict]]:
    """The cells of each model and corpus, which have their baseline in common."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in cells:
        groups.setdefault((row["model"], row["corpus"]), []).append(row)
    return list(groups.values())


def front(rows: list[dict]) -> list[dict]:
    """Those of `rows` that no other beats: smaller, closer and faster, or as good in two of these and better in one.

    Size in bytes; Δ ln perplexity against the model's fp32; speed as the time of a decoded token over fp32's, both
    measured in turns on one machine.
    """

    def costs(row: dict) -> tuple[float, float, float]:
        return row["bytes"], row["delta_ln_ppl"], 1 / shape(row, "decode")["speedup"]

    def beats(one: dict, other: dict) -> bool:
        pairs = list(zip(costs(one), costs(other), strict=True))
        return all(own <= theirs for own, theirs in pairs) and any(own < theirs for own, theirs in pairs)

    return [row for row in rows if not any(beats(other, row) for other in rows)]
