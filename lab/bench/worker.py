"""`python -m lab.bench.worker REQUEST.json`: prepare or serve one row, in the interpreter that has its library.

Prints lines of JSON. To "prepare", it is one line about the files that were made. To "serve", it is one line when the
row has loaded, and then one for each question on standard input. Imports the standard library, NumPy, modules of
cuantiza that need no more than these, and the row's module, which has

    prepare(kind, checkpoint, ours, folder)    makes the row's files in `folder` (our own rows have none to make); a row
                                               that calibrates also takes the file of its windows, int64 [n, T]
    files(kind, folder) -> list[Path]          the files whose bytes count as the row's size
    class Engine(kind, folder, threads)        loads them
        start(batch, capacity)                 begins with an empty KV cache
        feed(ids [B, T]) -> [B, V] | None      adds tokens and returns the last one's logits, which the next call may
                                               overwrite; None if the library gives no logits
        steps = False                          if it cannot add tokens step by step, and has these instead:
        generate(ids [B, T], count) -> list    exactly `count` tokens for each sequence, greedy
        times(ids [B, T], count) -> list       ns from the call to each of `count` tokens
        max_batch                              the largest batch, if there is a limit
        all_logits(ids [T]) -> [T, V]          float32 logits of all positions of one sequence, if lab/quality has the row
    version() -> str                           the libraries and their versions
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from cuantiza.core.machine.hardware import peak_rss_bytes

# The steps of a decode: first the warm-up, then those that are timed. The position grows with each step.
WARM_UP_STEPS, STEPS = 3, 20
# A cache is filled in pieces of this size, so that filling takes no more memory than the measured prefills.
FILL_TOKENS = 512
_PR_SET_PDEATHSIG = 1


def main(path: Path, out: TextIO) -> int:
    request = json.loads(path.read_text(encoding="utf-8"))
    try:
        module = importlib.import_module(request["module"])
        if request["task"] == "prepare":
            print(json.dumps(prepare(module, request)), file=out, flush=True)
        else:
            _end_with_parent()
            for answer in serve(module, request, sys.stdin):
                print(json.dumps(answer), file=out, flush=True)
    except ModuleNotFoundError as error:
        traceback.print_exc()
        print(f"{error.name} is not installed: run `make peers`", file=sys.stderr)
        return 1
    except Exception as error:  # a library may raise anything; the driver shows the last line
        traceback.print_exc()
        print(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return 1
    return 0


def prepare(module: Any, request: dict) -> dict:
    """Make the row's files in the empty folder `request["folder"]`; returns {files: [path], version}."""
    folder = Path(request["folder"])
    places = [Path(request[name]) for name in ("checkpoint", "ours", "folder", "calibration") if name in request]
    module.prepare(request["kind"], *places)
    return {"files": [str(file) for file in module.files(request["kind"], folder)], "version": module.version()}


def serve(module: Any, request: dict, questions: Iterable[str]) -> Iterator[Any]:
    """Yield {load_ns, version} when the row has loaded, then the answer to each of `questions`, lines of JSON lists:

        ["prefill", count]            [ns] of one prefill, after one to warm up
        ["decode", position]          [ns] of each of STEPS steps
        ["generate", prompt, count]   [ns] of one generation
        ["check", prompt, count]      the likeliest tokens, [1 + count] or fewer. If the library gives logits, those of
                                      the last prompt token and of each token after it, float32 [1 + count, V], are
                                      saved as `request["logits"]`
        ["peak"]                      the largest resident set so far, in bytes
        ["logits", ids]               nothing; `all_logits` of the tokens `ids` are saved as `request["logits"]`

    Tokens are `request["ids"]` [B, N].
    """
    ids = np.asarray(request["ids"], np.int64)
    start = time.perf_counter_ns()
    engine = module.Engine(request["kind"], Path(request["folder"]), request["threads"], **request["options"])
    load = time.perf_counter_ns() - start
    most = getattr(engine, "max_batch", len(ids))
    if len(ids) > most:
        raise ValueError(f"takes batches of at most {most}")
    clock = Stepped(engine, ids) if getattr(engine, "steps", True) else Whole(engine, ids)
    yield {"load_ns": load, "version": module.version()}
    for line in questions:
        what, *shape = json.loads(line)
        if what == "prefill":
            clock.prefill(*shape)
            yield [clock.prefill(*shape)]
        elif what == "decode":
            yield clock.decode(*shape)
        elif what == "generate":
            yield [clock.generate(*shape)]
        elif what == "check":
            top, logits = clock.check(*shape)
            if logits is not None:
                np.save(request["logits"], logits)
            yield top
        elif what == "peak":
            yield peak_rss_bytes()
        elif what == "logits":
            np.save(request["logits"], engine.all_logits(np.asarray(*shape, np.int64)))
            yield None
        else:
            raise ValueError(f"no such question: {what}")


class Stepped:
    """Times an engine that takes tokens step by step. It is fed `ids` int64 [B, N], whatever it predicts."""

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
        """Continue greedily with the cache; the last token is chosen but not fed."""
        step = self.ids[:, :prompt]
        for number in range(count):
            logits = self.engine.feed(step)
            # If the library gives no logits, feed some token; the time does not depend on which.
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
    """Times an engine that only generates, with a loop of its own, and reports when each token was there."""

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
        """The token after the prompt, and no logits."""
        return [int(self.engine.generate(self.ids[:1, :prompt], 1)[0][0])], None


def _end_with_parent() -> None:
    """Have Linux kill this process when its parent dies.

    A process stopped by SIGSTOP cannot notice that its parent died: it reads no EOF, and a thread that waits for the
    parent (cuantiza/core/machine/process.py) is stopped too. The kernel's SIGHUP to orphaned stopped process groups
    does not help if our SIGSTOP has not arrived yet.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _elapsed(run: Callable[[], object]) -> int:
    start = time.perf_counter_ns()
    run()
    return time.perf_counter_ns() - start


if __name__ == "__main__":
    # Libraries may print to standard output, and some fail at exit. Neither may disturb the answers.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    status = main(Path(sys.argv[1]), answer)
    sys.stderr.flush()
    os._exit(status)
