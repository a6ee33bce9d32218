"""sweep.json as typed classes: every cell of a grid with what was measured, and which cells are on the Pareto front."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final, Literal

from pydantic import Field

from cuantiza.core.machine.hardware import software
from cuantiza.core.store import digests
from cuantiza.eval.report.schema import Machine, Measured, Part
from cuantiza.sweep.driver import Sweep
from cuantiza.sweep.grid import BASELINE

SCHEMA: Final = "cuantiza/sweep/1"


class Cell(Measured):
    """A model quantized with a recipe and scored on a corpus: the fields of a report's row, and the machine."""

    name: str = Field(alias="recipe", description="the recipe")
    model: str = Field(description="name of the model")
    corpus: str = Field(description="name of the corpus")
    artifact: str = Field(description="digest of the artifact")
    machine: Machine = Field(description="where its latency was measured")
    pareto: bool = Field(False, description="whether no other cell of its model and corpus beats it")

    @property
    def is_baseline(self) -> bool:
        return self.name == BASELINE


class Source(Part):
    """A corpus of the grid."""

    source: str = Field(description="what `CORPORA=` named")
    test_sha256: str = Field(description="sha256 of its test split")


class Failure(Part):
    """A cell without a result."""

    cell: str = Field(description="model × recipe × corpus")
    reason: str = Field(description="why there is none")


class Result(Part):
    """The content of sweep.json (docs/sweep.md)."""

    schema_name: Literal["cuantiza/sweep/1"] = Field(alias="schema")
    models: tuple[str, ...]
    recipes: tuple[str, ...]
    corpora: dict[str, Source]
    window: int = Field(description="longest context of a scored token, tokens")
    rounds: int = Field(description="rounds of latency")
    versions: dict[str, str]
    cells: tuple[Cell, ...]
    failed: tuple[Failure, ...]
    sha256: str = Field("", description="sha256 of everything else here")

    @classmethod
    def from_json(cls, text: str | bytes) -> Result:
        """The result in `text`. Raises pydantic's ValidationError, a ValueError, if it has another schema."""
        return cls.model_validate_json(text, strict=True)

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=1, ensure_ascii=False) + "\n"

    def groups(self) -> list[list[Cell]]:
        """The cells grouped by model and corpus. The cells of a group have the same baseline."""
        return grouped(self.cells)


def result(sweep: Sweep) -> Result:
    """The results of `sweep`. A cell without quality or latency is in `failed`, with the reason."""
    cells = []
    measured = sweep.quality.keys() & sweep.latency.keys() - sweep.failed.keys()
    for cell in (cell for cell in sweep.grid.cells if cell in measured):
        made = sweep.made[cell]
        names: dict[str, Any] = {"model": cell.model, "recipe": cell.recipe, "corpus": cell.corpus}
        size: dict[str, Any] = {"artifact": made.digest, "bytes": made.bytes, "model_bytes": made.model_bytes}
        cells.append(Cell(**names, **size, **sweep.quality[cell], **sweep.latency[cell]))
    best = {id(cell) for group in grouped(cells) for cell in front(group)}
    found = Result(
        schema=SCHEMA,
        models=tuple(sweep.grid.models),
        recipes=tuple(sweep.grid.recipes),
        corpora={
            name: Source(source=corpus.source.spec, test_sha256=corpus.test.sha256)
            for name, corpus in sweep.grid.corpora.items()
        },
        window=sweep.settings.window,
        rounds=sweep.settings.rounds,
        versions=software(),
        cells=tuple(cell.model_copy(update={"pareto": id(cell) in best}) for cell in cells),
        failed=tuple(Failure(cell=str(cell), reason=reason) for cell, reason in sweep.failed.items()),
    )
    content = found.model_dump(mode="json", by_alias=True, exclude={"sha256"})
    return found.model_copy(update={"sha256": digests.digest(content)})


def grouped(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The cells of each model and corpus, in the order of the first of each."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.model, cell.corpus), []).append(cell)
    return list(groups.values())


def front(cells: Sequence[Cell]) -> list[Cell]:
    """The Pareto front: the cells that no other cell beats.

    A cell beats another if it is at least as good in size, Δ ln perplexity and speed, and better in one of them. Size
    is in bytes. Δ ln perplexity is relative to the model's fp32. Speed is the time of a decode step relative to fp32's;
    both are measured in turns on one machine.
    """

    def costs(cell: Cell) -> tuple[float, float, float]:
        return cell.bytes, cell.delta_ln_ppl, 1 / cell.usual("decode").speedup

    def beats(one: Cell, other: Cell) -> bool:
        pairs = list(zip(costs(one), costs(other), strict=True))
        return all(own <= theirs for own, theirs in pairs) and any(own < theirs for own, theirs in pairs)

    return [cell for cell in cells if not any(beats(other, cell) for other in cells)]
