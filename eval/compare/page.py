"""Show a comparison as a Markdown page and as a table on the terminal. Both have the same rows."""

from __future__ import annotations

from rich.text import Text

from cuantiza.core.machine.terminal import Terminal, new_table, show
from cuantiza.core.pages import escape, table
from cuantiza.eval.compare.decide import FALSE_ALARMS, STANDARD_ERRORS, Check, Comparison

COLUMNS = ("recipe", "figure", "base", "head", "change", "interval", "budget", "verdict")
_WORDS = 2  # the first columns hold words
_COLORS = {"regression": "bold red", "better": "green", "open": "yellow"}


def verdict(comparison: Comparison) -> str:
    """Say in one line whether anything of the model is worse than its budget."""
    count = len(comparison.regressions)
    text = "no regression" if not count else "1 regression" if count == 1 else f"{count} regressions"
    untimed = [check for check in comparison.checks if check.change is None and check.unit == "ms"]
    timed = [check for check in comparison.checks if check.change is not None and check.unit == "ms"]
    if untimed and not timed and any(check.note != "same file" for check in untimed):
        text += "; latency was not judged"
    return f"{comparison.model}: {text}"


def sentence(check: Check) -> str:
    """Describe a regression in words."""
    _, figure, *_, change, interval, budget, _ = cells(check)
    return f"{check.recipe}, {figure}: {change} ({interval}), budget {budget}" + (
        f"; {check.note}" if check.note else ""
    )


def cells(check: Check) -> list[str]:
    """Return the cells of a check's row, in the order of COLUMNS."""
    shown = [_amount(check, value) for value in (check.base, check.head)]
    row = [check.recipe, check.figure, *shown]
    if check.change is None:
        return [*row, "—", "—", "—", check.note]
    change, low, high = (_change(check, value) for value in (check.change.value, check.change.low, check.change.high))
    interval = "exact" if check.unit == "bytes" else f"{low} to {high}"
    noted = check.verdict + (f" ({check.note})" if check.note else "")
    return [*row, change, interval, _change(check, check.budget), noted]


def markdown(comparison: Comparison) -> str:
    lines = [f"# {escape(verdict(comparison))}", ""]
    if comparison.regressions:
        lines += [*(f"- **{escape(sentence(check))}**" for check in comparison.regressions), ""]
    lines += [f"Base: {escape(comparison.base)}. Head: {escape(comparison.head)}.", ""]
    rows = []
    for check in comparison.checks:
        *row, noted = map(escape, cells(check))
        rows.append([*row, f"**{noted}**" if check.regression else noted])
    lines.append(table(COLUMNS, rows, left=(0, 1, len(COLUMNS) - 1)))
    lines += [f"- {escape(note)}" for note in _notes(comparison)]
    return "\n".join(lines) + "\n"


def print_table(comparison: Comparison) -> None:
    """Print the table on standard output, then the notes, the verdict and each regression."""
    grid = new_table(Text(f"{comparison.base} → {comparison.head}"), *COLUMNS[:-1], words=_WORDS)
    grid.add_column(COLUMNS[-1])  # its notes may be long
    for number, check in enumerate(comparison.checks):
        *row, noted = cells(check)
        last = number + 1 == len(comparison.checks) or comparison.checks[number + 1].recipe != check.recipe
        grid.add_row(*map(Text, row), Text(noted, style=_COLORS.get(check.verdict, "")), end_section=last)
    show(grid, _WORDS)
    console = Terminal()
    for note in _notes(comparison):
        console.print(Text(note, style="dim"))
    console.print(Text(verdict(comparison), style="bold red" if comparison.regressions else "bold"))
    for check in comparison.regressions:
        console.print(Text(f"  {sentence(check)}", style="red"))


def _notes(comparison: Comparison) -> list[str]:
    notes = [f"{name}: new, only in head" for name in comparison.new] + comparison.notes
    if not comparison.judged:
        return [*notes, comparison.measured]
    explained = (
        f"Change of ln perplexity in nats, paired by document, ± {STANDARD_ERRORS:g} standard errors; of size and time in percent. "
        "A regression is an interval that lies beyond the budget as a whole"
    )
    if comparison.timed:
        explained += f"; {100 * FALSE_ALARMS:g} % of comparisons, at most, raise an alarm of latency by chance"
    return [*notes, comparison.measured, f"{explained} (docs/compare.md)."]


def _amount(check: Check, value: float | None) -> str:
    if value is None:
        return ""
    if check.unit == "bytes":
        return f"{value / 1e6:.3f} MB"
    return f"{value:.2f} ms" if check.unit == "ms" else f"{value:.4f}"


def _change(check: Check, value: float) -> str:
    """Format a change with its sign, in nats or percent. From a hundredfold on, it is shown as a factor."""
    if check.unit == "nats":
        return f"{value + 0.0:+.4f}".replace("-0.0000", "+0.0000")
    if value >= 99:
        return f"× {value + 1:.0f}"
    return f"{100 * value:+.1f} %".replace("-0.0 %", "+0.0 %")
