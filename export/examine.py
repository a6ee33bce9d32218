"""Read all that an export needs of a checkpoint, and say what is wrong with it, before anything slow is done.

`cuantiza inspect` prints what is found here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from tokenizers import Tokenizer

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.checkpoints import base_folder, tokenizer_folder
from cuantiza.core.inputs.gpt2_config import canonical_fields, odd_fields
from cuantiza.core.inputs.model_types import check_model_type, own_code, refuse_other_formats
from cuantiza.core.inputs.special_tokens import SpecialTokens, resolve_special_tokens
from cuantiza.core.inputs.tokenizer import load_tokenizer
from cuantiza.core.inputs.weights.adapters import read_fields
from cuantiza.core.inputs.weights.checkpoint import Checkpoint
from cuantiza.core.inputs.weights.heads import left_out
from cuantiza.core.inputs.weights.quantized import check_not_quantized
from cuantiza.export.companions import write_configs
from cuantiza.export.graphs.architectures import Architecture, architecture
from cuantiza.export.tokenizer.write import write_tokenizer


@dataclass(frozen=True)
class Findings:
    """What a checkpoint is.

    `base` is the folder of its weights and config.json, whose canonical fields are `fields`. `architecture` says how
    `config` and `checkpoint` were read, of which `graph` is made; all four are None for the exporter "optimum", and the
    last two are where weights were not asked for. `warnings` are a sentence each.
    """

    base: Path
    fields: dict[str, Any]
    tokenizer: Tokenizer
    tokens: SpecialTokens
    architecture: Architecture | None
    config: Any
    checkpoint: Checkpoint | None
    graph: ir.Model | None
    warnings: tuple[str, ...]


def examine(folder: Path, work: Path, exporter: str, opset: int = 21, weights: bool = True) -> Findings:
    """Examine the checkpoint in `folder` for `exporter`, and write an artifact's tokenizer and configurations to `work`.

    No tensor is read but a head beside the embedding, and without `weights` no weight file is opened. Raises UserError
    where the checkpoint cannot be exported. Faults of its configuration, its tokenizer and its weights are told together.
    """
    base, tokenizer_files = base_folder(folder), tokenizer_folder(folder)  # others for an adapter alone
    refuse_other_formats(base)
    given = read_fields(folder)
    fields = canonical_fields(given)
    check_model_type(fields, base / "config.json", exporter)
    faults: list[str] = []
    kind = architecture(fields) if exporter == "graph" else None
    config, checkpoint, graph, tokenizer, tokens = None, None, None, None, None
    warnings = [*odd_fields(given), *own_code(fields)]
    with _kept(faults):
        if kind is not None:
            config = kind.parse(given, base / "config.json")
        else:
            from cuantiza.export.optimum import check_optimum

            check_optimum(fields, base / "config.json")
    if isinstance(vocabulary := fields.get("vocab_size"), int):
        with _kept(faults):
            warnings += write_tokenizer(tokenizer_files, work, vocabulary, fields)
            tokenizer = load_tokenizer(work)
            tokens = resolve_special_tokens(base, given, tokenizer, work, vocabulary)  # work's settings are complete
            warnings += tokens.warnings
            write_configs(fields, tokens, base, work)
    else:
        faults.append(f"{base / 'config.json'}: has no vocab_size; write the number of rows of the embedding there")
    if not weights:
        with _kept(faults):
            check_not_quantized(given, {}, base)
    if weights and kind is not None:
        with _kept(faults):
            checkpoint = kind.read(folder, given)
            warnings += checkpoint.warnings
    if kind is not None and config is not None and checkpoint is not None:
        with _kept(faults):  # sizes that contradict config.json
            graph = kind.build(config, checkpoint.weights, opset, folder)
            warnings += left_out(kind.left_over(config, checkpoint.weights))
    if faults or tokenizer is None or tokens is None:
        raise UserError("; ".join(faults))
    return Findings(base, fields, tokenizer, tokens, kind, config, checkpoint, graph, tuple(warnings))


@contextmanager
def _kept(faults: list[str]) -> Iterator[None]:
    """Keep the message of a UserError, and go on."""
    try:
        yield
    except UserError as error:
        faults.append(str(error))
