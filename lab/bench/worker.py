"""`python -m lab.bench.worker REQUEST.json` prepares or serves one row, in the interpreter that has its library.

It prints lines of JSON: one about the prepared files; or one when the row is loaded, and then one answer per question
on standard input. It imports the standard library, NumPy, modules of cuantiza that need no more than these, and the
row's module, which must define

    prepare(kind, checkpoint, ours, folder)    make the row's files in `folder` (not called for our own rows)
    files(kind, folder) -> list[Path]          the files whose bytes count as the row's size
    class Engine(kind, folder, threads)        load the row's files
        start(batch, capacity)                 begin with an empty KV cache
        feed(ids [B, T]) -> [B, V] | None      append tokens and return the logits of the last one, if the library gives
                                               any; the next call may overwrite them
        steps = False                          set if the library cannot be fed token by token; then it has instead:
        generate(ids [B, T], count) -> list    generate exactly `count` tokens per sequence, greedily
        times(ids [B, T], count) -> list       ns from the call until each of `count` tokens was there
        max_batch                              the largest batch that is supported, if there is a limit
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

# A decode measurement has some steps to warm up, and then these timed steps. Each step is one position further, as in
# generation.
WARM_UP_STEPS, STEPS = 3, 20
# The KV cache is filled in pieces of this size, so that it needs no more memory than the measured prefills.
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
    """Make the row's files in the empty folder `request["folder"]`, and return {files: [path], version}."""
    folder = Path(request["folder"])
    module.prepare(request["kind"], Path(request["checkpoint"]), Path(request["ours"]), folder)
    return {"files": [str(file) for file in module.files(request["kind"], folder)], "version": module.version()}


def serve(module: Any, request: dict, questions: Iterable[str]) -> Iterator[Any]:
    """Load the row and yield {load_ns, version}; then yield the answer to each of `questions`.

    A question is a JSON list in one line:

        ["prefill", count]            -> [ns] of one prefill, after one to warm up
        ["decode", position]          -> [ns] of each of STEPS steps
        ["generate", prompt, count]   -> [ns] of one generation
        ["check", prompt, count]      -> the likeliest tokens, [1 + count] or fewer. If the library gives logits, those
                                      of the last prompt token and of each token after it, float32 [1 + count, V], are
                                      saved to the file `request["logits"]`
        ["peak"]                      -> the largest resident set size so far, in bytes

    The tokens are `request["ids"]` [B, N].
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
    """Times an engine that can be fed token by token. It is fed `ids` int64 [B, N], whatever it predicts."""

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
        """Generate greedily through the KV cache. The last token is chosen but not fed."""
        step = self.ids[:, :prompt]
        for number in range(count):
            logits = self.engine.feed(step)
            # If there are no logits, any other token is fed; it costs the same.
            step = self.ids[:, number : number + 1] if logits is None else logits.argmax(axis=-1)[:, None]

    def check(self, prompt: int, steps: int) -> tuple[list[int] | None, np.ndarray | None]:
        self.engine.start(1, prompt + steps)
        pieces = [self.ids[:1, :prompt], *(self.ids[:1, at : at + 1] for at in range(prompt, prompt + steps))]
        parts = []
        for piece in pieces:
            part = self.engine.feed(piece)
            if part is None:
                return None, None
            parts.append(np.array(part, np.float32))  # a copy, because the next call may overwrite the original
        logits = np.concatenate(parts)
        return logits.argmax(axis=-1).tolist(), logits


class Whole:
    """Times an engine that only generates with its own loop, and reports when each token was there."""

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
        """Only the first token after the prompt, without logits."""
        return [int(self.engine.generate(self.ids[:1, :prompt], 1)[0][0])], None


def _end_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies (PR_SET_PDEATHSIG).

    A process stopped by SIGSTOP cannot notice that its parent died: it reads no EOF, and a thread that watches the
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
    # Libraries may print to standard output, and some crash when the process exits. So the answer goes to a copy of
    # standard output, and the process ends without cleaning up.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    status = main(Path(sys.argv[1]), answer)
    sys.stderr.flush()
    os._exit(status)
