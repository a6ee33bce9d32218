"""`python -m export`: export a checkpoint to an fp32 ONNX artifact in artifacts/<model>/fp32."""

from __future__ import annotations

import argparse
import dataclasses
import gc
from pathlib import Path

from cuantiza.core.errors import UserError, run
from cuantiza.core.inputs.checkpoints import Model, checkpoint_digest, resolve_model
from cuantiza.core.machine.progress import report
from cuantiza.core.store import artifact, digests, folders

NAME = "fp32"
EXPORTERS = ("graph", "optimum")
# The quantizers use ReduceMax with its axes as an input, which exists from opset 18 on. onnxruntime runs up to 24.
OPSETS = range(18, 25)
_LIBRARIES = ("numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "tokenizers", "torch", "transformers")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m export", description=__doc__)
    parser.add_argument("--model", default="models/es-mini", help="folder, or hub id with an optional @revision")
    parser.add_argument(
        "--exporter",
        choices=EXPORTERS,
        default="graph",
        help="graph: this project's own graph of GPT-2; optimum: other causal language models, by optimum's exporter",
    )
    parser.add_argument(
        "--opset", type=int, default=21, help=f"ONNX operator set, {OPSETS[0]} to {OPSETS[-1]} (default 21)"
    )
    parser.add_argument("--output", type=Path, default=Path("artifacts"), help="folder of the artifacts")
    args = parser.parse_args()
    if args.opset not in OPSETS:
        raise UserError(f"--opset {args.opset}: choose one from {OPSETS[0]} to {OPSETS[-1]}")
    model = resolve_model(args.model)
    folder = args.output / model.name
    target = folder / NAME
    with folders.locked(folder):
        inputs = _inputs(model.folder, args.exporter, args.opset)
        reason = artifact.rebuild_reason(target, inputs)
        if reason is None:
            report(f"export    {target}: up to date")
            return 0
        report(f"export    {target}: {reason}")
        _export(model, target, args.exporter, args.opset, inputs)
    return 0


def _inputs(checkpoint: Path, exporter: str, opset: int) -> dict:
    """Collect everything that the bytes of the artifact depend on."""
    roots = (
        "cuantiza.export.gpt2",
        "cuantiza.export.weights",
        "cuantiza.export.gpt2_config",
        "cuantiza.export.companions",
        "cuantiza.export.parity",
        "cuantiza.core.onnx.file",
    )
    pins = Path(__file__).parent.parent / "setup" / "optimum.txt"
    return {
        "checkpoint": checkpoint_digest(checkpoint),
        "exporter": exporter if exporter == "graph" else f"{exporter} {digests.sha256_file(pins)}",
        "opset": opset,
        "code": digests.code_digest(*roots, *(["cuantiza.export.optimum"] if exporter == "optimum" else [])),
        "versions": digests.versions(*_LIBRARIES),
    }


def _export(model: Model, target: Path, exporter: str, opset: int, inputs: dict) -> None:
    # These imports are slow, and a run that finds everything up to date does not need them.
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
                    f"{path}: model_type is {fields['model_type']!r}, and the default exporter knows gpt2 only; EXPORTER=optimum exports llama, mistral, opt, qwen2 and others"
                )
            config = parse_config(fields, path)
            positions = config.n_positions
            write_tokenizer(model.folder, work, config.vocab_size)
            graph = build(config, read_weights(model.folder), opset, model.folder)
            onnx_file.save(graph, work)
            del graph
            # Reference cycles would keep the graph in memory, and with it a whole checkpoint of torch's legacy format.
            gc.collect()
        write_configs(fields, model.folder, work)
        parity = check_parity(model.folder, work, positions)
        report(
            f"parity    max |Δ logit| {parity.whole:.1e} whole, {parity.cached:.1e} cached, "
            f"{parity.padded:.1e} padded batch, {parity.padded_cached:.1e} padded batch cached"
        )
        artifact.publish(
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


if __name__ == "__main__":
    run(main)
