"""The chapters' pages: templates in lab/chapters/templates/ filled with docs/data/quantization.json, a number at a time.

A template has every number from that JSON, through one of the filters of `Numbers`, so that both languages have the
same ones: 0.5 in English is 0,5 in Spanish.
"""

from __future__ import annotations

import math
from pathlib import Path

import jinja2

from lab.chapters.numbers import FORMATS

# By language: the template, which is named as its page, and the page below docs/.
PAGES = {"es": "es/cuantizacion.md", "en": "en/quantization.md"}
TEMPLATES = Path(__file__).resolve().parent / "templates"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_THIN = "\N{NARROW NO-BREAK SPACE}"


class Numbers:
    """How a language writes numbers. Minus is −, and no −0 is written."""

    def __init__(self, language: str) -> None:
        self._decimal, self._thousands = {"es": (",", _THIN), "en": (".", ",")}[language]

    def fixed(self, value: float, digits: int = 0) -> str:
        """With `digits` decimals: 12622 as "12,622" or "12 622". Four figures stay together in Spanish."""
        text = f"{round(value, digits) + 0.0:,.{digits}f}"
        if self._thousands == _THIN and abs(value) < 10_000:
            text = text.replace(",", "")
        return text.replace("-", "−").translate(str.maketrans(",.", self._thousands + self._decimal))

    def signed(self, value: float, digits: int) -> str:
        """As `fixed`, with + in front of what is above 0."""
        return ("+" if round(value, digits) > 0 else "") + self.fixed(value, digits)

    def digits(self, value: float, count: int = 3) -> str:
        """To `count` significant digits; as a power of ten below 0.001 and from 10 million on."""
        if not value:
            return "0"
        exponent = math.floor(math.log10(abs(float(f"{value:.{count - 1}e}"))))
        if -4 < exponent < 7:
            return self.fixed(value, max(count - 1 - exponent, 0))
        return f"{self.fixed(value / 10.0**exponent, count - 1)} × 10{str(exponent).translate(_SUPERSCRIPTS)}"

    def exact(self, value: float) -> str:
        """All decimals of a binary fraction that has at most 12 of them, else 10 significant digits."""
        text = f"{value:.12f}".rstrip("0").rstrip(".")
        decimals = len(text.partition(".")[2])
        return self.fixed(value, decimals) if float(text) == value else self.digits(value, 10)

    def percent(self, share: float, digits: int = 1) -> str:
        return f"{self.fixed(100 * share, digits)}\N{NO-BREAK SPACE}%"

    def interval(self, value: float, stderr: float | None, digits: int) -> str:
        """value ± stderr, or the value alone where there is none."""
        return self.fixed(value, digits) + ("" if stderr is None else f" ± {self.fixed(stderr, digits)}")


def differs(row: dict) -> bool:
    """Whether Δ ln ppl of a row of the report is more than two standard errors from 0."""
    return abs(row["delta_ln_ppl"]) > 2 * (row["delta_ln_ppl_stderr"] or 0.0)


def page(language: str, data: dict) -> str:
    """The page in `language` of `data`, which is quantization.json as Python reads it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    numbers = Numbers(language)
    for name in ("fixed", "signed", "digits", "exact", "percent"):
        environment.filters[name] = getattr(numbers, name)
    environment.filters["code"] = "`{}`".format
    environment.globals["interval"] = numbers.interval
    environment.tests["different"] = differs
    rows = {row["name"]: row for row in data["report"]["artifacts"]}
    template = environment.get_template(f"{Path(PAGES[language]).name}.j2")
    return template.render(**data, rows=rows, formats=FORMATS, figure=f"../figures/{{}}.{language}.svg")
