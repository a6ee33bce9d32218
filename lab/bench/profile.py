"""`python -m lab.bench.profile ARTIFACT` prints how much of a step's time each operator takes."""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import onnxruntime as ort

from cuantiza.core.errors import UserError, run
from cuantiza.core.machine.hardware import default_threads
from cuantiza.core.machine.terminal import new_table, show
from cuantiza.core.run.runtime import Options, Runtime
from cuantiza.core.store.artifact import MODEL

WARM_UP = 3


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.bench.profile", description=__doc__)
    parser.add_argument("artifact", type=Path, help="the artifact's folder")
    parser.add_argument("--tokens", type=int, default=1, help="tokens per step (default 1, a decode step)")
    parser.add_argument("--past", type=int, default=128, help="tokens in the KV cache before the step (default 128)")
    parser.add_argument("--steps", type=int, default=30, help="steps to average (default 30)")
    parser.add_argument("--threads", type=int, default=default_threads(), help="threads (default: all processors)")
    args = parser.parse_args()
    for option, least in (("tokens", 1), ("past", 0), ("steps", 1), ("threads", 1)):
        if getattr(args, option) < least:
            raise UserError(f"--{option} {getattr(args, option)}: give {least} or more")
    rows, whole = profile(args.artifact / MODEL, args.tokens, args.past, args.steps, args.threads)
    title = f"{args.artifact}: {args.tokens} after {args.past} tokens"
    table = new_table(title, "operator", "calls per step", "ms per step")
    for name, (count, milliseconds) in sorted(rows.items(), key=lambda item: -item[1][1]):
        table.add_row(name, f"{count:g}", f"{milliseconds:.3f}")
    table.add_row("between operators", "", f"{whole - sum(milliseconds for _, milliseconds in rows.values()):.3f}")
    table.add_row("all", "", f"{whole:.3f}")
    show(table)
    return 0


def profile(
    model: Path, tokens: int, past: int, steps: int, threads: int
) -> tuple[dict[str, tuple[float, float]], float]:
    """Profile decode or prefill steps with ONNX Runtime's own profiler.

    Returns ({operator: (calls per step, ms per step)}, ms of a whole step), averaged over `steps` steps. A matmul is
    named with the widths of its input and output, as in `MatMul 768 -> 3072`. Profiling costs some µs per operator.
    """
    runtime = Runtime(model, threads, spin=True, options=Options(chunk=None))
    with tempfile.TemporaryDirectory() as work:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        options.enable_profiling, options.profile_file_prefix = True, str(Path(work) / "profile")
        runtime.session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        cache, ids = runtime.cache(1, past + tokens), np.arange(past + tokens)[None] % 1000
        if past:
            runtime.step(cache, ids[:, :past])
        for _ in range(WARM_UP + steps):
            runtime.step(copy.copy(cache), ids[:, past:])
        events = json.loads(Path(runtime.session.end_profiling()).read_text(encoding="utf-8"))
    starts = [event["ts"] for event in events if event["name"] == "model_run"]
    since = sorted(starts)[-steps]
    rows: dict[str, tuple[float, float]] = defaultdict(lambda: (0, 0))
    whole = 0.0
    for event in (event for event in events if event["ts"] >= since):
        if event["name"] == "model_run":
            whole += event["dur"] / steps / 1000
        elif event["name"].endswith("_kernel_time"):
            count, milliseconds = rows[_label(event["args"])]
            rows[_label(event["args"])] = count + 1 / steps, milliseconds + event["dur"] / steps / 1000
    return {name: (round(count, 2), milliseconds) for name, (count, milliseconds) in rows.items()}, whole


def _label(facts: dict) -> str:
    name, shapes = facts["op_name"], (facts["input_type_shape"], facts["output_type_shape"])
    if not name.startswith("MatMul"):
        return name
    inputs, outputs = (next(iter(shape[0].values()))[-1] for shape in shapes)
    return f"{name} {inputs} -> {outputs}"


if __name__ == "__main__":
    run(main)
