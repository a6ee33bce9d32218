"""One side of a comparison of two reports. Its file may come from anywhere, so the values are checked before use."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median

from cuantiza.core.errors import UserError
from cuantiza.eval.report.read import MEND, REPORT, read_report, shown
from cuantiza.eval.report.schema import Report, Row, Timing

_LARGEST = 1e15  # far above every figure of a report, and far below where sums and squares of floats overflow
_LONGEST_LINE = 300


@dataclass(frozen=True)
class Side:
    """A report to compare, and the rows of its artifacts by name. PyTorch's rows are not artifacts and are left out."""

    path: Path
    report: Report
    rows: dict[str, Row]

    @property
    def baseline(self) -> str:
        return self.report.baseline.name

    def digest(self, name: str) -> str | None:
        """The digest of artifact `name`; None if the row is of an ONNX file that is not an artifact."""
        return dict(self.report.inputs.artifacts).get(name)


def read_side(path: Path) -> Side:
    """Read the report at `path`: a report.json, or the folder that holds one.

    Raises UserError, which names the field, if it is not a report or has values that cannot be compared or shown.
    """
    path = path / REPORT if path.is_dir() else path
    report = read_report(path)
    fault = next(_faults(report), None)
    if fault is not None:
        raise UserError(f"{path}: {fault}; {MEND}")
    return Side(path, report, {row.name: row for row in report.artifacts if not row.is_torch})


def _faults(report: Report) -> Iterator[str]:
    """Yield a sentence for each fault in `report` beyond the types of its fields."""
    corpus, machine = report.corpus, report.machine
    lines = {"model": report.model, "corpus.source": corpus.source, "machine.cpu": machine.cpu}
    lines |= {"machine.system": machine.system, "corpus.tokens_sha256": corpus.tokens_sha256}
    lines |= {f"versions.{name}": value for name, value in report.versions.items()}
    lines |= {f"artifacts[{number}].name": row.name for number, row in enumerate(report.artifacts)}
    for where, text in lines.items():
        if not 0 < len(text) <= _LONGEST_LINE or not text.isprintable() or not where.isprintable():
            yield f"{shown(where)[1:-1]} is {shown(text)}, where a text of one line belongs"
    if report.baseline.is_torch:
        yield "artifacts does not begin with an artifact"
    names: set[str] = set()
    for number, row in enumerate(report.artifacts):
        where = f"artifacts[{number}]"
        if row.name in names:
            yield f"{where}.name is {row.name!r} for the second time"
        names.add(row.name)
        if row.is_torch:
            continue
        if len(row.nll_by_document) != len(corpus.document_tokens):
            yield f"{where}.nll_by_document has {len(row.nll_by_document)} numbers for {len(corpus.document_tokens)} documents"
        for index, value in enumerate(row.nll_by_document):
            if _LARGEST < abs(value) < math.inf:  # what is not finite is a regression (decide.py)
                yield f"{where}.nll_by_document[{index}] is {shown(value)}, where a number below 1e15 belongs"
        if row.last_words is not None and len(row.last_words.right) != row.last_words.words:
            yield f"{where}.last_words.right has {len(row.last_words.right)} marks for {row.last_words.words} words"
        for name, timing in timings(row).items():
            if not sum(timing.samples_per_round) == len(timing.samples_ns) > 0:
                yield (
                    f"{where}: {name} has {len(timing.samples_ns)} samples_ns where samples_per_round says "
                    f"{sum(timing.samples_per_round)}"
                )


def timings(row: Row) -> dict[str, Timing]:
    """The latency figures of `row` by name: "prefill 128", "decode at 512"."""
    found: dict[str, Timing] = {figure("prefill", timing.at): timing for timing in row.prefill}
    return found | {figure("decode", timing.at): timing for timing in row.decode}


def rounds(timing: Timing) -> list[float]:
    """The median time of each round, in ns."""
    ends = accumulate(timing.samples_per_round, initial=0)
    return [float(median(timing.samples_ns[start:end])) for start, end in pairwise(ends)]


def figure(phase: str, at: int) -> str:
    """The name of a latency figure: a prefill of `at` tokens, or a decode step at position `at`."""
    return f"{phase} {'at ' if phase == 'decode' else ''}{at}"
