"""Makes docs/quality-peers.md and its plots from docs/data/quality-peers.json alone.

Who wins is computed here from the figures: which peers are no larger than a recipe of ours and lose less.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np

from cuantiza.core.machine.progress import report as say
from cuantiza.core.pages import escape, plus_minus, significant
from cuantiza.eval.measure.estimates import mean_by_document
from lab import DATA, page_folder
from lab.pages import filled, write
from lab.quality.plot import draw

SCHEMA = "cuantiza/quality-peers/1"
JSON = DATA / "quality-peers.json"
TEMPLATE = Path(__file__).resolve().parent / "quality-peers.md.j2"
COLUMNS = (
    "row",
    "MB",
    "Δ ln ppl",
    "KL mean",
    "median",
    "99 %",
    "99.9 %",
    "max",
    "RMS Δp, %",
    "same top, %",
    "s",
    "peak, MB",
)
# A difference of KL counts if it is more than so many standard errors, over documents.
ERRORS = 2.0


def join(path: Path, model: dict, order: list[str]) -> dict:
    """The content of the file `path` after `model`, an element of `models`, has been measured.

    Its rows replace those of the same name; the others stay if they were measured on the same artifact, tokens and
    calibration. The rows are in the order of the names `order`.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        report = {"schema": SCHEMA, "models": []}
    models = {(item["model"], item["corpus"]): item for item in report["models"]}
    key, same = (model["model"], model["corpus"]), ("fp32", "tokens_sha256", "window_tokens", "calibration_windows")
    before = models.get(key)
    kept = before["rows"] if before and all(before[name] == model[name] for name in same) else []
    rows = {row["name"]: row for row in (*kept, *model["rows"]) if row["name"] in order}
    ordered = sorted(rows.values(), key=lambda row: order.index(row["name"]))
    models[key] = model | {"rows": ordered, "not_measured": [name for name in order if name not in rows]}
    return report | {"models": list(models.values())}


def publish(report: dict, path: Path) -> None:
    """Write the JSON file `path` (floats to 6 significant digits), and the page and its plots beside it."""
    report = rounded(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    folder = page_folder(path)
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    for item in report["models"]:
        if measured(item):
            draw(measured(item), title(item), figures / figure(item))
    target = folder / f"{path.stem}.md"
    write(target, page(report))
    say(f"quality   {target}: written")


def page(report: dict) -> str:
    """The text of the page for `report`, the content of the JSON."""
    models = [item for item in report["models"] if measured(item)]
    how = {row["name"]: row for item in models for row in item["rows"]}
    return filled(
        TEMPLATE,
        columns=COLUMNS,
        models=[_model(item) for item in models],
        how=[(shown(row), row["how"], ", ".join(versions(models, name))) for name, row in how.items()],
        errors=ERRORS,
    )


def _model(item: dict) -> dict:
    """What the template shows of one model on one text."""
    rows = measured(item)
    return {
        "title": title(item),
        "figure": figure(item),
        "tokens": f"{sum(item['document_tokens']):,}",
        "documents": len(item["document_tokens"]),
        "of": item["documents_in_split"],
        "window": item["window_tokens"],
        "calibration": item["calibration_windows"],
        "perplexity": f"{item['fp32_perplexity']:.2f}",
        "mb": f"{item['fp32_bytes'] / 1e6:.1f}",
        "cpu": item["cpu"],
        "threads": item["threads"],
        "rows": [line(row) for row in sorted(rows, key=lambda row: row["bytes"])],
        "ahead": [(shown(peer), size(peer), kl(peer)) for peer in unmatched(rows, item["document_tokens"])],
        "beaten": [
            (
                shown(own),
                size(own),
                kl(own),
                ", ".join(f"{shown(peer)} ({size(peer)} MB, KL {kl(peer)})" for peer in better),
            )
            for own, better in beaten(rows, item["document_tokens"])
        ],
        "not_measured": ", ".join(item.get("not_measured", [])),
        "skipped": [(shown(row), escape(row["skipped"])) for row in item["rows"] if "skipped" in row],
    }


def measured(item: dict) -> list[dict]:
    """The rows of a model that have figures."""
    return [row for row in item["rows"] if "skipped" not in row]


def quantized(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["bits"] < 32]


def beaten(rows: list[dict], tokens: list[int]) -> list[tuple[dict, list[dict]]]:
    """(a recipe of ours, the peers that are no larger and lose less) for every recipe of ours that there are such for."""
    peers = [row for row in quantized(rows) if not row["ours"]]
    found = [(own, [peer for peer in peers if wins(peer, own, tokens)]) for own in quantized(rows) if own["ours"]]
    return [(own, sorted(better, key=lambda row: row["kl_divergence"])) for own, better in found if better]


def unmatched(rows: list[dict], tokens: list[int]) -> list[dict]:
    """The peers that no artifact of ours matches, by growing size: each of ours is larger, or loses more.

    A peer of which another peer is no larger and loses less is left out.
    """
    candidates = quantized(rows)
    ours = [row for row in candidates if row["ours"]]
    peers = [row for row in candidates if not row["ours"]]
    best = [row for row in peers if not any(wins(other, row, tokens) for other in peers)]
    ahead = [
        row for row in best if all(own["bytes"] > row["bytes"] or wins(row, own, tokens, size=False) for own in ours)
    ]
    return sorted(ahead, key=lambda row: row["bytes"])


def wins(one: dict, other: dict, tokens: list[int], size: bool = True) -> bool:
    """Whether `one` has a lower mean KL than `other` by more than ERRORS standard errors, and with `size` no more bytes.

    Both were scored on the same documents, so the error is that of the difference, document by document.
    """
    if size and one["bytes"] > other["bytes"]:
        return False
    sums = np.subtract(other["kl_by_document"], one["kl_by_document"])
    difference = mean_by_document(sums, np.asarray(tokens))
    return difference.value > ERRORS * (difference.stderr or 0.0)


def line(row: dict) -> tuple[str, ...]:
    """The cells of a row, as COLUMNS names them."""
    spent = ("", "") if row["seconds"] is None else (f"{row['seconds']:.0f}", f"{row['anonymous_bytes'] / 1e6:,.0f}")
    top, error = row["top1_agreement"], row["top1_agreement_stderr"]
    return (
        shown(row),
        size(row),
        plus_minus(row["delta_ln_ppl"], row["delta_ln_ppl_stderr"], 4, "en"),
        kl(row),
        *(small(row[f"kl_divergence_{name}"]) for name in ("p50", "p99", "p999", "max")),
        f"{100 * row['rms_change_of_p']:.2f}",
        plus_minus(100 * top, None if error is None else 100 * error, 1, "en"),
        *spent,
    )


def shown(row: dict) -> str:
    """A row's name on the page: ours as code, the peers' as text."""
    return f"`{row['name']}`" if row["ours"] else row["name"]


def size(row: dict) -> str:
    return f"{row['bytes'] / 1e6:.1f}"


def kl(row: dict) -> str:
    error = row["kl_divergence_stderr"]
    return small(row["kl_divergence"]) + ("" if error is None else f" ± {small(error)}")


def small(value: float) -> str:
    """A number with two significant figures, and as a power of ten where it has many zeros."""
    if not value or abs(value) >= 1e-5:
        return significant(value, 2, "en")
    exponent = math.floor(math.log10(abs(value)))
    return f"{value / 10**exponent:.1f}e{exponent}".replace("-", "\N{MINUS SIGN}")


def title(item: dict) -> str:
    return f"{item['model']} on {item['corpus']}"


def figure(item: dict) -> str:
    """The file name of a model's plot."""
    place = re.sub(r"[^\w.-]+", "-", f"{item['model']}-{item['corpus']}")
    return f"quality-peers-{place}.svg"


def versions(models: list[dict], name: str) -> list[str]:
    """The different versions with which the row `name` was measured."""
    return list(dict.fromkeys(row["version"] for item in models for row in measured(item) if row["name"] == name))


def rounded(value: object) -> object:
    """`value` with floats to 6 significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
