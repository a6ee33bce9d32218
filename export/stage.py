"""The export stage: is the artifact up to date? If not, build the graph, check it against PyTorch and publish it."""

from __future__ import annotations

import dataclasses
import gc
import os
from pathlib import Path

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.checkpoints import Model, checkpoint_digest, resolve_model
from cuantiza.core.inputs.defaults import ARTIFACTS, MODEL
from cuantiza.core.machine.progress import report
from cuantiza.core.store import artifact, digests, folders
from cuantiza.core.store.artifact import Artifact

NAME = "fp32"
EXPORTERS = ("graph", "optimum")
# ReduceMax takes its axes as an input from opset 18 on, which the quantizers use; 24 is the last that onnxruntime runs.
OPSETS = range(18, 25)
_LIBRARIES = ("numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "tokenizers", "torch", "transformers")
_PINS = Path(__file__).resolve().parents[1] / "setup" / "optimum.txt"


def export(
    model: str | Path = MODEL, output: Path = ARTIFACTS, *, exporter: str = "graph", opset: int = 21
) -> Artifact:
    """Export a checkpoint to `output`/<model>/fp32, unless that artifact is there and up to date.

    `model` is a folder, or a hub id with an optional `@revision`. `exporter` "graph" writes GPT-2's own graph; "optimum"
    runs optimum-onnx in the interpreter `OPTIMUM_PYTHON`, for other causal language models. The fp32 logits are compared
    with PyTorch's (whole, with a KV cache, padded) before anything is published.

    Raises UserError where the checkpoint cannot be had or read, an option is none of EXPORTERS or OPSETS, or the logits
    differ from PyTorch's.
    """
    if exporter not in EXPORTERS:
        raise UserError(f"--exporter {exporter}: choose one from {', '.join(EXPORTERS)}")
    if opset not in OPSETS:
        raise UserError(f"--opset {opset}: choose one from {OPSETS[0]} to {OPSETS[-1]}")
    found = resolve_model(str(model))
    folder = Path(output) / found.name
    target = folder / NAME
    with folders.locked(folder):
        inputs = _inputs(found.folder, exporter, opset)
        reason = artifact.rebuild_reason(target, inputs)
        if reason is None:
            report(f"export    {target}: up to date")
            return artifact.open_artifact(target)
        report(f"export    {target}: {reason}")
        return _export(found, target, exporter, opset, inputs)


def _inputs(checkpoint: Path, exporter: str, opset: int) -> dict:
    """Everything that the bytes of the artifact depend on."""
    roots = (
        "cuantiza.export.gpt2",
        "cuantiza.export.weights",
        "cuantiza.export.gpt2_config",
        "cuantiza.export.companions",
        "cuantiza.export.parity",
        "cuantiza.core.onnx.file",
    )
    return {
        "checkpoint": checkpoint_digest(checkpoint),
        "exporter": exporter if exporter == "graph" else f"{exporter} {_optimum_environment()}",
        "opset": opset,
        "code": digests.code_digest(*roots, *(["cuantiza.export.optimum"] if exporter == "optimum" else [])),
        "versions": digests.versions(*_LIBRARIES),
    }


def _optimum_environment() -> str:
    """What identifies optimum's environment: its pins in a checkout, else the interpreter that the user names."""
    return digests.sha256_file(_PINS) if _PINS.is_file() else os.environ.get("OPTIMUM_PYTHON", "none")


def _export(model: Model, target: Path, exporter: str, opset: int, inputs: dict) -> Artifact:
    # Imported here: a run that finds everything up to date does not need torch and the rest.
    from cuantiza.core.inputs.model_config import max_positions, read_config
    from cuantiza.core.onnx import file as onnx_file
    from cuantiza.export.companions import write_configs, write_tokenizer
    from cuantiza.export.gpt2 import build
    from cuantiza.export.gpt2_config import parse_config
    from cuantiza.export.parity import check_parity
    from cuantiza.export.weights import read_weights

    path = model.folder / "config.json"
    fields = read_config(model.folder)
    with folders.staging(target) as work:
        if exporter == "optimum":
            from cuantiza.export.optimum import export_optimum

            export_optimum(model.folder, fields, work, opset)
            vocabulary, positions = fields.get("vocab_size"), max_positions(fields)
            if not isinstance(vocabulary, int):
                raise UserError(f"{path}: vocab_size is {vocabulary!r} where a whole number is needed")
            write_tokenizer(model.folder, work, vocabulary)
        else:
            if fields.get("model_type", "gpt2") != "gpt2":
                raise UserError(
                    f"{path}: is a {fields['model_type']!r}, and only gpt2 is authored here; EXPORTER=optimum exports llama, mistral, opt, qwen2 and others"
                )
            config = parse_config(fields, path)
            positions = config.n_positions
            write_tokenizer(model.folder, work, config.vocab_size)
            graph = build(config, read_weights(model.folder), opset, model.folder)
            onnx_file.save(graph, work)
            del graph
            gc.collect()  # the graph is full of cycles, and holds a checkpoint in torch's legacy format whole
        write_configs(fields, model.folder, work)
        parity = check_parity(model.folder, work, positions)
        report(
            f"parity    max |Δ logit| {parity.whole:.1e} whole, {parity.cached:.1e} cached, "
            f"{parity.padded:.1e} padded batch, {parity.padded_cached:.1e} padded batch cached"
        )
        return artifact.publish(
            work,
            target,
            name=NAME,
            model=model.name,
            recipe={"type": "fp32", "exporter": exporter, "opset": opset},
            inputs=inputs,
            parent=None,
            calibration=None,
            versions=inputs["versions"],
            details={"parity": dataclasses.asdict(parity)},
        )
