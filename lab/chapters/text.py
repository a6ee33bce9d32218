"""The chapters' pages: templates in lab/chapters/templates/ filled with docs/data/quantization.json, a number at a time.

A template has every number from that JSON, through one of the filters of `Numbers`, so that both languages have the
same ones: 0.5 in English is 0,5 in Spanish.
"""

from __future__ import annotations

import math
from pathlib import Path

from cuantiza.core.pages import environment, number, percent, plus_minus, signed, significant
from lab.chapters.numbers import FORMATS

# By language: the template, which is named as its page, and the page below docs/.
PAGES = {"es": "es/cuantizacion.md", "en": "en/quantization.md"}
TEMPLATES = Path(__file__).resolve().parent / "templates"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Numbers:
    """How a language writes numbers: cuantiza/core/pages.py with the language set, and two forms of its own."""

    def __init__(self, language: str) -> None:
        self._language = language

    def fixed(self, value: float, digits: int = 0) -> str:
        """With `digits` decimals: 12622 as "12,622" or "12 622"."""
        return number(value, digits, self._language)

    def signed(self, value: float, digits: int) -> str:
        """As `fixed`, with + before a value above 0."""
        return signed(value, digits, self._language)

    def digits(self, value: float, count: int = 3) -> str:
        """To `count` significant digits; as a power of ten below 0.001 and from 10 million on."""
        if not value:
            return "0"
        exponent = math.floor(math.log10(abs(float(f"{value:.{count - 1}e}"))))
        if -4 < exponent < 7:
            return significant(value, count, self._language)
        return f"{self.fixed(value / 10.0**exponent, count - 1)} × 10{str(exponent).translate(_SUPERSCRIPTS)}"

    def exact(self, value: float) -> str:
        """All decimals of a binary fraction that has at most 12 of them, else 10 significant digits."""
        text = f"{value:.12f}".rstrip("0").rstrip(".")
        decimals = len(text.partition(".")[2])
        return self.fixed(value, decimals) if float(text) == value else self.digits(value, 10)

    def percent(self, share: float, digits: int = 1) -> str:
        return percent(share, digits, self._language)

    def interval(self, value: float, stderr: float | None, digits: int) -> str:
        """value ± stderr, or the value alone where there is no standard error."""
        return plus_minus(value, stderr, digits, self._language)


def differs(row: dict) -> bool:
    """Whether Δ ln ppl of a row of the report is more than two standard errors from 0."""
    return abs(row["delta_ln_ppl"]) > 2 * (row["delta_ln_ppl_stderr"] or 0.0)


def page(language: str, data: dict) -> str:
    """The page in `language` of `data`, which is quantization.json as Python reads it."""
    pages = environment(TEMPLATES)
    numbers = Numbers(language)
    for name in ("fixed", "signed", "digits", "exact", "percent"):
        pages.filters[name] = getattr(numbers, name)
    pages.filters["code"] = "`{}`".format
    pages.globals["interval"] = numbers.interval
    pages.tests["different"] = differs
    rows = {row["name"]: row for row in data["report"]["artifacts"]}
    template = pages.get_template(f"{Path(PAGES[language]).name}.j2")
    return template.render(**data, rows=rows, formats=FORMATS, figure=f"../figures/{{}}.{language}.svg")
