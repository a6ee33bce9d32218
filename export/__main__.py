"""`python -m export`: checkpoint -> fp32 artifact in artifacts/<model>/fp32."""

from __future__ import annotations

import argparse
import dataclasses
import gc
from pathlib import Path

from core import artifact
from core.errors import UserError, run
from core.hub import CONFIGS, TOKENIZER, Model, resolve_model, weight_files
from core.progress import report

NAME = "fp32"
EXPORTERS = ("graph", "optimum")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m export", description=__doc__)
    parser.add_argument("--model", default="models/es-mini", help="folder, or hub id with an optional @revision")
    parser.add_argument(
        "--exporter",
        choices=EXPORTERS,
        default="graph",
        help="graph: GPT-2, authored here; optimum: other causal language models",
    )
    parser.add_argument("--opset", type=int, default=21, help="ONNX operator set, 18 to 24 (default 21)")
    parser.add_argument("--output", type=Path, default=Path("artifacts"), help="folder of the artifacts")
    args = parser.parse_args()
    if not 18 <= args.opset <= 24:
        raise UserError(f"--opset {args.opset}: choose one from 18 to 24")
    model = resolve_model(args.model)
    folder = args.output / model.name
    target = folder / NAME
    with artifact.locked(folder):
        inputs = _inputs(model.folder, args.exporter, args.opset)
        reason = artifact.rebuild_reason(target, inputs)
        if reason is None:
            report(f"export    {target}: up to date")
            return 0
        report(f"export    {target}: {reason}")
        _export(model, target, args.exporter, args.opset, inputs)
    return 0


def _inputs(checkpoint: Path, exporter: str, opset: int) -> dict:
    """All that the bytes of the artifact depend on."""
    names = [*CONFIGS, *TOKENIZER, *weight_files({file.name for file in checkpoint.iterdir()})]
    pins = Path(__file__).parent.parent / "pins" / "optimum.txt"
    return {
        "checkpoint": artifact.digest(
            {name: artifact.sha256_file(checkpoint / name) for name in names if (checkpoint / name).is_file()}
        ),
        "exporter": exporter if exporter == "graph" else f"{exporter} {artifact.sha256_file(pins)}",
        "opset": opset,
        "code": artifact.code_digest("core", "export"),
        "versions": artifact.versions("onnx-ir", "onnxscript", "tokenizers", "transformers"),
    }


def _export(model: Model, target: Path, exporter: str, opset: int, inputs: dict) -> None:
    # Imported here: a run that finds everything up to date has no need of them.
    from core import onnx_file
    from export.checkpoint import read_weights
    from export.config import parse_config, read_config
    from export.graph import build
    from export.parity import check_parity
    from export.tokenizer import write_configs, write_tokenizer

    path = model.folder / "config.json"
    fields = read_config(model.folder)
    with artifact.staging(target) as work:
        if exporter == "optimum":
            from export.optimum_export import export_optimum, max_positions

            write_tokenizer(model.folder, work, fields.get("vocab_size", 0))
            positions = max_positions(fields)
            export_optimum(model.folder, fields, work, opset)
        else:
            if fields.get("model_type", "gpt2") != "gpt2":
                raise UserError(
                    f"{path}: is a {fields['model_type']!r}, and only gpt2 is authored here; --exporter optimum (EXPORTER=optimum) exports other models"
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
            f"parity    max |Δ logit| {parity.whole:.1e} whole, {parity.cached:.1e} cached, {parity.padded_batch:.1e} padded batch"
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
            versions=artifact.versions("onnx", "onnx-ir", "onnxscript", "onnxruntime", "torch", "transformers"),
            details={"parity": dataclasses.asdict(parity)},
        )


if __name__ == "__main__":
    run(main)
