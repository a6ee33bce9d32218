"""Compare two folders of artifacts: open, verify and evaluate them here, base and head of each recipe side by side."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Split
from cuantiza.core.store import artifact
from cuantiza.core.store.artifact import Artifact
from cuantiza.eval.compare.budgets import Budgets
from cuantiza.eval.compare.decide import (
    FIRST_LEVEL,
    ONE_DOCUMENT,
    Check,
    answers_note,
    check_latency,
    check_quality,
    check_size,
    chosen,
    confirmed,
    second_level,
)

# In this many rounds, figures that looked slower are measured again.
CONFIRMING_ROUNDS = 20


@dataclass(frozen=True)
class Measure:
    """How folders are evaluated: tokens of text, longest context, first rounds of latency (0: none), threads."""

    tokens: int
    window: int
    rounds: int
    threads: int


def is_artifacts(folder: Path) -> bool:
    return folder.is_dir() and bool(_names(folder))


def _names(folder: Path) -> list[str]:
    """List the artifacts in `folder`, except those that are still being made, whose names begin with a dot."""
    names = (path.parent.name for path in folder.glob(f"*/{artifact.MANIFEST}"))
    return [name for name in names if not name.startswith(".")]


def compare_folders(
    base: Path, head: Path, budgets: Budgets, wanted: Sequence[str] | None, split: Split, how: Measure
) -> tuple[str, list[Check], list[str], list[str]]:
    """Compare two folders of artifacts; return (model, checks, recipes that only head has, notes).

    Raises UserError if an artifact is broken, or if they do not share one model, tokenizer and context length.
    """
    from cuantiza.eval.measure.quality import make_task

    names, new = chosen(_recipes(base), _recipes(head), wanted)
    pairs = {name: (artifact.open_artifact(base / name), artifact.open_artifact(head / name)) for name in names}
    models = {str(item.manifest.model) for both in pairs.values() for item in both}
    if odd := next((model for model in models if not model.isprintable()), None):
        raise UserError(f"{base} and {head}: a manifest names a model {odd!a}; run make again to rebuild it")
    if len(models) > 1:
        raise UserError(f"{base} and {head}: artifacts of {' and '.join(sorted(models))}; compare those of one model")
    different = {name: both for name, both in pairs.items() if both[0].digest != both[1].digest}
    checks = {name: _same_file(name, budgets) for name in names if name not in different}
    if different:
        tasks = [make_task(item.path, split, how.tokens, how.window) for both in different.values() for item in both]
        if any(
            (task.documents, task.start, task.longest) != (tasks[0].documents, tasks[0].start, tasks[0].longest)
            for task in tasks
        ):
            raise UserError(
                f"{base} and {head}: their tokenizers or contexts differ, so likelihoods are not of the same tokens; compare artifacts of one model"
            )
        if len(tasks[0].documents) < 2:
            raise UserError(ONE_DOCUMENT)
        for name, both in different.items():
            checks[name] = _quality_and_size(name, both, tasks[0], budgets, how.threads)
        if how.rounds:
            for name, timed in _latency(different, tasks[0], budgets, how).items():
                checks[name] += timed
    return models.pop(), [check for name in names for check in checks[name]], new, _notes(pairs)


def _recipes(folder: Path) -> list[str]:
    """List the recipes in `folder`, fp32 first. Raises UserError if a name cannot be printed."""
    names = _names(folder)
    if odd := next((name for name in names if not name.isprintable()), None):
        raise UserError(f"{folder}: holds a folder named {odd!a}; rename it")
    return sorted(names, key=lambda name: (name != "fp32", name))


def _same_file(name: str, budgets: Budgets) -> list[Check]:
    return [Check(name, "all", "", None, None, None, budgets.of(name).quality, "same file")]


def _quality_and_size(name: str, both: tuple[Artifact, Artifact], task, budgets: Budgets, threads: int) -> list[Check]:
    from cuantiza.core.machine.process import Remote
    from cuantiza.core.machine.progress import track
    from cuantiza.eval.measure.answers.flips import answered
    from cuantiza.eval.measure.engines import Engine, Subject
    from cuantiza.eval.measure.estimates import mean_per_token
    from cuantiza.eval.measure.score import score
    from cuantiza.eval.measure.size import onnx_bytes

    budget = budgets.of(name)
    with ExitStack() as stack:
        remotes = [
            stack.enter_context(Remote(Engine, Subject(name, "onnx", item.model), threads, label=f"{name} of {side}"))
            for side, item in zip(("BASE", "HEAD"), both, strict=True)
        ]
        theirs, ours = score(track(task.rolling, f"quality   {name}", len(task.rolling)), remotes)
    delta = mean_per_token(ours.nll - theirs.nll, ours.document)
    assert ours.kl is not None and ours.same_top is not None  # HEAD is scored against BASE
    notes = [f"KL {np.mean(ours.kl):.5f} nats", f"same top token {100 * np.mean(ours.same_top):.1f} %"]
    if answers := answers_note(answered(theirs, task.words), answered(ours, task.words)):
        notes.append(answers)
    before, after = (onnx_bytes(item.model)["bytes"] for item in both)
    return [
        check_quality(name, float(theirs.nll.mean()), float(ours.nll.mean()), delta, budget.quality, ", ".join(notes)),
        check_size(name, before, after, budget.size),
    ]


def _latency(
    different: dict[str, tuple[Artifact, Artifact]], task, budgets: Budgets, how: Measure
) -> dict[str, list[Check]]:
    """Check all latency figures. A recipe in which one looks slower is measured again, in CONFIRMING_ROUNDS rounds."""
    from cuantiza.eval.compare.latency import Pair, figures, measure_pairs

    pairs = [Pair(name, base.model, head.model) for name, (base, head) in different.items()]
    ids = task.real_tokens(task.longest)

    def stage(pairs: list[Pair], rounds: int, level: float, label: str) -> dict[str, list[Check]]:
        timed = measure_pairs(pairs, ids, task.longest, rounds, how.threads, label)
        return {
            recipe: [
                check_latency(
                    recipe, name, (item.base_ms, item.head_ms), item.ln_ratios, level, budgets.of(recipe).latency
                )
                for name, item in found.items()
            ]
            for recipe, found in timed.items()
        }

    first = stage(pairs, how.rounds, FIRST_LEVEL, "latency")
    suspects = [pair for pair in pairs if any(check.regression for check in first[pair.recipe])]
    if suspects:
        level = second_level(len(pairs) * figures(task.longest))
        again = stage(
            suspects, CONFIRMING_ROUNDS, level, "latency   again " + " ".join(pair.recipe for pair in suspects)
        )
        for recipe, seconds in again.items():
            first[recipe] = [
                confirmed(one, other) if one.regression else one
                for one, other in zip(first[recipe], seconds, strict=True)
            ]
    return first


def _notes(pairs: dict[str, tuple[Artifact, Artifact]]) -> list[str]:
    """Say which artifacts were made from other inputs in head than in base, or not from the fp32 artifact beside them."""
    notes = []
    for name, (base, head) in pairs.items():
        theirs, ours = base.manifest, head.manifest
        changed = sorted(
            key for key in theirs.inputs.keys() | ours.inputs.keys() if theirs.inputs.get(key) != ours.inputs.get(key)
        )
        if changed:
            notes.append(f"{name}: made from other inputs ({', '.join(changed)})")
        for side, item in (("BASE", base), ("HEAD", head)):
            if item.manifest.parent not in (None, _fp32_beside(item)):
                notes.append(f"{name}: in {side}, it was not made from the fp32 artifact beside it")
    return notes


def _fp32_beside(item: Artifact) -> str | None:
    """The digest of the fp32 artifact beside `item`; where there is none, that of the one that `item` was made from."""
    try:
        return artifact.open_artifact(item.path.with_name("fp32")).digest
    except UserError:
        return item.manifest.parent
