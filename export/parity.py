"""Check parity: compare the logits of the exported graph in ONNX Runtime with PyTorch's, on real Spanish text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.model_config import start_token
from cuantiza.core.inputs.tokenizer import load_tokenizer, token_ids
from cuantiza.core.machine.process import isolated
from cuantiza.core.run.runtime import Runtime

ATOL, RTOL = 1e-4, 1e-5
TOKENS = 96

TEXT = """\
Al caer la tarde, el ferry dejó en el muelle a una docena de viajeros con las maletas mojadas. Ninguno
conocía la isla, y todos preguntaban lo mismo: «¿Dónde queda la pensión de doña Eulalia?». El guardián del
faro, que había bajado por pan, les señaló una casa amarilla junto a la higuera. ¡Qué alivio encontrar la
lumbre encendida! Mientras se secaban los abrigos, la dueña contó que en 1987 un temporal había cortado la
luz durante nueve días, y que desde entonces guardaba velas, galletas y una baraja en cada habitación. Nadie
se acostó temprano. Afuera, el viento seguía buscando una rendija por la que entrar.
"""


@dataclass(frozen=True)
class Parity:
    """The largest |difference| of logits in each case. All are within `atol` + `rtol` · |PyTorch's logit|."""

    whole: float
    cached: float
    padded: float
    padded_cached: float
    atol: float = ATOL
    rtol: float = RTOL


def check_parity(checkpoint: Path, work: Path, positions: int) -> Parity:
    """Compare `work`/model.onnx with the PyTorch model of `checkpoint`, on windows of at most `positions` tokens.

    There are two inputs: one text, and a batch of 3 texts of different lengths with padding on the left. Each goes
    through the graph in one pass, and then token by token with the KV cache. Raises UserError where a difference is
    beyond the tolerance.
    """
    ids = _ids(work)
    row = np.asarray([start_token(work), *ids][: min(TOKENS, positions)], np.int64)[None]  # [1, T]
    lengths = [row.shape[1], max(1, row.shape[1] // 2), max(1, row.shape[1] // 5)]
    mask = np.stack([np.arange(row.shape[1]) >= row.shape[1] - length for length in lengths]).astype(np.int64)
    batch = np.stack([np.concatenate([np.zeros(row.shape[1] - n, np.int64), row[0, :n]]) for n in lengths]) * mask

    # Each model runs in a process of its own, so that the two are never in memory together.
    whole, padded = isolated(_pytorch_logits, checkpoint, row, batch, mask, label="parity, PyTorch")
    our_whole, our_cached, our_padded, our_padded_cached = isolated(
        _onnx_logits, work / "model.onnx", row, batch, mask, label="parity, ONNX Runtime"
    )
    real = mask.astype(bool)
    cases = {
        "whole": (our_whole, whole),
        "cached": (our_cached, whole),
        "padded": (our_padded[real], padded[real]),
        "padded_cached": (our_padded_cached[real], padded[real]),
    }
    for name, (ours, theirs) in cases.items():
        if not np.allclose(ours, theirs, rtol=RTOL, atol=ATOL):
            raise UserError(
                f"{checkpoint}: the exported graph differs from PyTorch by {np.abs(ours - theirs).max():.2g} ({name}), "
                f"more than {ATOL} + {RTOL} · |logit|, so it is not published; please report this with the config.json"
            )
    return Parity(**{name: float(f"{np.abs(ours - theirs).max():.2g}") for name, (ours, theirs) in cases.items()})


def _ids(work: Path) -> list[int]:
    """Token ids of TEXT; of words from all over the vocabulary, where that has no token for a word of TEXT."""
    tokenizer = load_tokenizer(work)
    try:
        return token_ids(tokenizer, " ".join(TEXT.split()))
    except UserError:
        known = sorted(tokenizer.get_vocab().values())
        return known[:: max(1, len(known) // TOKENS)]


def _onnx_logits(model: Path, row: np.ndarray, batch: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, ...]:
    """Compute logits with ONNX Runtime, in one pass and with the KV cache: for row [1, T], then for batch [3, T]."""
    runtime = Runtime(model, prepack=False)  # prepacking would hold a second copy of a big model in memory

    def cached(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        past, steps = runtime.empty_past(len(ids)), []
        for t in range(ids.shape[1]):
            logits, past = runtime.extend(ids[:, t : t + 1], past, mask[:, : t + 1])
            steps.append(logits)
        return np.concatenate(steps, axis=1)

    return runtime.forward(row), cached(row, np.ones_like(row)), runtime.forward(batch, mask), cached(batch, mask)


def _pytorch_logits(
    checkpoint: Path, row: np.ndarray, batch: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compute logits with PyTorch in fp32: for row [1, T], and for batch [3, T] with its padding mask."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager", local_files_only=True, trust_remote_code=False
        ).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{checkpoint}: transformers cannot load it ({error}), so the graph cannot be compared with PyTorch; "
            "take the files of the original checkpoint"
        ) from None

    def logits(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        with torch.inference_mode():
            return model(**{name: torch.from_numpy(array) for name, array in inputs.items()}).logits.numpy()

    return logits(row, np.ones_like(row)), logits(batch, mask)
