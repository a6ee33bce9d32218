"""`python -m bench.worker REQUEST.json`: prepare or measure one row, in the interpreter that has its library.

Prints one line of JSON. Imports the standard library and NumPy, and the row's module, which has

    prepare(kind, checkpoint, ours, folder)    makes the files of the row in `folder` (not of our rows)
    files(kind, folder) -> list[Path]          those whose bytes count as its size
    class Engine(kind, folder, threads)        loads
        start(batch, capacity)                 an empty cache
        feed(ids [B, T]) -> [B, V] | None      adds tokens; the logits of the last one, where the library gives them,
                                               which the next call may overwrite
        steps = False                          where it cannot be stepped, and has these instead:
        generate(ids [B, T], count) -> list    greedy, exactly `count` tokens for each sequence
        times(ids [B, T], count) -> list       ns from the call to each of `count` tokens
        max_batch                              the largest batch, where there is one
    version() -> str                           libraries and their versions
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np

# Of a prefill: one run to warm up, then samples until there are enough, or until the time is up.
SAMPLES, LEAST_SAMPLES, BUDGET_NS = 5, 2, 2_000_000_000
# Of a decode: steps to warm up, and steps that are timed. The position grows with each, as in generation.
WARM_UP_STEPS, STEPS = 3, 20
GENERATE_SAMPLES = 2
# A cache is filled in pieces, so that it takes no more memory than the prefills that are measured.
FILL_TOKENS = 512


def main(path: Path, out: TextIO) -> int:
    request = json.loads(path.read_text(encoding="utf-8"))
    try:
        module = importlib.import_module(request["module"])
        answer = {"prepare": prepare, "measure": measure}[request["task"]](module, request)
    except ModuleNotFoundError as error:
        traceback.print_exc()
        print(f"{error.name} is not installed: run `make peers`", file=sys.stderr)
        return 1
    except Exception as error:  # whatever a library raises: the driver shows the last line
        traceback.print_exc()
        print(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return 1
    print(json.dumps(answer | {"version": module.version()}), file=out, flush=True)
    return 0


def prepare(module: Any, request: dict) -> dict:
    """Make the row's files in `request["folder"]`, which is there and empty: {files: [path]}."""
    folder = Path(request["folder"])
    module.prepare(request["kind"], Path(request["checkpoint"]), Path(request["ours"]), folder)
    return {"files": [str(file) for file in module.files(request["kind"], folder)]}


def measure(module: Any, request: dict) -> dict:
    """Raw samples in ns, as lists by shape, and what the row answers to the check.

    {load_ns, peak_rss_bytes, prefill: {tokens: [..]}, decode: {position: [..]}, generate: [..] | None,
    top: [token] | None}; `request` has the fields of bench.rounds.Setting, ids [B, N], and of the check `prompt` and
    `steps`: the logits of the last prompt token and of each token behind it, float32 [1 + steps, V], are saved as
    `request["logits"]`.
    """
    ids = np.asarray(request["ids"], np.int64)
    start = time.perf_counter_ns()
    engine = module.Engine(request["kind"], Path(request["folder"]), request["threads"], **request["options"])
    load = time.perf_counter_ns() - start
    most = getattr(engine, "max_batch", len(ids))
    if len(ids) > most:
        raise ValueError(f"takes batches of at most {most}")
    clock = Stepped(engine, ids) if getattr(engine, "steps", True) else Whole(engine, ids)
    answer = {
        "load_ns": load,
        "prefill": {count: _samples(lambda count=count: clock.prefill(count)) for count in request["prefill"]},
        "decode": {position: clock.decode(position) for position in request["decode"]},
        "generate": _generate(clock, *request["generate"]) if request["generate"] else None,
        "peak_rss_bytes": peak_rss_bytes(),
        "top": None,
    }
    if request["check"]:
        top, logits = clock.check(*request["check"])
        answer["top"] = top
        if logits is not None:
            np.save(request["logits"], logits)
    return answer


class Stepped:
    """Times of an engine that takes tokens one by one; `ids` int64 [B, N] are fed whatever it predicts."""

    def __init__(self, engine: Any, ids: np.ndarray) -> None:
        self.engine, self.ids = engine, ids

    def prefill(self, count: int) -> int:
        self.engine.start(len(self.ids), count)
        return _elapsed(lambda: self.engine.feed(self.ids[:, :count]))

    def decode(self, position: int) -> list[int]:
        steps = WARM_UP_STEPS + STEPS
        self.engine.start(len(self.ids), position + steps)
        for start in range(0, position, FILL_TOKENS):
            self.engine.feed(self.ids[:, start : min(start + FILL_TOKENS, position)])
        tokens = [self.ids[:, at : at + 1] for at in range(position, position + steps)]
        return [_elapsed(lambda token=token: self.engine.feed(token)) for token in tokens][WARM_UP_STEPS:]

    def generate(self, prompt: int, count: int) -> int:
        self.engine.start(len(self.ids), prompt + count)
        return _elapsed(lambda: self._continue(prompt, count))

    def _continue(self, prompt: int, count: int) -> None:
        """Greedy, through the cache; the last token is chosen and not fed."""
        step = self.ids[:, :prompt]
        for number in range(count):
            logits = self.engine.feed(step)
            # Without logits, any token costs as much.
            step = self.ids[:, number : number + 1] if logits is None else logits.argmax(axis=-1)[:, None]

    def check(self, prompt: int, steps: int) -> tuple[list[int] | None, np.ndarray | None]:
        self.engine.start(1, prompt + steps)
        pieces = [self.ids[:1, :prompt], *(self.ids[:1, at : at + 1] for at in range(prompt, prompt + steps))]
        rows = []
        for piece in pieces:
            row = self.engine.feed(piece)
            if row is None:
                return None, None
            rows.append(np.array(row, np.float32))  # a copy: the next call may overwrite it
        logits = np.concatenate(rows)
        return logits.argmax(axis=-1).tolist(), logits


class Whole:
    """Times of an engine that only generates, with its own loop, and says when each token was there."""

    def __init__(self, engine: Any, ids: np.ndarray) -> None:
        self.engine, self.ids = engine, ids

    def prefill(self, count: int) -> int:
        return self.engine.times(self.ids[:, :count], 1)[0]

    def decode(self, position: int) -> list[int]:
        times = self.engine.times(self.ids[:, :position], 1 + WARM_UP_STEPS + STEPS)
        return np.diff(times)[WARM_UP_STEPS:].tolist()

    def generate(self, prompt: int, count: int) -> int:
        return _elapsed(lambda: self.engine.generate(self.ids[:, :prompt], count))

    def check(self, prompt: int, steps: int) -> tuple[list[int], None]:
        """The token behind the prompt alone."""
        return [int(self.engine.generate(self.ids[:1, :prompt], 1)[0][0])], None


def peak_rss_bytes() -> int:
    """Largest resident set of this process; Linux's getrusage would carry over its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _elapsed(run: Callable[[], object]) -> int:
    start = time.perf_counter_ns()
    run()
    return time.perf_counter_ns() - start


def _samples(run: Callable[[], int]) -> list[int]:
    """What `run` gives, once to warm up and then again and again."""
    run()
    samples: list[int] = []
    start = time.perf_counter_ns()
    while len(samples) < LEAST_SAMPLES or (len(samples) < SAMPLES and time.perf_counter_ns() - start < BUDGET_NS):
        samples.append(run())
    return samples


def _generate(clock: Stepped | Whole, prompt: int, count: int) -> list[int]:
    """Without a warm-up: prefills and decodes have been."""
    samples = [clock.generate(prompt, count)]
    while len(samples) < GENERATE_SAMPLES and sum(samples) < BUDGET_NS:
        samples.append(clock.generate(prompt, count))
    return samples


if __name__ == "__main__":
    # Libraries print what they like, and some fail on their way out: neither may spoil the answer.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    status = main(Path(sys.argv[1]), answer)
    sys.stderr.flush()
    os._exit(status)
