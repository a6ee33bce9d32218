"""The columns of every table of results, each defined once: its title in English and Spanish, and how it shows a row.

The terminal, report.md, report.html, the sweep's pages and the model card choose from COLUMNS by key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cuantiza.core.pages import number, percent, plus_minus, rise
from cuantiza.eval.report.schema import Measured, PaperName, Protocol, Row

NO_VALUE = "—"
# The name of each phase, and of one of its shapes.
_SHAPES = {
    "en": {"prefill": ("prefill", "prefill {at}"), "decode": ("decode", "decode @{at}")},
    "es": {"prefill": ("lectura", "lectura de {at}"), "decode": ("token", "token tras {at}")},
}


@dataclass(frozen=True)
class Column:
    """A column of figures. `show(row, first, language)` is a row's cell in a table whose baseline is `first`.

    Titles may hold {first}, the baseline's name, {prefill} and {decode}, what `shape_title` says of the lengths shown.
    """

    en: str
    es: str
    show: Callable[[Any, Measured, str], str]

    def title(self, first: Measured | None, language: str) -> str:
        """The title; without `first`, one that fits tables with several baselines."""
        prefill, decode = (first.usual("prefill").at, first.usual("decode").at) if first else (None, None)
        shapes = {
            "prefill": shape_title("prefill", prefill, language),
            "decode": shape_title("decode", decode, language),
        }
        return getattr(self, language).format(first=first.name if first else "fp32", **shapes)


def shape_title(phase: Literal["prefill", "decode"], at: int | None, language: str) -> str:
    """The name of a shape, such as `prefill 512` or `decode @128`; of the phase alone where `at` is None."""
    short, long = _SHAPES[language][phase]
    return short if at is None else long.format(at=number(at, 0, language).replace(",", ""))


def _megabytes(key: Literal["bytes", "model_bytes"]) -> Callable:
    return lambda row, first, language: number(getattr(row, key) / 1e6, 1, language)


def _ratio(key: Literal["bytes", "model_bytes"]) -> Callable:
    return lambda row, first, language: number(getattr(row, key) / getattr(first, key), 3, language)


def _delta(row: Measured, first: Measured, language: str) -> str:
    if row is first:
        return {"en": "baseline", "es": "referencia"}[language]
    return plus_minus(row.delta_ln_ppl, row.delta_ln_ppl_stderr, 4, language)


def _against(show: Callable[[Measured, str], str]) -> Callable:
    """Show a figure that compares with the baseline. The baseline's own row shows nothing."""
    return lambda row, first, language: "" if row is first else show(row, language)


def _timed(phase: Literal["prefill", "decode"]) -> Callable:
    """Show a time as `5.21 (3.42 ×)`: the median in ms, and in brackets the speed-up over the baseline."""

    def show(row: Measured, first: Measured, language: str) -> str:
        timing = row.usual(phase)
        return f"{number(timing.p50_ms, 2, language)} ({number(timing.speedup, 2, language)} ×)"

    return show


def _llama_cpp(row: Row, first: Measured, language: str) -> str:
    llama = row.llama_cpp
    return NO_VALUE if llama is None else plus_minus(llama.perplexity, llama.perplexity_stderr, 2, language)


def _paper(name: PaperName) -> Callable:
    """Show a perplexity by a paper's protocol as `26.50 ± 0.31 (+0.48 ± 0.05 %)`: in brackets the rise over the baseline."""

    def show(row: Row, first: Measured, language: str) -> str:
        found = next((item for item in row.protocols if item.name == name), None)
        if found is None:
            return NO_VALUE
        value = plus_minus(found.perplexity, found.perplexity_stderr, 2, language)
        return value if row is first else f"{value} ({relative_rise(found, language)})"

    return show


def relative_rise(found: Protocol, language: str) -> str:
    """The rise of perplexity over the baseline's in percent, exp(Δ ln ppl) − 1; ± is by the delta method."""
    share, stderr = rise(found.delta_ln_ppl), found.delta_ln_ppl_stderr
    error = None if stderr is None else 100 * (1 + share) * stderr
    sign = "+" if share > 0 else ""
    return f"{sign}{plus_minus(100 * share, error, 2, language)} %"


def _last_words(row: Measured, first: Measured, language: str) -> str:
    """Show `31.2 % (+3 −5)`: the share of last words that are right, and how many flipped either way."""
    words = row.last_words
    if words is None:
        return NO_VALUE
    share = percent(words.accuracy, 1, language)
    return share if row is first else f"{share} (+{words.gained} −{words.lost})"


def _flips_p(row: Measured, first: Measured, language: str) -> str:
    if row is first:
        return ""
    return NO_VALUE if row.last_words is None else number(row.last_words.p, 3, language)


COLUMNS = {
    "name": Column("artifact", "artefacto", lambda row, first, language: row.name),
    "size": Column("MB", "MB", _megabytes("bytes")),
    # The ratio is of all files that inference needs, over those of the baseline. "× fp32" means this on every page.
    "ratio": Column("× {first}", "× {first}", _ratio("bytes")),
    "graph_size": Column("graph, MB", "grafo, MB", _megabytes("model_bytes")),
    "graph_ratio": Column("graph × {first}", "grafo × {first}", _ratio("model_bytes")),
    "perplexity": Column(
        "perplexity",
        "perplejidad",
        lambda row, first, language: plus_minus(row.perplexity, row.perplexity_stderr, 2, language),
    ),
    "delta": Column("Δ ln ppl", "Δ ln ppl", _delta),
    "kl": Column("KL, nats", "KL, nats", _against(lambda row, language: number(row.kl_divergence, 5, language))),
    "same_top": Column(
        "same top", "mismo token", _against(lambda row, language: percent(row.top1_agreement, 1, language))
    ),
    "last_words": Column("last words", "últimas palabras", _last_words),
    "bits": Column("bits/byte", "bits por byte", lambda row, first, language: number(row.bits_per_byte, 4, language)),
    "prefill": Column("{prefill}, ms", "{prefill}, ms", _timed("prefill")),
    "decode": Column("{decode}, ms", "{decode}, ms", _timed("decode")),
    "load": Column("load, ms", "carga, ms", lambda row, first, language: number(row.load_ms, 0, language)),
    "peak": Column("peak, MB", "pico, MB", lambda row, first, language: number(row.peak_rss_bytes / 1e6, 0, language)),
    "llama_cpp": Column("llama.cpp perplexity", "perplejidad de llama.cpp", _llama_cpp),
    "transformers": Column(
        "perplexity, transformers' windows", "perplejidad, ventanas de transformers", _paper("transformers")
    ),
    "gptq": Column("perplexity, GPTQ's windows", "perplejidad, ventanas de GPTQ", _paper("gptq")),
    "word": Column(
        "word perplexity",
        "perplejidad por palabra",
        lambda row, first, language: number(row.word_perplexity, 2, language),
    ),
    "byte": Column(
        "byte perplexity",
        "perplejidad por byte",
        lambda row, first, language: number(row.byte_perplexity, 4, language),
    ),
    "flips_p": Column("p of flipped last words", "p de los cambios en las últimas palabras", _flips_p),
}
MAIN = (
    *("name", "size", "ratio", "perplexity", "delta", "kl", "same_top", "last_words", "bits"),
    *("prefill", "decode", "load", "peak"),
)


def protocols_of(first: Row) -> tuple[str, ...]:
    """The columns of the table of other protocols, in a report whose baseline is `first`."""
    return ("name", "llama_cpp", *(item.name for item in first.protocols), "word", "byte", "flips_p")


def titles(keys: Sequence[str], first: Measured | None, language: str) -> list[str]:
    """The titles of the columns `keys`, as `Column.title` has them."""
    return [COLUMNS[key].title(first, language) for key in keys]


def cells(keys: Sequence[str], row: Measured, first: Measured, language: str) -> list[str]:
    """The cells of `row` in the columns `keys`, in a table whose baseline is `first`."""
    return [COLUMNS[key].show(row, first, language) for key in keys]
