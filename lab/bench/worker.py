"""`python -m lab.bench.worker REQUEST.json`: prepare or serve one row, in the interpreter that has its library.

Prints lines of JSON: one of what was prepared; or one when the row is loaded, and then one for each question on
standard input. Imports the standard library, NumPy, what of cuantiza needs no more than these, and the row's module,
which has

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

# Of a decode: steps to warm up, and steps that are timed. The position grows with each, as in generation.
WARM_UP_STEPS, STEPS = 3, 20
# A cache is filled in pieces, so that it takes no more memory than the prefills that are measured.
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
    except Exception as error:  # whatever a library raises: the driver shows the last line
        traceback.print_exc()
        print(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return 1
    return 0


def prepare(module: Any, request: dict) -> dict:
    """Make the row's files in `request["folder"]`, which is there and empty: {files: [path], version}."""
    folder = Path(request["folder"])
    module.prepare(request["kind"], Path(request["checkpoint"]), Path(request["ours"]), folder)
    return {"files": [str(file) for file in module.files(request["kind"], folder)], "version": module.version()}


def serve(module: Any, request: dict, questions: Iterable[str]) -> Iterator[Any]:
    """{load_ns, version} once the row is loaded, then the answer to each of `questions`, a JSON list in a line:

        ["prefill", count]            [ns] of one prefill, after one to warm up
        ["decode", position]          [ns] of each of STEPS steps
        ["generate", prompt, count]   [ns] of one generation
        ["check", prompt, count]      the likeliest tokens, [1 + count] or fewer; the logits of the last prompt token and
                                      of each token behind it, float32 [1 + count, V], where the library gives any, are
                                      saved as `request["logits"]`
        ["peak"]                      the largest resident set so far, bytes

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
        else:
            raise ValueError(f"no such question: {what}")


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


def _end_with_parent() -> None:
    """Linux kills this process when its parent dies.

    A stopped one reads no end of file, a thread that waits for the parent (cuantiza/core/machine/process.py) stands still with it, and
    what the system sends to those that stand stopped when their parent dies misses one whose stop is still on its way.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _elapsed(run: Callable[[], object]) -> int:
    start = time.perf_counter_ns()
    run()
    return time.perf_counter_ns() - start


if __name__ == "__main__":
    # Libraries print what they like, and some fail on their way out: neither may spoil the answer.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    status = main(Path(sys.argv[1]), answer)
    sys.stderr.flush()
    os._exit(status)
