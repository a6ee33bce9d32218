"""docs/accuracy.json -> docs/accuracy.md: every number on the page is in the JSON, or quoted from who published it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from cuantiza.core.pages import plus_minus, table, wrapped
from cuantiza.core.store import folders

SCHEMA = "cuantiza/accuracy/1"
JSON, MARKDOWN = "accuracy.json", "accuracy.md"
# Of an artifact, as docs/report.md explains them; beside them stand name, bytes of the ONNX file, and ratio to fp32's.
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

_INTRO = """\
# Accuracy

What quantization costs, measured. `make accuracy` reprints this page and [accuracy.json](accuracy.json), which holds
its numbers; `make accuracy MODELS="FOLDER ..." TEXT=FILE` adds rows of other GPT-2 checkpoints and of another text.

**Models.** `es-mini` is the embedded GPT-2, whose activations are tame; its checkpoint is in float16, so `fp16` loses
nothing. `es-mini-twin` and `es-mini-sink` are made of
it by [lab/checkpoints/hard.py](../lab/checkpoints/hard.py) with seed 0, and have what makes GPT-2s of full size hard to
quantize: the twin computes the same function with outlier channels tens of times the others in the input of every
projection; the sink carries a massive activation at position 0 of the text, hundreds of times the usual.{others}

**Text.** `corpus/es` is its test split, all of it.{texts} Calibration is always that of `corpus/es`, and no
document of it is scored.

**Measurement.** The report's ([docs/report.md](report.md)): every document behind one start token, windows of at most
{window} tokens, every token scored once. Δ ln ppl (the rise of ln perplexity, nats a token), KL divergence and the share
of positions with the same likeliest token are against the fp32 artifact of the same model, paired token by token;
± is one standard error, with documents as the sampling unit. graph × fp32 is the size of the ONNX file over that of
fp32, without configuration and tokenizer.
Nothing is timed here, so every model runs on {threads} thread ({cpu}, onnxruntime {onnxruntime}).

**Artifacts.** The recipes of `python -m quantize`, and beside them

- `int4-weight-nearest`: `int4-weight` without GPTQ, each weight rounded to nearest; the same size;
- `ort-dynamic`, `ort-static`: ONNX Runtime's tools as its documentation advises for transformers, on the same fp32
  artifact; static calibrates (min-max) on full windows of the calibration split;
- `naive-dynamic`, `naive-static`: `quantize_dynamic` (QInt8) and `quantize_static` (QDQ, activations u8, weights s8,
  min-max, per tensor) of ONNX Runtime straight on fp32; static calibrates on 8 sentences, the first of each of the
  first 8 calibration documents;
- `optimum-dynamic`, `optimum-static`: optimum's `ORTQuantizer` straight on fp32, with
  `AutoQuantizationConfig.avx512_vnni(per_channel=False)`; static calibrates min-max on the same 8 sentences.

By default ONNX Runtime's static tool quantizes every operator that it knows, the sum of scores and attention mask among
them, and a grid that reaches to the mask's −10³⁰ leaves nothing of the scores: much of what `naive-static` loses is
this. `ort-static` names products and look-ups, as its documentation advises.
"""

_PUBLISHED_INTRO = """\
## Published losses

What others report, beside ours on {corpus}. Models and texts differ, so this is no race but a scale to read the
tables by. The rise of perplexity in percent is exp(Δ ln ppl) − 1.
"""

_SAMPLE = "Only a part of its test split is scored: whole documents, in the order of their sha256, as many as each heading says."
EMBEDDED = ("es-mini", "es-mini-twin", "es-mini-sink")


@dataclass(frozen=True)
class Published:
    """A loss that others report, and the recipe of ours to put beside it. `divergence`: KL and same top, not perplexity."""

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
    """Write accuracy.json, floats to 6 significant digits, and the page made of it into folder `output`, both whole."""
    report = _rounded(report)
    output.mkdir(parents=True, exist_ok=True)
    with folders.staging(output / JSON) as work:
        (work / MARKDOWN).write_text(page(report), encoding="utf-8")
        (work / JSON).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        for name in (MARKDOWN, JSON):
            (work / name).replace(output / name)


def page(report: dict) -> str:
    """The page of a report as accuracy.json has it."""
    models = report["models"]
    own = [name for name in dict.fromkeys(item["model"] for item in models) if name not in EMBEDDED]
    texts = [name for name in dict.fromkeys(item["corpus"] for item in models) if name != "corpus/es"]
    intro = _INTRO.format(
        others="".join(f" `{name}` is no part of the project; it was given with `MODELS=`." for name in own),
        texts="".join(f" `{name}` is no part of the project; it was given with `TEXT=`. {_SAMPLE}" for name in texts),
        window=max(item["window_tokens"] for item in models),
        threads=report["machine"]["threads"],
        cpu=report["machine"]["cpu"],
        onnxruntime=report["versions"]["onnxruntime"],
    )
    parts = [wrapped(intro), *(f"Not measured: `{name}`: {reason}.\n" for name, reason in report["skipped"].items())]
    parts += [_section(item) for item in models]
    first = [item for item in models if item["corpus"] == models[0]["corpus"]]
    return "\n".join([*parts, _PUBLISHED_INTRO.format(corpus=f"`{models[0]['corpus']}`"), _published(first)])


def _section(item: dict) -> str:
    """The table of one model on one text."""
    title = f"## {item['model']} on {item['corpus']}: {item['tokens_scored']:,} tokens, {item['documents']} documents"
    columns = ("artifact", "graph × fp32", "perplexity", "Δ ln ppl", "KL median", "KL p99", "same top, %")
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
    return f"{title}\n\n{table(columns, rows)}"


def _published(models: list[dict]) -> str:
    columns = ("published", "loss", "ours", *(item["model"] for item in models))
    rows = []
    for entry in PUBLISHED:
        found = [next((row for row in item["artifacts"] if row["name"] == entry.recipe), None) for item in models]
        cells = ("—" if row is None else _divergence(row) if entry.divergence else _rise(row) for row in found)
        rows.append((entry.source, entry.loss, f"`{entry.recipe}`", *cells))
    return table(columns, rows)


def _rise(row: dict) -> str:
    """exp(Δ ln ppl) − 1 in percent, its standard error by the delta method."""
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
