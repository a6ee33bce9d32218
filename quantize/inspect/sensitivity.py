"""Measure the effect of quantizing each linear layer alone, on calibration windows; choose which to keep in float."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from cuantiza.core.errors import UserError
from cuantiza.core.machine.progress import report, track
from cuantiza.core.onnx import file as onnx_file
from cuantiza.core.run.divergence import compare
from cuantiza.core.run.runtime import Runtime
from cuantiza.quantize.decide.decision import Decision, Rewrite

# Only every other calibration window is measured: 8 of int8's 16 windows, which is 4,096 tokens.
EVERY = 2


@dataclass(frozen=True)
class Effect:
    """Mean KL(fp32 ‖ quantized) and rise of ln perplexity, in nats per token. The standard error is over windows."""

    kl_divergence: float
    delta_ln_ppl: float
    delta_ln_ppl_stderr: float


@dataclass(frozen=True)
class Sensitivity:
    """The effects of quantizing each part of a model, on `windows` calibration windows of `tokens` tokens.

    `effects` has every linear layer quantized alone, the largest KL first. `tables` is the effect of the embeddings
    alone, which every other effect contains. `together` is the effect of all linear layers at once.
    """

    effects: dict[str, Effect]
    tables: Effect
    together: Effect
    windows: int
    tokens: int

    @property
    def text(self) -> str:
        return f"{self.windows} calibration windows of {self.tokens} tokens"


class Gauge:
    """Measures rewritten graphs against the graph `baseline`, on `windows` [n, T].

    The baseline's logits are computed once and kept in a memory-mapped file in the folder `work`. Raises UserError for
    windows of one token, in which no token is predicted.
    """

    def __init__(self, baseline: Path, windows: np.ndarray, work: Path) -> None:
        if windows.shape[1] < 2:
            raise UserError(
                f"{baseline}: takes one token at a time, so nothing follows in a window whose perplexity could be measured; "
                "take a recipe that measures nothing, such as int8-static"
            )
        self._windows, self._work = windows, work
        session = Runtime(baseline)
        self._logits: np.ndarray | None = None
        for index, window in enumerate(track(windows, "baseline", len(windows))):
            logits = session.forward(window[None])[0]
            if self._logits is None:
                shape = (len(windows), *logits.shape)
                self._logits = np.lib.format.open_memmap(work / "baseline.npy", "w+", np.float32, shape)
            self._logits[index] = logits

    def effect(self, model: ir.Model, decisions: Any, rewrite: Callable[[ir.Model, Any], object]) -> Effect:
        """Measure `model` with what `rewrite` quantizes by `decisions`, and all else in floating point."""
        copy = model.clone()
        rewrite(copy, decisions)
        onnx_file.save(copy, self._work)
        del copy
        session = Runtime(self._work / "model.onnx")
        divergence, rise = [], []
        assert self._logits is not None  # there is at least one window
        for window, reference in zip(self._windows, self._logits, strict=True):
            candidate = session.forward(window[None])[0, :-1]
            (before,), (after, kl, _) = compare(np.asarray(reference[:-1]), [candidate], window[1:])
            divergence.append(kl.mean())
            rise.append((after - before).mean())
        stderr = float(np.std(rise, ddof=1)) / math.sqrt(len(rise)) if len(rise) > 1 else math.nan
        return Effect(float(np.mean(divergence)), float(np.mean(rise)), stderr)


def rank(model: ir.Model, decisions: dict[str, Decision], rewrite: Rewrite, gauge: Gauge) -> dict[str, Effect]:
    """Measure the effect of each decision alone; return the effects by layer name, the largest KL first."""
    names = track(decisions, "sensitivity", len(decisions))
    effects = {name: gauge.effect(model, {name: decisions[name]}, rewrite) for name in names}
    return dict(sorted(effects.items(), key=lambda item: -item[1].kl_divergence))


def within_budget(
    model: ir.Model, decisions: dict[str, Decision], rewrite: Rewrite, gauge: Gauge, budget: float
) -> tuple[dict[str, Effect], Effect]:
    """Choose the linear layers that stay in float, so that ln perplexity rises by at most `budget` nats per token.

    Layers are taken in the order of their KL, the largest first, until the budget is met or none is left. If it is met
    with all layers quantized, nothing is ranked. Returns (the chosen layers with the effect that each had alone, the
    effect of quantizing the others).
    """
    effect = gauge.effect(model, decisions, rewrite)
    kept: dict[str, Effect] = {}
    ranked: list[tuple[str, Effect]] = []
    while effect.delta_ln_ppl > budget and len(kept) < len(decisions):
        ranked = ranked or list(rank(model, decisions, rewrite, gauge).items())
        name, alone = ranked[len(kept)]
        kept[name] = alone
        effect = gauge.effect(model, {n: decision for n, decision in decisions.items() if n not in kept}, rewrite)
        report(f"mixed     {name} stays in float: Δ ln ppl {effect.delta_ln_ppl:.4f}")
    return kept, effect
