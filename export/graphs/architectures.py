"""Which of our graphs a model has: GPT-2's, that of models with layers of its kind, or that of Llama and its like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from cuantiza.core.inputs.gpt2_config import is_gpt2, parse_config
from cuantiza.core.inputs.weights.checkpoint import Checkpoint, read_by_names, read_checkpoint
from cuantiza.export.graphs import classic, classic_config, gpt2, llama, llama_config, llama_weights
from cuantiza.export.graphs.parts import Size


@dataclass(frozen=True)
class Architecture:
    """What an export calls for a model, in this order. All raise UserError for what they cannot take.

    parse: the fields of config.json, and its path, to a configuration
    read: the checkpoint in a folder, with the fields of its config.json
    build: a configuration, weights, the opset and the folder to a graph, whose weights are read when it is saved
    left_over: the names of weights that no graph of a configuration reads
    describe: a configuration in a line for users
    size: the number of parameters of a configuration
    """

    parse: Callable[[dict[str, Any], Path], Any]
    read: Callable[[Path, dict[str, Any]], Checkpoint]
    build: Callable[[Any, dict[str, Any], int, Path], ir.Model]
    left_over: Callable[[Any, dict[str, Any]], list[str]]
    describe: Callable[[Any], str]
    size: Callable[[Any], Size]


_GPT2 = Architecture(
    parse=parse_config,
    read=lambda folder, _: read_checkpoint(folder),  # which says itself what it leaves out
    build=gpt2.build,
    left_over=lambda config, weights: [],
    describe=gpt2.describe,
    size=gpt2.size,
)
_LLAMA = Architecture(
    parse=llama_config.parse_llama,
    read=lambda folder, fields: read_by_names(folder, fields, llama_weights.EMBEDDING),
    build=llama.build,
    left_over=llama_weights.left_over,
    describe=llama.describe,
    size=llama.size,
)
_CLASSIC = Architecture(
    parse=classic_config.parse_classic,
    read=classic.read,
    build=classic.build,
    left_over=classic.left_over,
    describe=classic.describe,
    size=classic.size,
)
ARCHITECTURES = (
    {"gpt2": _GPT2} | dict.fromkeys(llama_config.FAMILIES, _LLAMA) | dict.fromkeys(classic_config.FAMILIES, _CLASSIC)
)


def architecture(fields: dict[str, Any]) -> Architecture:
    """That of the model whose config.json is `fields`, which `check_model_type` took for the exporter "graph"."""
    return _GPT2 if is_gpt2(fields) else ARCHITECTURES[fields["model_type"]]
