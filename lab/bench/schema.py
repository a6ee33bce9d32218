"""The content of reports/bench/<shape>.json.

schema             "cuantiza/bench/2"
shape              name, layers, width, heads, vocabulary, positions, parameters, and more of a Llama's
machine            as in a report, with the instruction sets that kernels choose between; held_to names the newest, if
                   the others were hidden (lab/avx2)
others_processors  how many processors other processes kept busy during the rounds, on average
baseline           the row that speedups are relative to: a speedup is its median over the row's, both of one round
settings           threads, batch and shapes; each row's `settings` have the same order
limits             the machine's limits before each round; shares use the largest limit for the number of threads
rows               name, ours, precision, bytes (of the model's files), ratio (to 4 bytes per parameter), version (of
                   its libraries), engine (how it is started), skipped (why there are no times, or null), agreement
                   (with the first row, or null), and settings. Each of a row's settings has

    skipped, load_ms, load_samples_ns, peak_rss_bytes, and lists prefill, decode, generate, in which each shape has
        median_ms            median of all samples
        min_ms, max_ms       medians of the fastest and of the slowest round
        tokens_per_second    of the whole batch
        speedups             one per round; empty if the baseline has no times
        speedup, speedup_min, speedup_max    median, least and largest of `speedups`, or null
        share_of_limit       0 to 1 (lab/bench/limits.py)
        samples_per_round, samples_ns        raw samples in the order they were taken
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from statistics import median

from cuantiza.core.machine.hardware import machine
from cuantiza.core.machine.instructions import instruction_sets
from cuantiza.core.store import digests
from lab.avx2 import HELD_TO, is_held, visible
from lab.bench.limits import Limits, best, decode_share, prefill_share
from lab.bench.rounds import CHECK, Answer, Case, Measured, Setting, agreement
from lab.bench.rows import Prepared, Row
from lab.bench.worker import STEPS
from lab.checkpoints.shapes import Shape

SCHEMA = "cuantiza/bench/2"


def result(
    shape: Shape,
    rows: list[Row],
    prepared: dict[str, Prepared],
    failed: dict[str, str],
    wanted: list[Setting],
    measured: dict[str, list[Measured]],
    answers: dict[str, Answer],
    limits: list[Limits],
    rounds: int,
    baseline: str,
    busy: float | None,
) -> dict:
    """The content of the JSON for one run. Each row is in `prepared`, or in `failed` with the reason."""
    dimensions = {key: value for key, value in asdict(shape).items() if key != "folder"}
    by_threads = {item.threads: best([other for other in limits if other.threads == item.threads]) for item in limits}
    reference = answers.get(rows[0].name)
    out = []
    for row in rows:
        fields = {"name": row.name, "precision": row.precision, "ours": row.is_ours, "skipped": failed.get(row.name)}
        fields["engine"] = {
            "python": str(row.python),
            "module": row.module,
            "kind": row.kind,
            "options": row.options,
            "cache_bytes": row.cache_bytes,
        }
        if row.name in prepared:
            files = prepared[row.name]
            times_found = [found for found in measured[row.name] if not found.skipped]
            close = agreement(answers.get(row.name), reference)
            fields |= {
                "bytes": files.bytes,
                "ratio": files.bytes / (4 * shape.parameters),
                "version": times_found[0].version if times_found else files.version,
                "agreement": asdict(close) if close else None,
                "settings": [
                    _setting(shape, row, files, setting, found, by_threads[setting.threads])
                    for setting, found in zip(wanted, measured[row.name], strict=True)
                ],
            }
            if not times_found:
                fields["skipped"] = measured[row.name][0].skipped
        out.append(fields)
    return {
        "schema": SCHEMA,
        "shape": dimensions | {"parameters": shape.parameters},
        "machine": machine(max(setting.threads for setting in wanted))
        | {"instructions": visible(instruction_sets())}
        | ({"held_to": HELD_TO} if is_held() else {}),
        "versions": digests.versions("onnxruntime", "numpy"),
        "command": ["python", "-m", "lab.bench", *sys.argv[1:]],
        "rounds": rounds,
        "others_processors": busy,
        "decode_steps": STEPS,
        "check": {"prompt": CHECK[0], "steps": CHECK[1]},
        "baseline": baseline,
        "settings": [asdict(setting) for setting in wanted],
        "limits": [asdict(item) for item in limits],
        "rows": out,
    }


def times(rounds: list[list[int]], base: list[list[int]], tokens: int) -> dict:
    """Compute a shape's figures from its samples in ns and the baseline's, one list per round each.

    If `base` is empty there are no speedups. `tokens` is the number of tokens that one sample processes.
    """
    samples = [sample for run in rounds for sample in run]
    medians = [median(run) for run in rounds]
    speedups = [median(other) / own for other, own in zip(base, medians, strict=True)] if base else []
    middle = median(samples)
    return {
        "median_ms": middle / 1e6,
        "min_ms": min(medians) / 1e6,
        "max_ms": max(medians) / 1e6,
        "tokens_per_second": tokens / middle * 1e9,
        "speedup": median(speedups) if speedups else None,
        "speedup_min": min(speedups, default=None),
        "speedup_max": max(speedups, default=None),
        "speedups": speedups,
        "samples_per_round": [len(run) for run in rounds],
        "samples_ns": samples,
    }


def _setting(shape: Shape, row: Row, files: Prepared, setting: Setting, found: Measured, limits: Limits) -> dict:
    fields: dict = {"threads": setting.threads, "batch": setting.batch, "skipped": found.skipped}
    if found.skipped:
        return fields
    fields |= {
        "load_ms": median(found.load_ns) / 1e6,
        "load_samples_ns": found.load_ns,
        "peak_rss_bytes": found.peak_rss_bytes,
        "prefill": [],
        "decode": [],
        "generate": [],
    }

    def figures(case: Case, tokens: int) -> dict:
        own, base = ([samples[case] for samples in rounds] for rounds in (found.rounds, found.base))
        return times(own, base, tokens * setting.batch)

    for count in setting.prefill:
        item = figures(("prefill", count), count)
        share = prefill_share(shape, limits, row.precision, count, setting.batch, item["median_ms"] * 1e6)
        fields["prefill"].append({"tokens": count, "share_of_limit": share} | item)
    for position in setting.decode:
        item = figures(("decode", position), 1)
        share = decode_share(
            shape, limits, files.bytes, row.cache_bytes, position, setting.batch, item["median_ms"] * 1e6
        )
        fields["decode"].append({"position": position, "share_of_limit": share} | item)
    if setting.generate:
        prompt, count = setting.generate
        fields["generate"].append({"prompt": prompt, "tokens": count} | figures(("generate", prompt, count), count))
    return fields
