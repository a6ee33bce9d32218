"""Tables on a terminal: one line per row if it is wide enough, otherwise one block per row. Nothing is cut off."""

from __future__ import annotations

import re

import pytest
from rich.table import Table

from cuantiza.core.machine.terminal import new_table, show

ROWS = [("fp32", "28.7", "258.36 (1.00 ×)"), ("int8-dynamic", "7.5", "98.06 (2.63 ×)"), ("torch-fp32", "", "768.73")]


def table() -> Table:
    found = new_table("es-mini", "artifact", "MB", "prefill 512, ms", caption="times are p50")
    for row in ROWS:
        found.add_row(*row)
    return found


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def at(width: int | None) -> list[str]:
        """The printed lines on a terminal of that width; None means that the output is not a terminal."""
        for name in ("COLUMNS", "TTY_COMPATIBLE", "FORCE_COLOR"):
            monkeypatch.delenv(name, raising=False)
        if width is not None:
            monkeypatch.setenv("COLUMNS", str(width))
            monkeypatch.setenv("TTY_COMPATIBLE", "1")
        show(table())
        plain = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
        return [line.rstrip() for line in plain.splitlines()]

    return at


@pytest.mark.parametrize("width", [None, 80, 50])
def test_a_wide_terminal_has_a_line_for_each_row(printed, width):
    lines = printed(width)
    for row in ROWS:
        assert [line for line in lines if all(cell in line for cell in row)], (row, lines)
    assert "times are p50" in lines[-1]


@pytest.mark.parametrize("width", [38, 34])
def test_a_narrow_one_has_a_block_for_each_row(printed, width):
    text = "\n".join(printed(width))
    assert "…" not in text and all(len(line) <= width for line in text.splitlines())
    for name, megabytes, time in ROWS:
        block = text[text.index(f"\n{name}\n") :].split("\n")[2:4]
        wanted = [("MB", megabytes)] if megabytes else []
        for line, (heading, cell) in zip(block, [*wanted, ("prefill 512, ms", time)], strict=False):
            assert line.startswith(f"  {heading} ") and line.endswith(f" {cell}"), line
    assert text.rstrip().endswith("times are p50")
