"""Splits the scoring of one model on one corpus into tasks, and computes the cells' fields from the tasks' scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from cuantiza.eval.measure.answers.flips import compared
from cuantiza.eval.measure.estimates import quality
from cuantiza.eval.measure.quality import Task as Text
from cuantiza.eval.measure.score import Scores
from cuantiza.sweep.grid import Cell
from cuantiza.sweep.tasks.made import Made
from cuantiza.sweep.tasks.measure import Quality, merge


@dataclass
class Group:
    """Artifacts that are scored together with their baseline `base`. `wanted` are the cells that have no result yet."""

    base: Cell
    others: tuple[Cell, ...]
    wanted: tuple[Cell, ...]
    text: Text
    parts: dict[int, list[Scores]] = field(default_factory=dict)

    def tasks(self, made: dict[Cell, Made], shard: int, threads: int) -> list[Quality]:
        """One task per part of the text, in order. `shard` is the number of tokens per part, as in `shards`."""
        documents = self.text.documents
        names = " ".join(cell.recipe for cell in (self.base, *self.others))
        return [
            Quality(
                f"{self.base.model} × {names} × {self.base.corpus}, documents {first + 1} to {end} of {len(documents)}",
                made[self.base],
                tuple(made[cell] for cell in self.others),
                tuple(documents[first:end]),
                first,
                self.text.start,
                self.text.window,
                threads,
            )
            for first, end in shards(documents, shard)
        ]

    def fields(self) -> dict[Cell, dict]:
        """The quality fields (docs/report.md) of the wanted cells, computed from the scores of all parts."""
        baseline, *others = merge([self.parts[first] for first in sorted(self.parts)])
        against: dict[Cell, tuple[Scores, Scores | None]] = {self.base: (baseline, None)}
        against |= {cell: (own, baseline) for cell, own in zip(self.others, others, strict=True)}
        return {
            cell: quality(own, self.text.size, base) | {"last_words": compared(own, base, self.text.words)}
            for cell, (own, base) in against.items()
            if cell in self.wanted
        }


def groups(base: Cell, missing: list[Cell], made: dict[Cell, Made], text: Text) -> list[Group]:
    """Put the `missing` cells into groups whose artifacts together are no larger than their baseline.

    So a task needs about twice the baseline's memory, and three or four artifacts share the cost of running the
    baseline. An artifact larger than the baseline has a group of its own.
    """
    found: list[list[Cell]] = []
    room = 0
    for cell in (cell for cell in missing if cell != base):
        if not found or made[cell].bytes > room:
            found.append([])
            room = made[base].bytes
        found[-1].append(cell)
        room -= made[cell].bytes
    if base in missing:
        found = [[base, *(found[0] if found else [])], *found[1:]]
    return [Group(base, tuple(cell for cell in part if cell != base), tuple(part), text) for part in found]


def shards(documents: list[list[int]], tokens: int) -> list[tuple[int, int]]:
    """Split the documents into runs (first, end) of whole documents with at least `tokens` tokens each.

    Only the last run may have fewer.
    """
    bounds, reached = [0], 0
    for number, end in enumerate(np.cumsum([len(ids) for ids in documents]), 1):
        if end - reached >= tokens or number == len(documents):
            bounds.append(number)
            reached = end
    return list(pairwise(bounds))
