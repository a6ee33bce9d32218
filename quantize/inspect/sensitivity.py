"""Measure the effect of quantizing each linear layer alone, on calibration windows; choose which to keep in float."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from cuantiza.core.contract import LOGITS
from cuantiza.core.errors import UserError
from cuantiza.core.machine.progress import report, track
from cuantiza.core.onnx import file as onnx_file
from cuantiza.core.run.divergence import compare
from cuantiza.core.run.runtime import Runtime
from cuantiza.quantize.decide.blocks import Block, cut, open_part, split
from cuantiza.quantize.decide.decision import Decision, Rewrite
from cuantiza.quantize.rewrite.find import find_embeddings

# Only every other calibration window is measured: 8 of int8's 16 windows, which is 4,096 tokens.
EVERY = 2
# To put the linear layers into an order, fewer of these windows do.
_RANKED = 2


@dataclass(frozen=True)
class Effect:
    """Mean KL(fp32 ‖ quantized) and rise of ln perplexity, in nats per token. The standard error is over windows."""

    kl_divergence: float
    delta_ln_ppl: float
    delta_ln_ppl_stderr: float | None


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
        session = Runtime(baseline, exact=False)
        self._logits: np.ndarray | None = None
        for index, window in enumerate(track(windows, "baseline", len(windows))):
            logits = session.forward(window[None])[0]
            if self._logits is None:
                shape = (len(windows), *logits.shape)
                self._logits = np.lib.format.open_memmap(work / "baseline.npy", "w+", np.float32, shape)
            self._logits[index] = logits

    def first(self, count: int) -> Gauge:
        """The same on the first `count` windows."""
        found = copy.copy(self)
        found._windows = self._windows[:count]
        return found

    def effect(self, model: ir.Model, decisions: Any, rewrite: Callable[[ir.Model, Any], object]) -> Effect:
        """Measure `model` with what `rewrite` quantizes by `decisions`, and all else in floating point."""
        whole = model.clone()
        rewrite(whole, decisions)
        onnx_file.save(whole, self._work)
        del whole
        session = Runtime(self._work / "model.onnx", exact=False)
        return self._effect(session.forward(window[None])[0] for window in self._windows)

    def alone(
        self,
        model: ir.Model,
        weights: Mapping[str, Any],
        rewrite: Callable[[ir.Model, Any], object],
        embedded: ir.Model | None = None,
    ) -> Iterator[tuple[str, Effect]]:
        """Measure `model` with each of `weights` quantized alone; yield (its name, its effect).

        The names are those of matrices or of linear layers, whichever `rewrite` expects. What comes before one of them
        computes what it does in `model`. So where a single block of the graph reads it, only that block is rewritten. It
        starts from its value in `model`, and the blocks after it, which are loaded once for all that a block reads, go
        on as in `model`. For the matrices of embeddings the whole graph is rewritten.

        If `rewrite` quantizes embeddings without any decision, `embedded` is `model` after that. Then the whole graph is
        rewritten for the first block too, as the block alone does not show what an embedding shares with the head, and
        the other blocks start from what `embedded` computes.
        """
        blocks = split(model.graph)
        tables = {embedding.table.name for embedding in find_embeddings(model.graph)}
        readers: dict[str | None, list[Block]] = {}
        for block in blocks if embedded is None else blocks[1:]:
            own = [projection for projection in block.projections if projection.weight.name not in tables]
            for name in {name for projection in own for name in (projection.name, projection.weight.name)}:
                readers.setdefault(name, []).append(block)
        inside = {name: readers[name][0] for name in weights if len(readers.get(name, [])) == 1}
        for name in weights:
            if name not in inside:
                yield name, self.effect(model, {name: weights[name]}, rewrite)
        starts: list[np.ndarray | None] = [None] * len(self._windows)
        *before, last = blocks
        head = open_part(cut(model, last.start, [LOGITS]), self._work)
        for block in blocks:
            here = cut(model, block.start, [LOGITS if block is last else block.end or LOGITS])
            after = [] if block is last else [head]
            if block in before[:-1] and last.start is not None:
                after = [open_part(cut(model, block.end, [last.start]), self._work), head]
            for name in (name for name, reader in inside.items() if reader is block):
                part = here.clone()
                rewrite(part, {name: weights[name]})
                steps = [open_part(part, self._work), *after]
                yield name, self._effect(_through(steps, *both)[0] for both in zip(self._windows, starts, strict=True))
            if block is not last:
                if embedded is not None and block is blocks[0]:
                    here = cut(embedded, block.start, [block.end or LOGITS])
                run = open_part(here, self._work)
                starts = [_through([run], *both) for both in zip(self._windows, starts, strict=True)]

    def _effect(self, found: Iterable[np.ndarray]) -> Effect:
        """Compare the logits [T, V] that were `found` for each window with those of the baseline."""
        divergence, rise = [], []
        assert self._logits is not None  # there is at least one window
        for window, reference, logits in zip(self._windows, self._logits[: len(self._windows)], found, strict=True):
            (before,), (after, kl, _) = compare(np.asarray(reference[:-1]), [logits[:-1]], window[1:])
            divergence.append(kl.mean())
            rise.append((after - before).mean())
        stderr = float(np.std(rise, ddof=1)) / math.sqrt(len(rise)) if len(rise) > 1 else None
        return Effect(float(np.mean(divergence)), float(np.mean(rise)), stderr)


def _through(steps: Sequence[Callable], ids: np.ndarray, value: np.ndarray | None) -> np.ndarray:
    """Run parts of a model, each of which starts from the only output of the one before."""
    for step in steps:
        (value,) = step(ids, value)
    assert value is not None  # there is at least one step
    return value


def rank(model: ir.Model, decisions: dict[str, Decision], rewrite: Rewrite, gauge: Gauge) -> dict[str, Effect]:
    """Measure the effect of each decision alone; return the effects by layer name, the largest KL first.

    Each contains the effect of the embeddings, which `rewrite` quantizes without any decision.
    """
    embedded = model.clone()
    rewrite(embedded, {})
    effects = dict(track(gauge.alone(model, decisions, rewrite, embedded), "sensitivity", len(decisions)))
    return dict(sorted(effects.items(), key=lambda item: -item[1].kl_divergence))


def within_budget(
    model: ir.Model, decisions: dict[str, Decision], rewrite: Rewrite, gauge: Gauge, budget: float
) -> tuple[dict[str, Effect], Effect]:
    """Choose the linear layers that stay in float, so that ln perplexity rises by at most `budget` nats per token.

    They are those of the largest KL, which is measured on few windows. Their number doubles until the budget is kept;
    then a search by halves reduces it. The search takes it that one more layer in float never raises perplexity, so an
    even smaller number may keep the budget too. If the budget is met with all layers quantized, nothing is ranked. If it is not met with all of them in
    float, they stay so. Returns (the chosen layers with the effect that each had alone, the effect of quantizing the
    others).
    """
    effect = gauge.effect(model, decisions, rewrite)
    if effect.delta_ln_ppl <= budget:
        return {}, effect
    ranked = rank(model, decisions, rewrite, gauge.first(_RANKED))
    order = list(ranked)

    def without(count: int) -> Effect:
        found = gauge.effect(model, {name: decisions[name] for name in order[count:]}, rewrite)
        report(f"mixed     {count} of {len(order)} layers in float: Δ ln ppl {found.delta_ln_ppl:.4f}")
        return found

    low, high = 0, 1
    while (effect := without(high)).delta_ln_ppl > budget:
        if high == len(order):
            return ranked, effect
        low, high = high, min(2 * high, len(order))
    while high - low > 1:
        middle = (low + high) // 2
        if (found := without(middle)).delta_ln_ppl <= budget:
            high, effect = middle, found
        else:
            low = middle
    return {name: ranked[name] for name in order[:high]}, effect
