"""Makes the model card: the metadata that the Hub reads, the measured figures, and code to load the files."""

from __future__ import annotations

from pathlib import Path

import yaml

from cuantiza.bundle.examples import examples, opening
from cuantiza.bundle.files import DTYPES, graph_name
from cuantiza.bundle.licence import Licence
from cuantiza.core.errors import UserError
from cuantiza.core.inputs.model_config import read_config, start_token
from cuantiza.core.inputs.tokenizer import load_tokenizer
from cuantiza.core.pages import count, table
from cuantiza.core.store.artifact import Artifact
from cuantiza.eval.report.columns import cells, titles
from cuantiza.eval.report.schema import Report, Row

_FIGURES = ("graph_size", "perplexity", "delta", "last_words", "decode")

# For a start token that cannot be written as text.
_UNPARSED = " in the last example. In the others, put the id {id} before the prompt's ids: its text gives other tokens."
_TELEMETRY = """ONNX Runtime from 1.29 on reports its use to its makers unless `ORT_DISABLE_TELEMETRY=1` is in the environment before it \
is imported."""


def rows_of(report: Report, artifacts: list[Artifact], path: Path) -> list[Row]:
    """The report's row of each artifact. Raises UserError if `report` (read from `path`) is not about these files."""
    digests, rows = dict(report.inputs.artifacts), {row.name: row for row in report.artifacts}
    for item in artifacts:
        if digests.get(item.manifest.name) != item.digest or item.manifest.name not in rows:
            raise UserError(
                f"{path}: did not measure {item.path} as it is now; "
                f'run `make eval RECIPES="{" ".join(each.manifest.name for each in artifacts[1:])}"` again'
            )
    return [rows[item.manifest.name] for item in artifacts]


def card(report: Report, rows: list[Row], model: str, folder: Path, licence: Licence, hub_id: str | None) -> str:
    """The text of a bundle's README.md.

    `folder` is that of the fp32 artifact: its tokenizer and configuration are the bundle's. `hub_id` is the checkpoint's
    id on the Hub; None if it was a folder.
    """
    config = read_config(folder)
    head = licence.head | {"library_name": "onnx", "pipeline_tag": "text-generation"}
    if hub_id:
        head["base_model"] = hub_id
    kind = [str(config["model_type"])] if isinstance(config.get("model_type"), str) else []
    shown = rows[1 if len(rows) > 1 else 0]
    begin = opening(load_tokenizer(folder), start_token(folder), report.prompt)
    optimum, javascript, plain = examples(
        f"owner/{model}", report.prompt, begin, graph_name(shown.name), DTYPES[shown.name]
    )
    corpus, machine = report.corpus, report.machine
    lines = [
        "---",
        yaml.safe_dump(head, allow_unicode=True, sort_keys=False).rstrip(),
        f"tags: [{', '.join(['onnx', 'onnxruntime', 'transformers.js', *kind, 'quantized'])}]",
        "---",
        "",
        f"# {model}, in ONNX",
        "",
        f"`{hub_id or model}` for ONNX Runtime, optimum and transformers.js, quantized and measured by cuantiza.",
        "",
        _table(rows),
        "",
        f"Measured on {rows[0].tokens_scored} tokens of {corpus.source}; ± is one standard error over documents, Δ is "
        f"paired with fp32. Last words: the share of sentences whose last word the model has right, in brackets those that flipped "
        f"against fp32, to right (+) and to wrong (−). Decode is the time of one token after a context of that many, in brackets the speed-up over fp32, on "
        f"{machine.cpu} with {count(machine.threads, 'thread')}, onnxruntime {report.versions.get('onnxruntime', 'unknown')}.",
        "",
        f"The examples continue the report's prompt with `{graph_name(shown.name)}`, the likeliest token each time, as the "
        f"report did. Every text was measured after the start token, `{begin.text}` (id {begin.start}), so they begin with it"
        + (". Tokenizers do not add it by themselves." if begin.parsed else _UNPARSED.format(id=begin.start)),
        "",
        "## Python, with optimum",
        "",
        "```python",
        optimum,
        "```",
        "",
        "## Node and the browser, with transformers.js",
        "",
        "```js",
        javascript,
        "```",
        "",
        "## ONNX Runtime alone",
        "",
        "```python",
        plain,
        "```",
        "",
        _TELEMETRY,
        "",
        "Past keys and values go in as `past_key_values.*` and come out as `present.*`; the graphs are standard operators.",
        "",
        "## Licence",
        "",
        licence.sentence,
    ]
    return "\n".join(lines) + "\n"


def _table(rows: list[Row]) -> str:
    first = rows[0]
    lines = [
        [f"`{graph_name(row.name)}`", f"`{DTYPES[row.name]}`", row.name, *cells(_FIGURES, row, first, "en")]
        for row in rows
    ]
    return table(["file in `onnx/`", "dtype", "recipe", *titles(_FIGURES, first, "en")], lines, left=(0, 1, 2)).rstrip()
