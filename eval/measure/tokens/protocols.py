"""The protocols of papers, by name: which windows of the text they score, and a model's perplexity on these.

They compare with published figures, and are measured where `--protocols` asks for them; the report's own protocol and
llama.cpp's always are. The text is one stream of tokens, so a figure is the published one's equal only for a text that
is joined as theirs was (`CORPUS_JOIN=1`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cuantiza.core.machine.progress import track
from cuantiza.eval.measure.estimates import Estimate, mean_per_token, perplexity
from cuantiza.eval.measure.score import Deferred, Scores, score
from cuantiza.eval.measure.tokens.windows import Window, full, strided
from cuantiza.eval.report.schema import PaperName, Protocol

# The longest window in tokens. Papers take the model's length; those on models of a longer one take 2048, as GPTQ's.
LONGEST = 2048


@dataclass(frozen=True)
class Paper:
    """A protocol: `windows(stream, length)` yields the windows; one begins length / `overlap` tokens after the last."""

    windows: Callable[[np.ndarray, int], Sequence[Window]]
    overlap: int


PAPERS: dict[PaperName, Paper] = {
    "transformers": Paper(lambda stream, length: list(strided(stream, length, max(1, length // 2))), 2),
    "gptq": Paper(lambda stream, length: list(full(stream, length)), 1),
}


def measure_protocol(
    name: PaperName, stream: np.ndarray, positions: int, model: Deferred, label: str, baseline: Scores | None
) -> tuple[dict, Scores] | None:
    """Score `model` on the tokens `stream` [N] by the protocol `name`; return the fields of its Protocol, and the scores.

    `positions` is the model's length in tokens, `label` names the model on the progress line, and `baseline` holds the
    baseline's scores by the same protocol, None for the baseline itself. The result is None where the stream has no
    window that is scored.
    """
    length = min(positions, LONGEST)
    windows = PAPERS[name].windows(stream, length)
    if not windows:
        return None
    scores = score(track(windows, f"quality   {label}, protocol {name}", len(windows)), [model])[0]
    found = perplexity(scores)
    delta = Estimate(0.0, 0.0) if baseline is None else mean_per_token(scores.nll - baseline.nll, scores.document)
    fields = Protocol(
        name=name,
        perplexity=found.value,
        perplexity_stderr=found.stderr,
        delta_ln_ppl=delta.value,
        delta_ln_ppl_stderr=delta.stderr,
        windows=len(windows),
        window_tokens=length,
        stride_tokens=max(1, length // PAPERS[name].overlap),
        tokens_scored=len(scores.nll),
    )
    return fields.model_dump(), scores
