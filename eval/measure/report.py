"""Measure all subjects and collect the content of report.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Split
from cuantiza.core.machine.process import ChildError
from cuantiza.core.machine.progress import report as say
from cuantiza.core.store.digests import digest
from cuantiza.eval.measure.engines import Subject
from cuantiza.eval.measure.latency import measure_latency
from cuantiza.eval.measure.quality import PROMPT, make_task, measure_quality
from cuantiza.eval.measure.size import companion_bytes, onnx_bytes
from cuantiza.eval.report.schema import SCHEMA, Corpus, Inputs, LeftOut, PaperName, Report, Row


def measure(
    model: str,
    subjects: list[Subject],
    baseline: Path,
    test: Split,
    source: str,
    inputs: Inputs,
    *,
    tokens: int,
    window: int,
    rounds: int,
    threads: int,
    positions: int,
    by: str = "document",
    joined: bool = False,
    papers: Sequence[PaperName] = (),
    left_out: Sequence[LeftOut] = (),
    known: dict[str, dict] | None = None,
    keep: Callable[[dict[str, dict]], None] = lambda rows: None,
) -> Report:
    """Return the report on `subjects`, forms of `model`. All are compared with the first, the artifact in `baseline`.

    `test` is the split of the corpus `source`, divided `by` document, line or article, or `joined` to one text; `papers`
    are further protocols; `inputs` is everything that the report depends on. A subject that cannot be measured is left
    out, and `left_out`, which begins with what the caller left out, says why. `known` and `keep` are those of
    `measure_quality`. Raises UserError where two subjects have the same name, or where the first cannot be measured.
    """
    names = [subject.name for subject in subjects]
    if clash := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--onnx: two rows would be called {clash!r}; rename one of the files")
    task = make_task(baseline, test, tokens, window, papers)
    missing = list(left_out)
    subjects, done = list(subjects), dict(known or {})

    def told(rows: dict[str, dict]) -> None:
        done.update(rows)
        keep(rows)

    while True:  # until no subject fails; the quality of the others is not measured again, their latency is
        try:
            quality = measure_quality(subjects, task, threads, done, told)
            ids = task.real_tokens(min(task.longest, positions))
            latency = measure_latency(subjects, ids, task.longest, rounds, threads, positions)
            break
        except ChildError as error:
            missing.append(_leave_out(subjects, error))
    rows = []
    for subject in subjects:
        if subject.kind == "onnx":
            size = onnx_bytes(subject.path)
        else:
            weights = quality[subject.name]["weight_bytes"]
            size = {"bytes": weights + companion_bytes(baseline), "model_bytes": weights}
        kind = "onnx" if subject.kind == "onnx" else "torch"
        rows.append(Row(name=subject.name, kind=kind, **size, **quality[subject.name], **latency[subject.name]))
    corpus = Corpus(
        source=source,
        by=by,
        joined=joined,
        split=test.name,
        sha256=test.sha256,
        documents=len(task.documents),
        documents_in_split=task.in_split,
        bytes=task.size.bytes,
        words=task.size.words,
        document_tokens=tuple(map(len, task.documents)),
        tokens_sha256=digest(task.documents),
        window_tokens=task.window,
    )
    return Report(
        schema=SCHEMA,
        model=model,
        corpus=corpus,
        machine=inputs.machine,
        versions=inputs.versions,
        rounds=rounds,
        prompt=PROMPT,
        inputs=inputs,
        artifacts=tuple(rows),
        left_out=tuple(missing),
    )


def _leave_out(subjects: list[Subject], error: ChildError) -> LeftOut:
    """Remove from `subjects` the one that failed by `error`, and say why. Raises `error` if it is the first."""
    failed = next((subject for subject in subjects[1:] if subject.name == error.label), None)
    if failed is None:
        raise error
    subjects.remove(failed)
    say(f"left out  {failed.name}: {error.reason}")
    return LeftOut(name=failed.name, kind=failed.kind, reason=error.reason)
