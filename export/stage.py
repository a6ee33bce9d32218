"""The export stage: if the artifact is not up to date, build the graph, compare it with PyTorch and publish it."""

from __future__ import annotations

import dataclasses
import gc
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cuantiza.core.errors import UserError, naming
from cuantiza.core.inputs.checkpoints import Model, base_folder, checkpoint_digest, has_all_weights, resolve_model
from cuantiza.core.inputs.defaults import ARTIFACTS, MODEL, place
from cuantiza.core.machine.progress import report, warn, working
from cuantiza.core.store import artifact, digests, folders
from cuantiza.core.store.artifact import Artifact

NAME = "fp32"
EXPORTERS = ("graph", "optimum")
# The quantizers use ReduceMax with its axes as an input, which exists from opset 18 on. onnxruntime runs up to 24.
OPSETS = range(18, 25)
_LIBRARIES = ("numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "tokenizers", "torch", "transformers")
_PINS = Path(__file__).resolve().parents[1] / "setup" / "optimum.txt"


def export(
    model: str | Path = MODEL, output: Path = ARTIFACTS, *, exporter: str = "graph", opset: int = 21
) -> Artifact:
    """Export a checkpoint to `output`/<model>/fp32, unless that artifact is there and up to date.

    `model` is a folder, or a hub id with an optional `@revision`. The exporter "graph" writes this project's own graphs
    (export/graphs). The exporter "optimum" runs optimum-onnx in the interpreter `OPTIMUM_PYTHON`, for some other causal
    language models. The fp32 logits are compared with PyTorch's (in one pass, with a KV cache, and padded) before
    anything is published.

    Raises UserError where the checkpoint cannot be found or read, where an option is not one of EXPORTERS or OPSETS, or
    where the logits differ from PyTorch's.
    """
    if exporter not in EXPORTERS:
        raise UserError(f"--exporter {exporter}: choose one from {', '.join(EXPORTERS)}")
    if opset not in OPSETS:
        raise UserError(f"--opset {opset}: choose one from {OPSETS[0]} to {OPSETS[-1]}")
    found = _resolved(str(model), exporter)
    folder = Path(output) / found.name
    target = folder / NAME
    with folders.locked(folder), naming(found.folder.absolute(), model):  # a hub id's folder is deep in a cache
        inputs = _inputs(found.folder, exporter, opset, digests.sha256_known)
        there = artifact.up_to_date(target, inputs)
        if isinstance(there, Artifact):
            report(f"export    {target}: up to date")
            warn(there.manifest.details.get("warnings", []))
            return there
        report(f"export    {target}: {there}")
        inputs = _inputs(found.folder, exporter, opset, digests.sha256_once)
        return _export(found, target, exporter, opset, inputs)


def _resolved(spec: str, exporter: str) -> Model:
    """Find model `spec`. What its small files tell against an export is told before gigabytes are downloaded."""
    if not place(spec).is_dir():
        small = resolve_model(spec, weights=False)
        if not has_all_weights(base_folder(small.folder)):
            from cuantiza.export.examine import examine

            with tempfile.TemporaryDirectory() as work, naming(small.folder, spec):
                examine(small.folder, Path(work), exporter, weights=False)
    return resolve_model(spec)


def _inputs(checkpoint: Path, exporter: str, opset: int, sha256: Callable[[Path], str]) -> dict[str, Any]:
    """Collect everything that the bytes of the artifact depend on; `sha256` reads the files of `checkpoint`."""
    return {
        "checkpoint": checkpoint_digest(checkpoint, sha256),
        "exporter": exporter if exporter == "graph" else f"{exporter} {_optimum_environment()}",
        "opset": opset,
        "code": digests.code_digest(__name__),
        "versions": digests.versions(*_LIBRARIES),
    }


def _optimum_environment() -> str:
    """Identify optimum's environment: by its pins in a checkout, else by the interpreter that the user names."""
    return digests.sha256_file(_PINS) if _PINS.is_file() else os.environ.get("OPTIMUM_PYTHON", "none")


def _export(model: Model, target: Path, exporter: str, opset: int, inputs: dict[str, Any]) -> Artifact:
    # These imports are slow, and a run that finds everything up to date does not need them.
    from cuantiza.core.inputs.model_config import max_positions
    from cuantiza.core.onnx import file as onnx_file
    from cuantiza.export.examine import examine
    from cuantiza.export.parity import check_parity

    with folders.staging(target) as work:
        found = examine(model.folder, work, exporter, opset)
        positions, warnings = max_positions(found.fields), [*found.warnings]
        if found.graph is None:
            from cuantiza.export.optimum import export_optimum

            with working("optimum's exporter"):
                export_optimum(model.folder, found.tokens.put_into(found.fields), work, opset)
        else:
            with working("export    weights"):
                onnx_file.save(found.graph, work)
            del found
            # Reference cycles would keep the graph in memory, and with it a whole checkpoint of torch's legacy format.
            gc.collect()
        warn(warnings)
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
            details={"parity": dataclasses.asdict(parity)} | ({"warnings": warnings} if warnings else {}),
        )
