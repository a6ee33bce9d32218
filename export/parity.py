"""Check parity: compare the logits of the exported graph in ONNX Runtime with PyTorch's, on real Spanish text."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.model_config import start_token
from cuantiza.core.inputs.tokenizer import load_tokenizer, token_ids
from cuantiza.core.inputs.weights.pytorch import pytorch_loader
from cuantiza.core.machine.process import isolated
from cuantiza.core.run.runtime import Runtime

# A logit is a sum of as many terms as the model is wide, so its fp32 rounding grows with the size of these terms, not
# with what is left of their sum: a logit near 0 of a token whose largest is 1,000 is as uncertain as that one. Measured
# on tiny models with logits up to 8e6, the rounding is at most 4e-6 of the token's largest logit; an epsilon of 1e-6 in
# place of 1e-5, or gelu in place of gelu_new, changes some logit by 2e-4 of it.
ATOL, RTOL = 1e-4, 1e-5
TOKENS = 96
# With the KV cache, so many tokens at both ends go through the graph one by one, and others in pieces of so many.
_ALONE, _PIECE = 12, 16

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
    """The largest |difference| of logits in each case, and the largest |logit| of PyTorch, for their scale.

    Each difference is within `atol` + `rtol` · the largest of PyTorch's |logits| of the same token.
    """

    whole: float
    cached: float
    padded: float
    padded_cached: float
    largest_logit: float
    atol: float = ATOL
    rtol: float = RTOL


def check_parity(checkpoint: Path, work: Path, positions: int) -> Parity:
    """Compare `work`/model.onnx with the PyTorch model of `checkpoint`, on windows of at most `positions` tokens.

    There are two inputs: one text, and a batch of 3 texts of different lengths with padding on the left. Each goes
    through the graph in one pass, and then in pieces with the KV cache: the first and the last tokens one by one, those
    between them several at a time. Raises UserError where a difference is beyond the tolerance.
    """
    ids = _ids(work)
    row = np.asarray([start_token(work), *ids][: min(TOKENS, positions)], np.int64)[None]  # [1, T]
    lengths = [row.shape[1], max(1, row.shape[1] // 2), max(1, row.shape[1] // 5)]
    mask = np.stack([np.arange(row.shape[1]) >= row.shape[1] - length for length in lengths]).astype(np.int64)
    batch = np.stack([np.concatenate([np.zeros(row.shape[1] - n, np.int64), row[0, :n]]) for n in lengths]) * mask

    # Each model runs in a process of its own, so that the two are never in memory together.
    whole, padded = isolated(_pytorch_logits, checkpoint, work, row, batch, mask, label="parity, PyTorch")
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
    if not all(np.isfinite(theirs).all() for _, theirs in cases.values()):
        raise UserError(
            f"{checkpoint}: PyTorch's own logits are infinite or not a number, so this model predicts nothing and is not "
            "published; take the weights of the original checkpoint"
        )
    for name, (ours, theirs) in cases.items():
        if (beyond := _beyond(ours, theirs)) is not None:
            raise UserError(
                f"{checkpoint}: the exported graph differs from PyTorch by {beyond:.2g} ({name}), "
                f"more than {ATOL} + {RTOL} · the token's largest |logit|, so it is not published; please report this with "
                "the config.json"
            )
    differences = {name: np.abs(ours - theirs).max() for name, (ours, theirs) in cases.items()}
    largest = max(np.abs(theirs).max() for _, theirs in cases.values())
    return Parity(**{name: float(f"{value:.2g}") for name, value in (differences | {"largest_logit": largest}).items()})


def _beyond(ours: np.ndarray, theirs: np.ndarray) -> float | None:
    """Return the largest |difference| of logits [.., V] among the tokens that are beyond the tolerance, if any is.

    NaN and infinity in `ours` are beyond it; `theirs` are finite.
    """
    difference = np.abs(ours - theirs).max(axis=-1)  # [..], NaN where one of V is
    beyond = difference[~(difference <= ATOL + RTOL * np.abs(theirs).max(axis=-1))]
    return float(beyond.max()) if beyond.size else None


def _ids(work: Path) -> list[int]:
    """Token ids of TEXT; of words from all over the vocabulary, where that has no token for a word of TEXT."""
    tokenizer = load_tokenizer(work)
    try:
        return token_ids(tokenizer, " ".join(TEXT.split()))
    except UserError:
        known = sorted(tokenizer.get_vocab().values())
        return known[:: max(1, len(known) // TOKENS)]


def _ends(count: int) -> list[int]:
    """Where the pieces of `count` tokens begin and end: of one token at both ends, of up to `_PIECE` between them."""
    ends = {end for end in range(count + 1) if end <= _ALONE or count - end <= _ALONE or end % _PIECE == 0}
    return sorted(ends)


def _onnx_logits(model: Path, row: np.ndarray, batch: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, ...]:
    """Compute logits with ONNX Runtime, in one pass and with the KV cache: for row [1, T], then for batch [3, T]."""
    runtime = Runtime(model, prepack=False)  # prepacking would hold a second copy of a big model in memory

    def cached(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        past, steps = runtime.empty_past(len(ids)), []
        for start, end in pairwise(_ends(ids.shape[1])):
            logits, past = runtime.extend(ids[:, start:end], past, mask[:, :end])
            steps.append(logits)
        return np.concatenate(steps, axis=1)

    return runtime.forward(row), cached(row, np.ones_like(row)), runtime.forward(batch, mask), cached(batch, mask)


def _pytorch_logits(
    checkpoint: Path, work: Path, row: np.ndarray, batch: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compute logits with PyTorch in fp32: for row [1, T], and for batch [3, T] with its padding mask.

    The config.json is the artifact's, in `work`, because the checkpoint's may be one that transformers does not load.
    """
    # On Intel's processors MKL's sums depend on where an array lies in memory, unless it is told to be strict: without it
    # the differences, which a manifest holds, change from run to run.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    import torch

    advice = ", so the graph cannot be compared with PyTorch; take the files of the original checkpoint"
    model = pytorch_loader(checkpoint, "eager", advice, config=work)()

    def logits(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        with torch.inference_mode():
            return model(**{name: torch.from_numpy(array) for name, array in inputs.items()}).logits.numpy()

    return logits(row, np.ones_like(row)), logits(batch, mask)
