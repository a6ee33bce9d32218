"""Decide whether head is worse than base: each of their figures becomes a check, which is a regression or is not.

The functions here are pure, on plain data. docs/compare.md says what is compared, and why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import numpy as np

from cuantiza.core.errors import UserError
from cuantiza.core.pages import rise
from cuantiza.eval.compare.budgets import Budgets
from cuantiza.eval.compare.intervals import Interval, rank_sum, rounds_for_rank_sum, signed_rank
from cuantiza.eval.compare.reports import Side, rounds, timings
from cuantiza.eval.measure.answers.flips import exact_p, flips, marks
from cuantiza.eval.measure.estimates import Estimate, mean_by_document
from cuantiza.eval.report.read import MEND

# The interval of Δ ln ppl reaches this many standard errors to both sides. All of it must lie beyond the budget for a
# regression.
STANDARD_ERRORS = 2.0
# FALSE_ALARMS is the largest probability that latency raises an alarm in a comparison where every figure is exactly at
# its budget. All figures get an equal part of it. Folders are measured in two stages, and an alarm needs both to agree,
# so the first stage may use a looser level.
FALSE_ALARMS, FIRST_LEVEL = 0.01, 0.1
# Times are compared only if the machines agree in these fields. The size of the memory does not change times.
_MACHINE = ("cpu", "processors", "threads", "system")
ONE_DOCUMENT = (
    "a single document gives no standard error of quality; score two or more (--tokens of the evaluation, CORPUS=)"
)
NOT_FINITE = Interval(math.inf, math.inf, math.inf)


@dataclass(frozen=True)
class Check:
    """One figure of one recipe: its value in base, its value in head, and how much worse head is.

    `unit` is the unit of `base` and `head`: "nats", "bytes" or "ms". `change` and `budget` are in nats, or shares of
    base's value (0.1: 10 % more). `change` is None if the figure could not be judged; `note` then says why.
    """

    recipe: str
    figure: str
    unit: str
    base: float | None
    head: float | None
    change: Interval | None
    budget: float
    note: str = ""

    @property
    def regression(self) -> bool:
        return self.change is not None and self.change.low > self.budget

    @property
    def verdict(self) -> str:
        """The result in a word. "ok": within the budget. "open": only a part of the interval is beyond the budget.

        A time is never called better, because at the level of the first stage some times look better by chance.
        """
        if self.change is None:
            return "not judged"
        if self.regression:
            return "regression"
        if self.change.high < 0 and self.unit != "ms":
            return "better"
        return "ok" if self.change.high <= self.budget else "open"


@dataclass(frozen=True)
class Comparison:
    """All checks of a model, recipe by recipe.

    `measured` says how, `new` names the recipes that only head has, and `notes` are what else the reader should know.
    """

    model: str
    base: str
    head: str
    measured: str
    checks: list[Check]
    new: list[str]
    notes: list[str] = field(default_factory=list)

    @property
    def timed(self) -> bool:
        """Whether any time was compared. Files that are the same in base and head are not."""
        return any(check.unit == "ms" and check.base is not None for check in self.checks)

    @property
    def judged(self) -> bool:
        """Whether any figure was compared at all."""
        return any(check.change is not None for check in self.checks)

    @property
    def regressions(self) -> list[Check]:
        return [check for check in self.checks if check.regression]


def chosen(base: Sequence[str], head: Sequence[str], wanted: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Return (recipes to compare, recipes that only head has).

    Raises UserError if a side lacks one of `wanted`, if head lacks one of base's, or if there is nothing to compare.
    """
    if wanted:
        for name in wanted:
            if lacking := [side for side, names in (("BASE", base), ("HEAD", head)) if name not in names]:
                raise UserError(f"--recipes {name}: is not in {' and not in '.join(lacking)}; leave it out or make it")
        return list(dict.fromkeys(wanted)), []
    if gone := [name for name in base if name not in head]:
        raise UserError(
            f"HEAD=: lacks {', '.join(gone)}, which BASE has; make what is missing, or choose by --recipes what to compare"
        )
    if not base:
        raise UserError("BASE=: has no artifact to compare")
    return list(base), [name for name in head if name not in base]


def check_quality(recipe: str, base: float, head: float, delta: Estimate, budget: float, note: str = "") -> Check:
    """Check ln perplexity: `base` and `head` are its values in nats, and `delta` is their paired difference.

    A head whose likelihoods are not finite is a regression. Raises UserError if base's perplexity is not finite, or if
    `delta` has no standard error.
    """
    if not math.isfinite(base):
        raise UserError(f"BASE=: the perplexity of {recipe} is not finite; compare with artifacts that work")
    if not math.isfinite(delta.value):
        return Check(recipe, "ln perplexity", "nats", base, head, NOT_FINITE, budget, "not finite")
    if delta.stderr is None:
        raise UserError(ONE_DOCUMENT)
    reach = STANDARD_ERRORS * delta.stderr
    change = Interval(delta.value, delta.value - reach, delta.value + reach)
    return Check(recipe, "ln perplexity", "nats", base, head, change, budget, note)


def answers_note(before: np.ndarray, after: np.ndarray) -> str:
    """Say how many last words bool [W] head has right, and which flipped against base; nothing where there are none.

    It decides nothing: of a few hundred words too few flip to show a change that the likelihoods do not show earlier.
    """
    if not len(after) or len(before) != len(after):
        return ""
    gained, lost = flips(before, after)
    return f"last words {100 * after.mean():.1f} % (+{gained} −{lost}, p {exact_p(gained, lost):.3f})"


def check_size(recipe: str, base: int, head: int, budget: float) -> Check:
    change = head / base - 1
    return Check(recipe, "size", "bytes", base, head, Interval(change, change, change), budget)


def second_level(figures: int) -> float:
    """Return the level of the second stage, at which both stages raise a false alarm with probability ≤ FALSE_ALARMS.

    The probability is divided among the `figures` figures (Bonferroni).
    """
    return FALSE_ALARMS / figures / FIRST_LEVEL


def check_latency(
    recipe: str, figure: str, ms: tuple[float, float], ln_ratios: Sequence[float], level: float, budget: float
) -> Check:
    """Check the latency of one shape from ln(head's time / base's time) of each round.

    `ms` are the median times of base and head. Each bound of the interval is missed with probability ≤ `level`.
    """
    return Check(recipe, figure, "ms", *ms, _share(signed_rank(ln_ratios, level)), budget)


def confirmed(first: Check, second: Check) -> Check:
    """Return the `second` check of a figure that looked slower in the `first`; its note says whether both agree."""
    again = first.regression and second.regression
    return replace(second, note="measured twice" if again else "looked slower at first, not shown again")


def compare_reports(
    base: Side, head: Side, budgets: Budgets, wanted: Sequence[str] | None, latency: bool
) -> tuple[list[Check], list[str]]:
    """Compare two reports; return (checks, recipes that only head has).

    Raises UserError if the reports do not measure the same thing.
    """
    _same_text(base, head)
    if latency:
        _same_machine(base, head)
    names, new = chosen(list(base.rows), list(head.rows), wanted)
    timed = [name for name in names if latency and _untimed(base, head, name) is None]
    figures = sum(len(timings(base.rows[name]).keys() & timings(head.rows[name]).keys()) for name in timed)
    if timed and not figures:
        raise UserError(
            f"{base.path} and {head.path}: time no shape in common; make both by one version of `make eval`, with the same --positions"
        )
    checks: list[Check] = []
    for name in names:
        ours, theirs, budget = head.rows[name], base.rows[name], budgets.of(name)
        counts = np.asarray(base.report.corpus.document_tokens)
        total = counts.sum()
        means = (sum(theirs.nll_by_document) / total, sum(ours.nll_by_document) / total)
        with np.errstate(invalid="ignore"):  # of what is not finite
            delta = mean_by_document(np.subtract(ours.nll_by_document, theirs.nll_by_document), counts)
        answers = [marks(row.last_words.right) for row in (theirs, ours) if row.last_words is not None]
        note = answers_note(*answers) if len(answers) == 2 else ""
        checks.append(check_quality(name, *means, delta, budget.quality, note))
        checks.append(check_size(name, theirs.bytes, ours.bytes, budget.size))
        if name in timed:
            checks += _report_latency(base, head, name, FALSE_ALARMS / figures, budget.latency)
        elif latency:
            checks.append(
                Check(name, "latency", "ms", None, None, None, budget.latency, _untimed(base, head, name) or "")
            )
    return checks, new


def _report_latency(base: Side, head: Side, name: str, level: float, budget: float) -> list[Check]:
    """Check every latency figure of the recipe `name` in two reports.

    Each round's time is taken relative to the baseline row of the same report. The ratios of both reports are then
    compared by rank sum.
    """
    checks = []
    needed = rounds_for_rank_sum(level)
    own = timings(head.rows[name])
    for figure, theirs in timings(base.rows[name]).items():
        if figure not in own:
            raise UserError(
                f"{head.path}: {name} has no {figure}, which BASE has; make both by one version of `make eval`, with the same --positions"
            )
        ms = (median(rounds(theirs)) / 1e6, median(rounds(own[figure])) / 1e6)
        ratios = [_ln_ratios(side, name, figure) for side in (base, head)]
        change = rank_sum(ratios[0], ratios[1], level)
        if math.isinf(change.low):
            note = f"{min(map(len, ratios))} rounds; {needed} in each report are needed"
            checks.append(Check(name, figure, "ms", *ms, None, budget, note))
        else:
            checks.append(Check(name, figure, "ms", *ms, _share(change), budget))
    return checks


def _ln_ratios(side: Side, name: str, figure: str) -> list[float]:
    """Return ln(the row's time / the baseline row's time) of each round. Raises UserError if their rounds differ."""
    own, baseline = timings(side.rows[name])[figure], timings(side.rows[side.baseline]).get(figure)
    if baseline is None or len(baseline.samples_per_round) != len(own.samples_per_round):
        raise UserError(f"{side.path}: {figure} of {name} and of {side.baseline} are not of the same rounds; {MEND}")
    return [math.log(mine / first) for mine, first in zip(rounds(own), rounds(baseline), strict=True)]


def _untimed(base: Side, head: Side, name: str) -> str | None:
    """Say why two reports cannot show whether a recipe became slower; None if they can."""
    if name == base.baseline:
        return "every report's yardstick is this row of its own; compare folders to see it"
    if base.digest(name) is not None and base.digest(name) == head.digest(name):
        return "same file"
    return None


def _same_text(base: Side, head: Side) -> None:
    one, other = base.report.corpus, head.report.corpus
    for what, theirs, ours, mend in (
        ("model", base.report.model, head.report.model, "compare reports of one model"),
        (
            "tokens (corpus or tokenizer)",
            one.tokens_sha256,
            other.tokens_sha256,
            "evaluate both on one corpus with one --tokens",
        ),
        (
            "tokens by document",
            one.document_tokens,
            other.document_tokens,
            "evaluate both on one corpus with one --tokens",
        ),
        ("window", one.window_tokens, other.window_tokens, "evaluate both with one --window"),
    ):
        if theirs != ours:
            shown = f" ({str(theirs)[:16]} and {str(ours)[:16]})" if isinstance(theirs, (str, int)) else ""
            raise UserError(f"{base.path} and {head.path}: not the same {what}{shown}; {mend}")


def _same_machine(base: Side, head: Side) -> None:
    if base.baseline != head.baseline:
        raise UserError(
            f"{base.path} and {head.path}: latency is relative to {base.baseline} here and {head.baseline} there; evaluate both with the same first recipe, or give --without-latency"
        )
    for key in _MACHINE:
        theirs, ours = getattr(base.report.machine, key), getattr(head.report.machine, key)
        if theirs != ours:
            raise UserError(
                f"{base.path} and {head.path}: latency of different machines ({key}: {theirs} and {ours}); evaluate both on one machine, or give --without-latency"
            )


def _share(ln_ratio: Interval) -> Interval:
    return Interval(*(rise(value) for value in (ln_ratio.value, ln_ratio.low, ln_ratio.high)))
