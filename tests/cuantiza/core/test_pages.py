"""cuantiza/core/pages.py: tables, escaped text, wrapped prose and numbers, as a reader sees them."""

from __future__ import annotations

import pytest
from jinja2 import UndefinedError

from cuantiza.core.pages import (
    environment,
    escape,
    number,
    percent,
    plus_minus,
    signed,
    signed_percent,
    significant,
    table,
    wrapped,
)

THIN, NO_BREAK, MINUS = "\u202f", "\u00a0", "\u2212"


def test_numbers_by_language():
    assert number(12622.5, 1, "en") == "12,622.5" and number(12622.5, 1, "es") == f"12{THIN}622,5"
    assert number(1023, 0, "es") == "1023" and number(1023, 0, "en") == "1,023"
    assert number(-0.00001, 4, "en") == "0.0000" and number(-1.5, 1, "es") == f"{MINUS}1,5"
    assert signed(0.5, 1, "es") == "+0,5" and signed(0.04, 1, "en") == "0.0" and signed(-2, 0, "en") == f"{MINUS}2"


def test_significant_figures():
    assert significant(0.00123, 3, "en") == "0.00123" and significant(123.4, 3, "es") == "123"
    assert significant(0.0996, 2, "en") == "0.10" and significant(0, 1, "en") == "0"


def test_shares_and_errors():
    assert percent(0.5, 1, "en") == f"50.0{NO_BREAK}%" and percent(0.5, 0, "es") == f"50{NO_BREAK}%"
    assert (
        signed_percent(0.1, 1, "en") == f"+10.0{NO_BREAK}%" and signed_percent(-0.1, 0, "es") == f"{MINUS}10{NO_BREAK}%"
    )
    assert plus_minus(1.25, 0.5, 1, "es") == "1,2 ± 0,5" and plus_minus(1.25, None, 2, "en") == "1.25"


def test_a_table_holds_any_text():
    text = table(["a", "b", "c"], [["x|y", "1", "two\nlines"], ["already \\| escaped", "", "z"]], left=(0, 2))
    assert text.splitlines() == [
        "| a | b | c |",
        "|---|---:|---|",
        "| x\\|y | 1 | two lines |",
        "| already \\| escaped |  | z |",
    ]


def test_escaped_text_is_only_text():
    assert escape("<img src=x> | [a](b) *c* @d\n_e_ `f`") == (r"&lt;img src=x&gt; \| \[a\](b) \*c\* &#64;d \_e\_ \`f\`")


def test_prose_is_filled_and_the_rest_stays():
    long = "word " * 40
    text = wrapped(f"# {long}\n\n{long}\nmore\n\n- {long}\n- short\n  goes on\n\n| {long} |\n|---|\n")
    lines = text.splitlines()
    assert [len(line) > 120 for line in lines].count(True) == 2  # the heading and the table
    assert "- short goes on" in lines and next(line for line in lines if line.startswith("  word"))
    assert wrapped(text) == text


def test_templates_escape_html_alone_and_miss_nothing(tmp_path):
    for name in ("page.html.j2", "page.md.j2"):
        (tmp_path / name).write_text("{{ value }}\n")
    pages = environment(tmp_path)
    assert pages.get_template("page.html.j2").render(value="<b>") == "&lt;b&gt;\n"
    assert pages.get_template("page.md.j2").render(value="<b>") == "<b>\n"
    with pytest.raises(UndefinedError):
        pages.get_template("page.md.j2").render()
