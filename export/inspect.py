"""Says what a checkpoint or an artifact is, without exporting: architecture, sizes, tokenizer, start token, warnings."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from cuantiza.core.cli import Parser
from cuantiza.core.errors import UserError
from cuantiza.core.inputs.checkpoints import base_folder, files_to_read, has_all_weights, model_name, resolve_model
from cuantiza.core.inputs.defaults import MODEL, PROMPT, place
from cuantiza.core.inputs.model_config import end_tokens, max_positions, start_token
from cuantiza.core.inputs.tokenizer import load_tokenizer, token_ids
from cuantiza.core.pages import number
from cuantiza.core.store.artifact import MANIFEST, open_artifact
from cuantiza.export.stage import EXPORTERS

if TYPE_CHECKING:
    from cuantiza.export.examine import Findings
    from cuantiza.export.graphs.parts import Size

_SHOWN = 12  # tokens of the example


def main(arguments: Sequence[str] | None = None) -> int:
    args = _arguments(arguments)
    folder = place(args.model)
    found = of_artifact(folder) if (folder / MANIFEST).is_file() else of_checkpoint(args.model, args.exporter)
    if args.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return 0
    width = max(map(len, found))
    for key, value in found.items():
        for line in value if isinstance(value, list) else [value]:
            print(f"{key.replace('_', ' '):{width}}  {line}")
    return 0


def of_checkpoint(spec: str, exporter: str = "graph") -> dict[str, str | list[str]]:
    """What an export of model `spec` would find: sentences by subject, `warnings` last.

    Of a model on the hub only the small files are downloaded. Raises UserError where `exporter` would refuse it.
    """
    from cuantiza.export.examine import examine  # it needs the packages of the extra `export`; an artifact does not

    model = resolve_model(spec, weights=False)
    here = place(spec).is_dir() or has_all_weights(base_folder(model.folder))
    with tempfile.TemporaryDirectory() as work:
        found = examine(model.folder, Path(work), exporter, weights=here)
    described: dict[str, str | list[str]] = {"model": f"{model_name(spec)}, in {model.folder}"}
    kind = found.architecture
    described["architecture"] = kind.describe(found.config) if kind else str(found.fields["model_type"])
    described["positions"] = f"{max_positions(found.fields)} tokens at most"
    if kind:
        described["parameters"] = _parameters(kind.size(found.config))
    described["weights"] = _weights(found)
    described["tokenizer"] = _tokenizer(found.tokenizer)
    described["start_token"] = f"{_named(found.tokenizer, found.tokens.start)}, from {found.tokens.source}"
    described["end_tokens"] = ", ".join(_named(found.tokenizer, id) for id in found.tokens.end)
    if found.tokens.pad is not None:
        described["pad_token"] = _named(found.tokenizer, found.tokens.pad)
    described["example"] = _example(found.tokenizer)
    return described | ({"warnings": list(found.warnings)} if found.warnings else {})


def of_artifact(folder: Path) -> dict[str, str | list[str]]:
    """What the artifact in `folder` is. Raises UserError where its files are not those of its manifest."""
    opened = open_artifact(folder)
    manifest, tokenizer = opened.manifest, load_tokenizer(folder)
    recipe = json.dumps(manifest.recipe, ensure_ascii=False)
    total = sum(file.bytes for file in manifest.files.values())
    described: dict[str, str | list[str]] = {"artifact": f"{manifest.name} of {manifest.model}, in {folder}"}
    described["recipe"] = recipe
    described["files"] = [f"{name}, {_megabytes(file.bytes)}" for name, file in manifest.files.items()]
    described["together"] = f"{_megabytes(total)}, all as the manifest says"
    described["versions"] = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    described["tokenizer"] = _tokenizer(tokenizer)
    described["start_token"] = _named(tokenizer, start_token(folder))
    described["end_tokens"] = ", ".join(_named(tokenizer, id) for id in sorted(end_tokens(folder)))
    described["example"] = _example(tokenizer)
    warnings = manifest.details.get("warnings", [])
    return described | ({"warnings": warnings} if warnings else {})


def _parameters(size: Size) -> str:
    tied = "shared with the head" if size.tied else "and as many in the head"
    return (
        f"{number(size.parameters / 1e6, 1, 'en')} million, {number(size.embedding / 1e6, 1, 'en')} of them in the "
        f"embedding, {tied}; {_megabytes(4 * size.parameters)} in fp32"
    )


def _weights(found: Findings) -> str:
    files = files_to_read(found.base) if has_all_weights(found.base) else []
    if found.checkpoint is None:
        return f"{', '.join(files)}, not opened" if files else "on the hub, not downloaded"
    sizes = sum((found.base / name).stat().st_size for name in files)
    stored = sum(math.prod(weight.shape) for weight in found.checkpoint.weights.values())
    kinds = ", ".join(found.checkpoint.dtypes)
    return f"{', '.join(files)}: {_megabytes(sizes)}, {number(stored / 1e6, 1, 'en')} million numbers in {kinds}"


def _tokenizer(tokenizer: Tokenizer) -> str:
    fields: Mapping[str, Any] = json.loads(tokenizer.to_str())
    kind, before = fields["model"]["type"], (fields.get("pre_tokenizer") or {}).get("type")
    added = len(fields["added_tokens"])
    return (
        f"{kind}{f' after {before}' if before else ''}, {tokenizer.get_vocab_size()} tokens, {added} of them added ones"
    )


def _example(tokenizer: Tokenizer) -> str:
    try:
        ids = token_ids(tokenizer, PROMPT)
    except UserError:
        return f"«{PROMPT}» has parts that the tokenizer has no token for"
    pieces = "|".join(tokenizer.decode([id], skip_special_tokens=False) for id in ids[:_SHOWN])
    return f"«{PROMPT}» has {len(ids)} tokens: {pieces}"


def _named(tokenizer: Tokenizer, id: int) -> str:
    text = tokenizer.id_to_token(id)
    return f"{id} ({text})" if text else str(id)


def _megabytes(amount: int) -> str:
    return f"{number(amount / 1e6, 1, 'en')} MB"


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("inspect", __doc__, "cuantiza inspect datificate/gpt2-small-spanish")
    parser.add_argument(
        "model", nargs="?", default=MODEL, help=f"folder of a checkpoint or an artifact, or hub id ({MODEL})"
    )
    parser.add_argument("--exporter", choices=EXPORTERS, default="graph", help="who would export it (graph)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(arguments)
