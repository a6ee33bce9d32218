"""The steps of all recipes but ONNX Runtime's own tools: load the fp32 graph, rewrite it, fuse attention, save it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

import onnx_ir as ir

from cuantiza.core import contract
from cuantiza.core.inputs.model_config import max_positions, read_config
from cuantiza.core.onnx import file as onnx_file
from cuantiza.core.onnx.genai_config import GENAI_CONFIG, genai_config, tokenizer_warning
from cuantiza.core.store import artifact
from cuantiza.quantize.rewrite.edit import clean, join_matmuls
from cuantiza.quantize.rewrite.fuse_attention import check_attention, fuse_attention, not_fusable
from cuantiza.quantize.settings import Target


def write_graph(parent: Path, work: Path, target: Target, rewrite: Callable[[ir.Model], dict]) -> dict:
    """Write work/model.onnx: the graph of the fp32 artifact `parent`, after `rewrite` changed it in place.

    Returns `details` for the manifest: those that `rewrite` returned, and those of `save_graph`. Raises UserError as
    `load_graph` does.
    """
    model = load_graph(parent, target)
    return rewrite(model) | save_graph(model, parent, work, target)


def stored_bytes(folder: Path) -> int:
    """The bytes of the ONNX file of the artifact in `folder`, with those of its external data."""
    files = (folder / artifact.MODEL, folder / onnx_file.DATA)
    return sum(path.stat().st_size for path in files if path.is_file())


def load_graph(parent: Path, target: Target) -> ir.Model:
    """Load the graph of the fp32 artifact `parent`.

    Raises UserError if the target is "ort" and the graph's attention is not the one that export/graphs writes.
    """
    path = parent / artifact.MODEL
    model = onnx_file.load(path)
    if target == "ort":
        check_attention(model, path)
    return model


def save_graph(model: ir.Model, parent: Path, work: Path, target: Target) -> dict:
    """Write work/model.onnx: the rewritten graph `model` of the fp32 artifact `parent`.

    Attention is fused for the `target` "ort" only, where ONNX Runtime can. Returns `details` for the manifest: the number
    of layers with fused attention, and "warnings": attention that stays as it was, and a tokenizer that onnxruntime-genai
    misreads.
    """
    details: dict = {}
    if target == "ort":
        join_matmuls(model.graph)
        kept = not_fusable(model)
        if kept:
            clean(model)  # as fuse_attention does: a joined matmul may have several nodes of one name
        details["fused_attention"] = 0 if kept else fuse_attention(model, max_positions(read_config(parent)))
        warnings = [*([kept] if kept else []), *_write_genai_config(model, parent, work)]
        if warnings:
            details["warnings"] = warnings
    onnx_file.save(model, work)
    return details


def _write_genai_config(model: ir.Model, parent: Path, work: Path) -> list[str]:
    """Write genai_config.json, so that onnxruntime-genai can load the graph and knows how to give it its KV cache.

    Returns warnings.
    """
    graph = model.graph
    keys = [value for value in graph.inputs if contract.is_past(value.name) and value.name.endswith(".key")]
    config = read_config(parent)
    fields = genai_config(
        config,
        json.loads((parent / "generation_config.json").read_text(encoding="utf-8")),
        layers=len(keys),
        heads=cast("int", keys[0].shape[1]),
        head_dim=cast("int", keys[0].shape[3]),
        vocabulary=cast("int", graph.outputs[0].shape[-1]),
        positions=max_positions(config),
        in_place=contract.IN_PLACE in model.metadata_props,
    )
    (work / GENAI_CONFIG).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    warning = tokenizer_warning(json.loads((parent / "tokenizer.json").read_text(encoding="utf-8")))
    return [warning] if warning else []
