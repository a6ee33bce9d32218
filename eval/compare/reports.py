"""What a comparison reads of report.json (docs/report.md), every field checked: the file may come from anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from cuantiza.core.errors import UserError

REPORT = "report.json"
_LARGEST_BYTES = 2**28
# Of the machine: what makes another class of it. Its memory does not change a time.
_MACHINE = {"cpu": str, "processors": int, "threads": int, "system": str}
_MEND = "make the report anew by `make eval`"


@dataclass(frozen=True)
class Row:
    """An artifact in a report: bytes, negative log-likelihood of each document in nats, and of each latency figure
    ("prefill 128", "decode at 512") the median time in ns of each round. `digest` is None for a foreign file."""

    bytes: int
    nll: tuple[float, ...]
    rounds: dict[str, tuple[float, ...]]
    digest: str | None


@dataclass(frozen=True)
class Report:
    """A report as far as a comparison needs it. PyTorch's rows are no artifacts, and left out."""

    path: Path
    model: str
    corpus: str
    tokens_sha256: str
    document_tokens: tuple[int, ...]
    window_tokens: int
    machine: dict[str, str | int]
    versions: dict[str, str]
    baseline: str
    rows: dict[str, Row]


def read_report(path: Path) -> Report:
    """The report at `path`, a report.json or the folder that holds one.

    Raises UserError, naming the field, where the file is no report of the schema that eval/report/markdown.py writes.
    """
    from cuantiza.eval.measure.report import SCHEMA

    path = path / REPORT if path.is_dir() else path
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise UserError(f"{path}: has {path.stat().st_size} bytes, which no report has; {_MEND}")
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: does not exist; give a report.json, its folder, or a folder of artifacts") from None
    except (ValueError, RecursionError) as error:  # of JSON, of UTF-8, of numbers with thousands of digits
        raise UserError(f"{path}: is no JSON ({str(error)[:80]}); {_MEND}") from None
    schema = fields.get("schema") if isinstance(fields, dict) else None
    if schema != SCHEMA:
        raise UserError(f"{path}: its schema is {str(schema)[:40]!r}, not {SCHEMA!r}; {_MEND}")
    return _Reader(path).report(fields)


class _Reader:
    """Takes fields out of JSON, or raises UserError with their path."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def report(self, fields: dict) -> Report:
        corpus, machine = self._object(fields, "corpus"), self._object(fields, "machine")
        tokens = tuple(self._list(corpus, "corpus.document_tokens", self._count))
        if not tokens:
            self._refuse("corpus.document_tokens", "is empty")
        digests = self._digests(self._object(fields, "inputs"))
        rows: dict[str, Row] = {}
        baseline = None
        for number, row in enumerate(self._list(fields, "artifacts", self._is_object)):
            name = self._text(row, f"artifacts[{number}].name")
            baseline = baseline or name
            if name in rows:
                self._refuse(f"artifacts[{number}].name", f"is {name!r} for the second time")
            if "modules_with_weights" not in row:
                rows[name] = self._row(row, f"artifacts[{number}]", len(tokens), digests.get(name))
        if baseline not in rows:
            self._refuse("artifacts", "does not begin with an artifact")
        versions = self._object(fields, "versions")
        return Report(
            path=self._path,
            model=self._text(fields, "model"),
            corpus=self._text(corpus, "corpus.source"),
            tokens_sha256=self._text(corpus, "corpus.tokens_sha256"),
            document_tokens=tokens,
            window_tokens=self._count(corpus.get("window_tokens"), "corpus.window_tokens"),
            machine={
                key: self._text(machine, f"machine.{key}")
                if kind is str
                else self._count(machine.get(key), f"machine.{key}")
                for key, kind in _MACHINE.items()
            },
            versions={key: self._text(versions, f"versions.{key}") for key in versions},
            baseline=str(baseline),
            rows=rows,
        )

    def _row(self, row: dict, where: str, documents: int, digest: str | None) -> Row:
        nll = tuple(self._list(row, f"{where}.nll_by_document", self._number))
        if len(nll) != documents:
            self._refuse(f"{where}.nll_by_document", f"has {len(nll)} numbers for {documents} documents")
        rounds = {
            figure(phase, self._count(shape.get(key), f"{where}.{phase}.{key}")): self._rounds(
                shape, f"{where}.{phase}"
            )
            for phase, key in (("prefill", "tokens"), ("decode", "position"))
            for shape in self._list(row, f"{where}.{phase}", self._is_object)
        }
        return Row(self._count(row.get("bytes"), f"{where}.bytes"), nll, rounds, digest)

    def _rounds(self, shape: dict, where: str) -> tuple[float, ...]:
        """The median of each round, in ns."""
        counts = self._list(shape, f"{where}.samples_per_round", self._count)
        samples = self._list(shape, f"{where}.samples_ns", self._count)
        ends = [sum(counts[:number]) for number in range(len(counts) + 1)]
        if not counts or ends[-1] != len(samples):
            self._refuse(f"{where}.samples_ns", f"has {len(samples)} samples where samples_per_round says {ends[-1]}")
        return tuple(float(median(samples[start:end])) for start, end in pairwise(ends))

    def _digests(self, inputs: dict) -> dict[str, str]:
        def pair(value: Any, where: str) -> tuple[str, str]:
            if not isinstance(value, list) or [*map(type, value)] != [str, str]:
                self._refuse(where, "is no pair of name and digest")
            return value[0], value[1]

        return dict(self._list(inputs, "inputs.artifacts", pair))

    def _object(self, fields: dict, key: str) -> dict:
        return self._is_object(fields.get(key), key)

    def _is_object(self, value: Any, where: str) -> dict:
        return value if isinstance(value, dict) else self._refuse(where, _what(value, "an object"))

    def _list(self, fields: dict, where: str, each: Callable[[Any, str], Any]) -> list:
        value = fields.get(where.rsplit(".", 1)[-1])
        if not isinstance(value, list):
            self._refuse(where, _what(value, "a list"))
        return [each(item, f"{where}[{number}]") for number, item in enumerate(value)]

    def _text(self, fields: dict, where: str) -> str:
        value = fields.get(where.split(".", 1)[-1])
        if not isinstance(value, str) or not 0 < len(value) <= 300 or not value.isprintable():
            self._refuse(where, _what(value, "a text of one line"))
        return value

    def _number(self, value: Any, where: str) -> float:
        # 1e15 is beyond every figure of a report, and far from where sums and squares of floats overflow. No NaN passes.
        if type(value) not in (int, float) or not abs(value) <= 1e15:
            self._refuse(where, _what(value, "a finite number below 1e15"))
        return float(value)

    def _count(self, value: Any, where: str) -> int:
        if type(value) is not int or not 0 < value <= 10**15:
            self._refuse(where, _what(value, "a whole number from 1 to 1e15"))
        return value

    def _refuse(self, where: str, why: str) -> Any:
        raise UserError(f"{self._path}: {where} {why}; {_MEND}")


def figure(phase: str, at: int) -> str:
    """The name of a latency figure: prefill of `at` tokens, or decode behind `at`."""
    return f"{phase} {'at ' if phase == 'decode' else ''}{at}"


def _what(value: Any, wanted: str) -> str:
    if value is None:
        return f"is missing, where {wanted} belongs"
    return f"is {str(value)[:40]!a}, where {wanted} belongs"
