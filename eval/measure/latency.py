"""Measure the latency of all subjects, interleaved: each round runs each subject once, in a process of its own.

Only one subject is loaded at a time, so no thread pool disturbs another. Noise that lasts longer than a round affects
all subjects alike, so ratios to the baseline are taken within a round.
"""

from __future__ import annotations

from statistics import median

import numpy as np

from cuantiza.core.inputs.defaults import POSITIONS
from cuantiza.core.machine.process import Remote
from cuantiza.core.machine.progress import track
from cuantiza.eval.measure.engines import Engine, Subject

# The lengths of a prefill and the positions of a decode step, as far as the model and the caller's limit go.
STEPS = (32, 128, 512, 2048, 8192, 32768)


def shapes(longest: int, limit: int = POSITIONS) -> tuple[list[int], list[int]]:
    """Return (prefill lengths, decode positions) for a model of `longest` positions, of which `limit` are measured.

    The last of these positions is always one of the decode positions.
    """
    longest = min(longest, limit)
    prefill = [length for length in STEPS if length <= longest] or [longest]
    return prefill, sorted({*(position for position in STEPS if position < longest), longest - 1})


def measure_latency(
    subjects: list[Subject], ids: np.ndarray, longest: int, rounds: int, threads: int, limit: int = POSITIONS
) -> dict[str, dict]:
    """Return the latency fields of every subject's row (docs/report.md). Ratios are to the first subject.

    `longest` and `limit` are those of `shapes`; `ids` has to hold as many tokens.
    """
    prefill, decode = shapes(longest, limit)
    runs: dict[str, list[dict]] = {subject.name: [] for subject in subjects}
    order = [subjects[(turn + number) % len(subjects)] for number in range(rounds) for turn in range(len(subjects))]
    for subject in track(order, "latency", len(order)):
        with Remote(Engine, subject, threads, True, label=subject.name) as remote:
            runs[subject.name].append(remote.call("measure", ids, prefill, decode))
    baseline = runs[subjects[0].name]
    return {name: _fields(rounds, baseline) for name, rounds in runs.items()}


def _fields(rounds: list[dict], baseline: list[dict]) -> dict:
    load = [run["load_ns"] for run in rounds]
    return {
        "load_ms": median(load) / 1e6,
        "load_samples_ns": load,
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in rounds),
        "session_options": rounds[0]["session_options"],
        "prefill": [_shape("tokens", shape, rounds, baseline, "prefill", shape) for shape in rounds[0]["prefill"]],
        "decode": [_shape("position", shape, rounds, baseline, "decode", 1) for shape in rounds[0]["decode"]],
    }


def _shape(key: str, shape: int, rounds: list[dict], baseline: list[dict], phase: str, tokens: int) -> dict:
    """Summarize one shape (prefill length or decode position) over all rounds.

    `samples_ns` holds the samples of one round after the other; `samples_per_round` says how many each round has.
    """
    samples = [sample for run in rounds for sample in run[phase][shape]]
    speedups = [
        median(base[phase][shape]) / median(run[phase][shape]) for base, run in zip(baseline, rounds, strict=True)
    ]
    p50 = float(np.quantile(samples, 0.5))
    return {
        key: shape,
        "p50_ms": p50 / 1e6,
        "p90_ms": float(np.quantile(samples, 0.9)) / 1e6,
        "tokens_per_second": tokens / p50 * 1e9,
        "speedup": median(speedups),
        "speedup_min": min(speedups),
        "speedup_max": max(speedups),
        "samples_per_round": [len(run[phase][shape]) for run in rounds],
        "samples_ns": samples,
    }
