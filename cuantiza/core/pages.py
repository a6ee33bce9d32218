"""The parts that pages are made of: Markdown tables, escaped text, wrapped prose, numbers by language, templates."""

from __future__ import annotations

import html
import math
import re
import textwrap
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment

WIDTH = 120
_LARGEST = 1e15  # from about 2^53 on, floats do not tell whole numbers apart
_THIN = "\N{NARROW NO-BREAK SPACE}"
_FIXED = re.compile(r"[#|<!]|\[\^|```")  # headings, tables, HTML, pictures, footnotes, code: a block that is not filled


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """A Markdown table. Columns whose number is in `left` are aligned to the left, the others to the right.

    A cell may hold Markdown. A `|` in it is escaped, and a line break becomes a space.
    """
    align = "|" + "".join("---|" if number in left else "---:|" for number in range(len(columns)))
    return "\n".join([_line(columns), align, *map(_line, rows)]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", cell).replace("\n", " ") for cell in cells) + " |"


def escape(text: str) -> str:
    """Text from a file as Markdown that shows this text and does nothing else, on one line."""
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", html.escape(text, quote=False)).replace("@", "&#64;").replace("\n", " ")


def wrapped(text: str) -> str:
    """Markdown with paragraphs and list items filled to lines of at most WIDTH characters.

    Blocks are separated by empty lines. Headings, tables, HTML, pictures, footnotes and code stay as they are.
    """
    return "\n\n".join(map(_filled, re.split(r"\n{2,}", text.strip("\n")))) + "\n"


def _filled(block: str) -> str:
    if _FIXED.match(block):
        return block
    return "\n".join(_fill(item, "  " if item.startswith("- ") else "") for item in re.split(r"\n(?=- )", block))


def _fill(text: str, indent: str) -> str:
    text = re.sub(r"[ \t\n]+", " ", text).strip(" ")
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def environment(folder: Path) -> Environment:
    """The templates in `folder`. A missing value is an error; in HTML (`*.html.j2`) every value is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def number(value: float, digits: int, language: str) -> str:
    """`value` with `digits` decimals, as English (en: 12,622.5) or Spanish (es: 12 622,5) writes it. The minus is −.

    Where floats no longer tell whole numbers apart, it has an exponent (1.01e+304).
    """
    form = ",.{}f" if not abs(value) > _LARGEST else ".{}e"
    text = f"{round(value, digits) + 0.0:{form.format(digits)}}"  # + 0.0: never -0
    if language == "es":
        whole, _, decimals = text.partition(".")
        # Four digits stay together in Spanish (Ortografía de la lengua española, 2010).
        whole = whole.replace(",", _THIN if len(whole.lstrip("-").replace(",", "")) > 4 else "")
        text = whole + (f",{decimals}" if decimals else "")
    return text.replace("-", "\N{MINUS SIGN}")


def signed(value: float, digits: int, language: str) -> str:
    """As `number`, with + before a value above 0."""
    return ("+" if round(value, digits) > 0 else "") + number(value, digits, language)


def significant(value: float, figures: int, language: str) -> str:
    """`value` with so many significant figures."""
    magnitude = math.floor(math.log10(abs(float(f"{value:.{figures - 1}e}")))) if value else 0
    return number(value, max(0, figures - 1 - magnitude), language)


def percent(share: float, digits: int, language: str) -> str:
    """A share (0 to 1) as a percentage. The space before % does not break."""
    return f"{number(100 * share, digits, language)}\N{NO-BREAK SPACE}%"


def signed_percent(share: float, digits: int, language: str) -> str:
    """A change, as a share, with its sign and as a percentage."""
    return f"{signed(100 * share, digits, language)}\N{NO-BREAK SPACE}%"


def rise(ln_ratio: float) -> float:
    """exp(ln_ratio) − 1, the rise of a figure as a share; finite for any finite `ln_ratio`."""
    return math.expm1(min(ln_ratio, 700))


def plus_minus(value: float, stderr: float | None, digits: int, language: str) -> str:
    """`value ± stderr`; the value alone where there is no standard error."""
    return number(value, digits, language) + ("" if stderr is None else f" ± {number(stderr, digits, language)}")


def count(amount: int, noun: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{amount} {noun}" + ("" if amount == 1 else "s")
