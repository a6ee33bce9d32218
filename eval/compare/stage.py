"""Compare two reports, or two folders of artifacts that are measured here: is anything worse than its budget?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Source, load_test, scored
from cuantiza.core.inputs.defaults import COMPARE_ROUNDS, CORPUS, LEAST_COMPARE_ROUNDS, TOKENS, WINDOW
from cuantiza.core.machine.hardware import check_threads, cpu_name, default_threads
from cuantiza.core.machine.progress import working
from cuantiza.core.store import artifact, folders
from cuantiza.eval.compare.budgets import Budgets, read_budgets
from cuantiza.eval.compare.decide import FIRST_LEVEL, Comparison, compare_reports
from cuantiza.eval.compare.folders import CONFIRMING_ROUNDS, Measure, compare_folders, is_artifacts
from cuantiza.eval.compare.reports import read_side


def compare(
    base: str | Path,
    head: str | Path,
    *,
    recipes: str | Sequence[str] | None = None,
    budgets: str | Path | None = None,
    latency: bool = True,
    corpus: str | Path | Source = CORPUS,
    tokens: int = TOKENS,
    window: int = WINDOW,
    rounds: int = COMPARE_ROUNDS,
    threads: int | None = None,
) -> Comparison:
    """Compare `head` with `base`: each a report.json, the folder of one, or a folder of artifacts such as artifacts/es-mini.

    recipes: the name, or names, to compare (default: all that `base` has). budgets: a TOML file that says how much worse a figure
    may be (default: budgets.toml in the working directory, else 0.005 nats of ln perplexity, 1 % of size, 10 % of
    latency). latency: whether times are compared. The other options mean what they mean in `evaluate`; they are for
    folders, whose artifacts are measured here, base and head in turns.

    Raises UserError if the two cannot be compared, or if a file is broken.
    """
    how = Measure(tokens, window, rounds if latency else 0, default_threads() if threads is None else threads)
    check_threads(how.threads)
    for option, value, least in (
        ("tokens", tokens, 2),
        ("window", window, 2),
        ("rounds", rounds, LEAST_COMPARE_ROUNDS),
    ):
        if not least <= value <= 10**9:
            raise UserError(f"--{option} {value}: give a number from {least} on")
    recipes = [recipes] if isinstance(recipes, str) else recipes
    limits = read_budgets(None if budgets is None else Path(budgets))
    base, head = _path("BASE", str(base)), _path("HEAD", str(head))
    kinds = [is_artifacts(path) and not (path / "report.json").is_file() for path in (base, head)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"{base} and {head}: one is a folder of artifacts, the other a report; give two reports, or two folders such as artifacts/es-mini"
        )
    if kinds[0]:
        source = corpus if isinstance(corpus, Source) else Source(str(corpus))
        comparison = _folders(base, head, limits, recipes, source, how)
    else:
        comparison = _reports(base, head, limits, recipes, latency)
    if not recipes:
        found = {check.recipe for check in comparison.checks}
        comparison.notes.extend(
            f"{limits.source}: [recipes.{name}] is of no artifact that was compared"
            for name in limits.recipes
            if name not in found
        )
    return comparison


def _path(side: str, given: str) -> Path:
    """Return the path `given` for one side. Raises UserError if there is nothing to compare at it."""
    if not given:
        raise UserError(
            f"{side}=: is empty; give a report.json, its folder, or a folder of artifacts such as artifacts/es-mini"
        )
    path = Path(given)
    if not path.exists():
        raise UserError(f"{side}={given}: does not exist; give a report.json, its folder, or a folder of artifacts")
    if (path / artifact.MANIFEST).is_file():
        raise UserError(
            f"{side}={given}: is a single artifact; give the folder that holds it, and --recipes {path.name}"
        )
    if path.is_dir() and not (path / "report.json").is_file() and not is_artifacts(path):
        raise UserError(
            f"{side}={given}: holds neither report.json nor artifacts; give a report, or a folder such as artifacts/es-mini"
        )
    return path


def _reports(base: Path, head: Path, budgets: Budgets, recipes: Sequence[str] | None, latency: bool) -> Comparison:
    one, other = read_side(base), read_side(head)
    checks, new = compare_reports(one, other, budgets, recipes, latency)
    theirs, ours = one.report, other.report
    notes = [
        f"{name}: {theirs.versions.get(name, 'none')} in base, {ours.versions.get(name, 'none')} in head"
        for name in sorted(theirs.versions.keys() | ours.versions.keys())
        if theirs.versions.get(name) != ours.versions.get(name)
    ]
    measured = f"Two reports on {sum(theirs.corpus.document_tokens)} tokens of {theirs.corpus.source}."
    comparison = Comparison(theirs.model, str(base), str(head), measured, checks, new, notes)
    if comparison.timed:
        measured += (
            f" Latency is relative to {one.baseline} of the same report, on {theirs.machine.cpu}, {theirs.machine.threads} threads:"
            f" a change of {one.baseline} itself cannot be seen."
        )
    return replace(comparison, measured=measured)


def _folders(
    base: Path, head: Path, budgets: Budgets, recipes: Sequence[str] | None, corpus: Source, how: Measure
) -> Comparison:
    split = load_test(corpus)
    with folders.held(base, head), working("compare"):
        model, checks, new, notes = compare_folders(base, head, budgets, recipes, split, how)
    comparison = Comparison(model, str(base), str(head), "", checks, new, notes)
    if not comparison.judged:
        return replace(
            comparison, measured="Every artifact is the same file in base and head, so nothing was measured."
        )
    measured = f"Evaluated on {cpu_name()}, {how.threads} threads, with the test split of {scored(corpus).spec}."
    if comparison.timed:
        measured += (
            f" Latency: {how.rounds} rounds of fresh processes, base and head sample by sample in turns,"
            f" {CONFIRMING_ROUNDS} more where one looked slower. Intervals of time are of {100 * (1 - 2 * FIRST_LEVEL):g} %, wider after the second look."
        )
    return replace(comparison, measured=measured)
