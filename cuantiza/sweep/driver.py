"""Works through a grid: first the artifacts, then quality, then latency.

All computing happens in tasks. Measurements that an earlier run stored are not repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.checkpoints import is_base_of_working_folder
from cuantiza.core.machine.hardware import software
from cuantiza.core.machine.progress import report as say
from cuantiza.core.machine.progress import working
from cuantiza.core.store import digests
from cuantiza.eval.measure.quality import Task as Text
from cuantiza.eval.measure.quality import make_task
from cuantiza.sweep.executor import Done, Executor, Task
from cuantiza.sweep.grid import BASELINE, Cell, Grid
from cuantiza.sweep.tasks.build import Export, Quantize
from cuantiza.sweep.tasks.made import Made
from cuantiza.sweep.tasks.measure import Latency, Quality
from cuantiza.sweep.tasks.parts import Group, groups
from cuantiza.sweep.tasks.store import Store

_Task = TypeVar("_Task", bound=Task)


@dataclass(frozen=True)
class Settings:
    """How to measure. The fields are options of `cuantiza eval`, except `shard`, the tokens to score per task.

    A task scores whole documents, so it may have somewhat more tokens than `shard`.
    """

    tokens: int
    window: int
    rounds: int
    threads: int
    shard: int


@dataclass(frozen=True)
class Cost:
    """The cost of a finished task: how many seconds it took, and where."""

    kind: str
    label: str
    seconds: float
    where: str


@dataclass
class Sweep:
    """A grid and its results so far. `failed` says why a cell has no result."""

    grid: Grid
    settings: Settings
    work: Path
    executor: Executor
    made: dict[Cell, Made] = field(default_factory=dict)
    texts: dict[tuple[str, str], Text] = field(default_factory=dict)
    quality: dict[Cell, dict] = field(default_factory=dict)
    latency: dict[Cell, dict] = field(default_factory=dict)
    failed: dict[Cell, str] = field(default_factory=dict)
    costs: list[Cost] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = Store(self.work / "cells")

    def run(self) -> None:
        """Build and measure the whole grid.

        If a task fails, or a text is unfit for a model, its cells go to `failed` and the others continue.
        """
        self._export()
        self._quantize()
        self._score()
        self._time()
        self.failed = {
            cell: reason for cell, reason in self.failed.items() if cell not in self.quality or cell not in self.latency
        }
        for cell in self.grid.cells:  # a figure without what it is compared with says nothing
            if (base := self._base(cell)) in self.failed and cell not in self.failed:
                self.failed[cell] = f"{base}, which it is compared with, has no result: {self.failed[base]}"

    def _done(self, jobs: Sequence[tuple[_Task, list[Cell]]]) -> Iterator[tuple[_Task, list[Cell], Any]]:
        """Run the tasks of `jobs`, and yield each as it ends with its cells and its return value.

        A task that failed is not yielded; its cells go to `failed`.
        """
        cells = {id(task): own for task, own in jobs}
        for number, done in enumerate(self._working([task for task, _ in jobs]), 1):
            task = cast("_Task", done.task)  # the executor returns the tasks that it was given
            self.costs.append(Cost(task.kind, task.label, done.seconds, done.where))
            if done.error is None:
                say(f"{task.kind:9} {task.label}: {done.seconds:.1f} s, {number} of {len(jobs)}")
                yield task, cells[id(task)], done.value
            else:
                say(f"{task.kind:9} {task.label}: failed ({done.error})")
                self.failed |= {cell: done.error for cell in cells[id(task)] if cell not in self.failed}

    def _working(self, tasks: list[Task]) -> Iterator[Done]:
        """The executor's results, with lines of progress while a task takes long."""
        with working(f"sweep     {tasks[0].kind}" if tasks else "sweep", len(tasks)) as work:
            yield from work.count(self.executor.run(tasks))

    def _export(self) -> None:
        jobs = []
        for name, model in self.grid.models.items():
            cwd = Path.cwd() if is_base_of_working_folder(model.folder) else None
            task = Export(name, model, self.work / "artifacts", cwd)
            jobs.append((task, [cell for cell in self.grid.cells if cell.model == name]))
        for task, cells, made in self._done(jobs):
            for name, corpus in self.grid.corpora.items():
                try:
                    text = make_task(made.path, corpus.test, self.settings.tokens, self.settings.window)
                except UserError as error:
                    say(f"text      {task.label} × {name}: failed ({error})")
                    self.failed |= {cell: str(error) for cell in cells if cell.corpus == name}
                    continue
                # A baseline without a text is not put into `made`, so that no later step works on its cells.
                self.made[Cell(task.label, BASELINE, name)] = made
                self.texts[task.label, name] = text

    def _quantize(self) -> None:
        """Make one artifact per model and recipe. If the recipe calibrates, make one per corpus as well."""
        jobs: dict[str, tuple[Quantize, list[Cell]]] = {}
        for cell in (cell for cell in self.grid.cells if cell.recipe != BASELINE and self._base(cell) in self.made):
            parent = self.made[self._base(cell)].path
            folder = self.work / "artifacts" / self._name(cell, "--")
            source, recipe = self.grid.corpora[cell.corpus].source, self.grid.recipes[cell.recipe]
            task = Quantize(self._name(cell, " × "), parent, folder / cell.recipe, cell.recipe, recipe, source)
            jobs.setdefault(task.label, (task, []))[1].append(cell)
        for _, cells, made in self._done(list(jobs.values())):
            self.made |= dict.fromkeys(cells, made)

    def _score(self) -> None:
        jobs: dict[int, tuple[Group, int]] = {}
        tasks: list[tuple[Quality, list[Cell]]] = []
        for (model, corpus), text in self.texts.items():
            cells = [
                cell for cell in self.grid.cells if (cell.model, cell.corpus) == (model, corpus) and cell in self.made
            ]
            missing = self._missing(cells, self.quality, self._quality_inputs)
            for group in groups(Cell(model, BASELINE, corpus), missing, self.made, text):
                own = group.tasks(self.made, self.settings.shard, self.settings.threads)
                jobs |= {id(task): (group, len(own)) for task in own}
                tasks += [(task, list(group.wanted)) for task in own]
        for task, _, scores in self._done(tasks):
            group, count = jobs[id(task)]
            group.parts[task.first] = scores
            if len(group.parts) == count:
                for cell, fields in group.fields().items():
                    self.quality[cell] = self.store.write(self._quality_inputs(cell), fields)
                group.parts.clear()

    def _time(self) -> None:
        """Measure latency once per artifact, because it does not depend on the text."""
        jobs: dict[str, tuple[Latency, list[Cell]]] = {}
        for cell in self._missing(self.made, self.latency, self._latency_inputs):
            text = self.texts[cell.model, cell.corpus]
            task = Latency(
                self._name(cell, " × "),
                self.made[self._base(cell)],
                self.made[cell] if cell.recipe != BASELINE else None,
                text.real_tokens(text.longest),
                text.longest,
                self.settings.rounds,
                self.settings.threads,
            )
            jobs.setdefault(task.label, (task, []))[1].append(cell)
        for _, cells, fields in self._done(list(jobs.values())):
            self.latency |= dict.fromkeys(cells, self.store.write(self._latency_inputs(cells[0]), fields))

    def _missing(self, cells: Iterable[Cell], known: dict[Cell, dict], inputs: Any) -> list[Cell]:
        """Return the cells that have not been measured yet, and put the stored results of the others into `known`."""
        for cell in cells:
            if (found := self.store.read(inputs(cell))) is not None:
                known[cell] = found
        return [cell for cell in cells if cell not in known]

    def _quality_inputs(self, cell: Cell) -> dict:
        text = self.texts[cell.model, cell.corpus]
        return self._inputs("quality", cell) | {
            "text": digests.digest([text.documents, text.start, text.size.bytes, text.size.words, text.words.tolist()]),
            "window": text.window,
        }

    def _latency_inputs(self, cell: Cell) -> dict:
        return self._inputs("latency", cell) | {"rounds": self.settings.rounds, "threads": self.settings.threads}

    def _inputs(self, kind: str, cell: Cell) -> dict:
        """Everything that a measurement depends on, except the machine, which is stored with the result."""
        return {
            "kind": kind,
            "artifact": self.made[cell].digest,
            "baseline": self.made[self._base(cell)].digest,
            "code": digests.code_digest("cuantiza.sweep.tasks.measure", "cuantiza.sweep.tasks.parts"),
            "versions": software(),
        }

    def _base(self, cell: Cell) -> Cell:
        return Cell(cell.model, BASELINE, cell.corpus)

    def _name(self, cell: Cell, between: str) -> str:
        """The name of the cell's artifact. It includes the corpus only if the recipe calibrates on it."""
        return between.join([cell.model, cell.recipe, *([cell.corpus] if self.grid.calibrates(cell.recipe) else [])])
