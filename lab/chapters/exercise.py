"""Runs the course exercise's `quantize_dynamic` call once, and counts which modules of the model it quantizes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Kind:
    """The modules of one class that hold a weight: their number, their parameters, and how many the call replaced.

    A weight that two modules share (the embedding and the tied head) counts in both.
    """

    kind: str
    modules: int
    parameters: int
    quantized: int


def modules_by_kind(checkpoint: Path) -> list[Kind]:
    """Count the checkpoint's PyTorch modules by class, before and after `quantize_dynamic(model, {Linear, LayerNorm})`.

    Raises OSError or ValueError if transformers cannot load the folder.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()
    with_weights = {
        name: module for name, module in model.named_modules() if getattr(module, "weight", None) is not None
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.quantization.quantize_dynamic(model, {torch.nn.Linear, torch.nn.LayerNorm}, dtype=torch.qint8)
    after = dict(quantized.named_modules())
    kinds: dict[str, list[tuple[int, bool]]] = {}
    for name, module in with_weights.items():
        parameters = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        replaced = type(after[name]).__module__.startswith("torch.ao.nn.quantized")
        kinds.setdefault(type(module).__name__, []).append((parameters, replaced))
    return [
        Kind(kind, len(found), sum(count for count, _ in found), sum(replaced for _, replaced in found))
        for kind, found in sorted(kinds.items(), key=lambda item: -len(item[1]))
    ]
