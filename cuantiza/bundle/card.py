"""Makes the model card: the metadata that the Hub reads, the measured figures, and code to load the files."""

from __future__ import annotations

from pathlib import Path

import yaml

from cuantiza.bundle.files import DTYPES, graph_name
from cuantiza.core.errors import UserError
from cuantiza.core.pages import count, table
from cuantiza.core.store.artifact import Artifact
from cuantiza.eval.report.columns import cells, titles
from cuantiza.eval.report.schema import Report, Row

_FIGURES = ("graph_size", "perplexity", "delta", "decode")

_PYTHON = """from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{id}")
model = ORTModelForCausalLM.from_pretrained("{id}")  # or file_name="{small}"
tokens = model.generate(**tokenizer("{prompt}", return_tensors="pt"), max_new_tokens=40)
print(tokenizer.decode(tokens[0]))"""
_JAVASCRIPT = """import {{ pipeline }} from "@huggingface/transformers";

const generator = await pipeline("text-generation", "{id}", {{ dtype: "{dtype}" }});
console.log(await generator("{prompt}", {{ max_new_tokens: 40 }}));"""
_PLAIN = """import numpy as np, onnxruntime as ort
from tokenizers import Tokenizer

ids = np.array([Tokenizer.from_file("tokenizer.json").encode("{prompt}").ids])
session = ort.InferenceSession("onnx/{small}")
feeds = {{"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}}
for past in session.get_inputs():
    if past.name.startswith("past_key_values."):
        feeds[past.name] = np.zeros((1, past.shape[1], 0, past.shape[3]), np.float32)
logits = session.run(["logits"], feeds)[0]  # [1, tokens, vocabulary]"""
# This note goes into cards of artifacts with int8 matmuls.
_WITHOUT_VNNI = """On x86-64 without VNNI (AMD before Zen 4, most of Intel before 2019), ONNX Runtime multiplies int8 exactly only with the \
session option `session.x64quantprecision` at `1`: `options.add_session_config_entry("session.x64quantprecision", "1")`."""


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


def front_matter(checkpoint: Path) -> dict:
    """The YAML front matter of the checkpoint's own card; empty if there is none."""
    try:
        text = (checkpoint / "README.md").read_text(encoding="utf-8")
        found = yaml.safe_load(text[4 : text.index("\n---\n", 3)]) if text.startswith("---\n") else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def card(report: Report, rows: list[Row], model: str, checkpoint: Path, config: dict, hub_id: str | None) -> str:
    """The text of a bundle's README.md.

    `config` has the fields of config.json. `hub_id` is the checkpoint's id on the Hub; None if it was a folder.
    """
    own = front_matter(checkpoint)
    head = {key: own[key] for key in ("language", "license", "license_name", "license_link") if key in own}
    head |= {"library_name": "onnx", "pipeline_tag": "text-generation"}
    if hub_id:
        head["base_model"] = hub_id
    kind = [str(config["model_type"])] if isinstance(config.get("model_type"), str) else []
    prompt, small = report.prompt, graph_name(rows[1 if len(rows) > 1 else 0].name)
    fill = {"id": f"owner/{model}", "prompt": prompt, "small": small, "dtype": DTYPES[rows[-1].name]}
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
        f"paired with fp32. Decode is the time of one token after a context of that many, in brackets the speed-up over fp32, on "
        f"{machine.cpu} with {count(machine.threads, 'thread')}, onnxruntime {report.versions.get('onnxruntime', 'unknown')}.",
        "",
        "## Python, with optimum",
        "",
        "```python",
        _PYTHON.format(**fill),
        "```",
        "",
        "## Node and the browser, with transformers.js",
        "",
        "```js",
        _JAVASCRIPT.format(**fill),
        "```",
        "",
        "## ONNX Runtime alone",
        "",
        "```python",
        _PLAIN.format(**fill),
        "```",
        "",
        *([_WITHOUT_VNNI, ""] if any(row.name.startswith("int8-") for row in rows) else []),
        "Past keys and values go in as `past_key_values.*` and come out as `present.*`; the graphs are standard operators.",
        "",
        "## Licence",
        "",
        _licence(own, checkpoint, hub_id),
    ]
    return "\n".join(lines) + "\n"


def _table(rows: list[Row]) -> str:
    first = rows[0]
    lines = [
        [f"`{graph_name(row.name)}`", f"`{DTYPES[row.name]}`", row.name, *cells(_FIGURES, row, first, "en")]
        for row in rows
    ]
    return table(["file in `onnx/`", "dtype", "recipe", *titles(_FIGURES, first, "en")], lines, left=(0, 1, 2)).rstrip()


def _licence(own: dict, checkpoint: Path, hub_id: str | None) -> str:
    if "license" in own:
        return f"That of the checkpoint: {own.get('license_name', own['license'])}."
    if any(checkpoint.glob("LICENSE*")):
        return "That of the checkpoint, in this folder."
    source = f"at https://huggingface.co/{hub_id}" if hub_id else "beside the checkpoint"
    return f"That of the checkpoint, {source}: look there before you pass these files on, and name it at the head of this card."
