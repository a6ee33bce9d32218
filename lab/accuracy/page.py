"""Makes docs/accuracy.md from docs/data/accuracy.json. Only the published losses of others are not in the JSON."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from cuantiza.core.pages import plus_minus
from cuantiza.core.store import folders
from lab.pages import filled

SCHEMA = "cuantiza/accuracy/1"
TEMPLATE = Path(__file__).resolve().parent / "accuracy.md.j2"
JSON, MARKDOWN = "data/accuracy.json", "accuracy.md"
# Quality fields of each artifact (docs/report.md explains them). It also has a name, the bytes of its ONNX file, and
# their ratio to fp32's.
FIELDS = (
    "perplexity",
    "delta_ln_ppl",
    "delta_ln_ppl_stderr",
    "kl_divergence",
    "kl_divergence_p50",
    "kl_divergence_p99",
    "top1_agreement",
    "top1_agreement_stderr",
)

EMBEDDED = ("es-mini", "es-mini-twin", "es-mini-sink")
ENGLISH = "lab/texts/en"  # the text of the models that were given with --english


@dataclass(frozen=True)
class Published:
    """A loss that others published, and our recipe to compare with it.

    With `divergence`, the loss is a KL divergence and a share of equal top tokens, otherwise a rise of perplexity.
    """

    source: str
    loss: str
    recipe: str
    divergence: bool = False


PUBLISHED = (
    Published("Intel Neural Compressor, GPT-2 on WikiText, static int8", "+4.3 %", "int8-static"),
    Published("Intel Neural Compressor, GPT-2 on WikiText, dynamic int8", "+2.4 %", "int8-dynamic"),
    Published("GPTQ, GPT-2 on WikiText, 4 bits in groups of 128", "26.50 against 25.19: +5.2 %", "int4-weight"),
    Published(
        "llama.cpp, Llama-3-8B on WikiText, Q8_0", "mean KL 0.0014, same top 97.7 %", "int8-weight-ort", divergence=True
    ),
)


def publish(report: dict, output: Path) -> None:
    """Write accuracy.json (floats to 6 significant digits) and its page to the folder `output`.

    Both files are made first and moved into place last.
    """
    report = _rounded(report)
    (output / JSON).parent.mkdir(parents=True, exist_ok=True)
    with folders.staging(output / MARKDOWN) as work:
        (work / JSON).parent.mkdir()
        (work / MARKDOWN).write_text(page(report), encoding="utf-8")
        (work / JSON).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        for name in (MARKDOWN, JSON):
            (work / name).replace(output / name)


def page(report: dict) -> str:
    """The text of the page for `report`, the content of accuracy.json."""
    models = report["models"]
    english = [item["model"] for item in models if item["corpus"] == ENGLISH]
    first = [item for item in models if item["corpus"] == models[0]["corpus"] and item["model"] not in english]
    names = dict.fromkeys(item["model"] for item in models)
    return filled(
        TEMPLATE,
        others=[name for name in names if name not in (*EMBEDDED, *english)],
        english=english,
        texts=[name for name in dict.fromkeys(item["corpus"] for item in models) if name not in ("corpus/es", ENGLISH)],
        window=max(item["window_tokens"] for item in models),
        threads=report["machine"]["threads"],
        cpu=report["machine"]["cpu"],
        onnxruntime=report["versions"]["onnxruntime"],
        skipped=report["skipped"],
        models=[item | {"tokens": f"{item['tokens_scored']:,}", "rows": _rows(item)} for item in models],
        corpus=models[0]["corpus"],
        published_models=[item["model"] for item in first],
        published=_published(first),
    )


def _rows(item: dict) -> list[tuple[str, ...]]:
    """The lines of the table of one model on one text."""
    rows = [("fp32", "1.000", f"{item['fp32_perplexity']:.2f}", "baseline", "", "", "")]
    rows += [
        (
            row["name"],
            f"{row['ratio']:.3f}",
            f"{row['perplexity']:.2f}",
            plus_minus(row["delta_ln_ppl"], row["delta_ln_ppl_stderr"], 4, "en"),
            f"{row['kl_divergence_p50']:.5f}",
            f"{row['kl_divergence_p99']:.5f}",
            plus_minus(100 * row["top1_agreement"], _scaled(row["top1_agreement_stderr"], 100), 1, "en"),
        )
        for row in item["artifacts"]
    ]
    return rows


def _published(models: list[dict]) -> list[tuple[str, ...]]:
    """One line per entry of PUBLISHED, with our loss on each of `models`."""
    rows = []
    for entry in PUBLISHED:
        found = [next((row for row in item["artifacts"] if row["name"] == entry.recipe), None) for item in models]
        cells = ("—" if row is None else _divergence(row) if entry.divergence else _rise(row) for row in found)
        rows.append((entry.source, entry.loss, f"`{entry.recipe}`", *cells))
    return rows


def _rise(row: dict) -> str:
    """The rise of perplexity, exp(Δ ln ppl) − 1, in percent. Its standard error comes from the delta method."""
    factor = math.exp(row["delta_ln_ppl"])
    rise = plus_minus(100 * (factor - 1), _scaled(row["delta_ln_ppl_stderr"], 100 * factor), 2, "en")
    return f"{'+' if factor >= 1 else ''}{rise} %"


def _divergence(row: dict) -> str:
    return f"{row['kl_divergence']:.4f}, {100 * row['top1_agreement']:.1f} %"


def _scaled(stderr: float | None, factor: float) -> float | None:
    return None if stderr is None else factor * stderr


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
