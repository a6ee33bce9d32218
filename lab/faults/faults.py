"""The campaign's faults: each disturbs one run of the pipeline and returns what is wrong afterwards."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lab import ES_MINI
from lab.faults.laboratory import (
    TINY,
    VARIANTS,
    Journey,
    Lab,
    Run,
    Trap,
    differences,
    left_running,
    leftovers,
    session,
    unsound,
)

EVERY_ES_MINI = 8  # one in so many moments runs on the embedded model instead of a tiny one
NEAR_RENAME = 4  # changes at most so many places before or after a rename are chosen NEAR_RENAME times as often


@dataclass(frozen=True)
class Outcome:
    """`what` was done, whether it `struck`, and everything that is `wrong` afterwards.

    `struck` is false if the run was undisturbed, for example because it ended before the moment came.
    """

    what: str
    struck: bool
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Strike:
    """A moment of a run: `after_s` seconds after its start, or `delay_s` seconds after the start of a change."""

    after_s: float | None = None
    change: int | None = None
    delay_s: float = 0
    text: str = ""


Fault = Callable[[Lab, random.Random, int, str], Outcome]


# --- shared by all faults ---


@contextmanager
def new_spot(lab: Lab, name: str, journey: Journey) -> Iterator[Path]:
    try:
        yield lab.spot(name, journey)
    finally:
        shutil.rmtree(lab.root / name, ignore_errors=True)


def _journey(rng: random.Random, index: int) -> Journey:
    model = ES_MINI.name if index % EVERY_ES_MINI == EVERY_ES_MINI - 1 else TINY[0].name
    start, goal = rng.choices([(None, "first"), ("first", "opset"), ("first", "corpus")], [5, 3, 2])[0]
    return Journey(model, start, goal)


def told(journey: Journey) -> str:
    start = "from nothing" if journey.start is None else f"over finished outputs, {journey.goal} changed"
    return f"{journey.model}, {start}"


def _strike(lab: Lab, rng: random.Random, journey: Journey) -> Strike:
    """Draw a moment: half of them at any time, half at a change below the output folders.

    Changes near a rename are preferred, because publishing an artifact is a rename.
    """
    line = lab.timeline(journey)
    if rng.random() < 0.5:
        after = rng.uniform(0, line.seconds)
        return Strike(after_s=after, text=f"{after:.2f} s after its start")
    renames = [number for number, change in enumerate(line.changes) if change.event == "os.rename"]
    weights = [
        NEAR_RENAME if any(abs(number - rename) <= NEAR_RENAME for rename in renames) else 1
        for number in range(len(line.changes))
    ]
    number = rng.choices(range(len(line.changes)), weights)[0]
    delay = rng.choice([0, 0, rng.uniform(0, 0.01), rng.uniform(0, 0.2)])
    change = line.changes[number]
    text = f"{1000 * delay:.1f} ms after change {number} begins ({change.event} {change.path})"
    return Strike(change=number, delay_s=delay, text=text)


def trap_of(spot: Path, **fields) -> Trap:
    return Trap(str(spot / "log"), tuple(str(spot / "out" / name) for name in ("artifacts", "reports")), **fields)


def _disturbed(
    lab: Lab, spot: Path, commands: list[list[str]], strike: Strike, number: int, *, group: bool = True
) -> list[Run]:
    """Run `commands` one by one until one fails, and send signal `number` to the one that runs at the strike."""
    trap = None
    if strike.change is not None:
        trap = trap_of(spot, at=strike.change, delay_s=strike.delay_s, signal=number, group=group)
    begin, sent, runs = time.monotonic(), False, []
    for command in commands:
        run = Run(lab, spot, command, trap)
        runs.append(run)
        # If the moment comes between two commands, the signal goes to the next one as soon as it starts.
        wait_s = None if strike.after_s is None or sent else max(0.0, begin + strike.after_s - time.monotonic())
        if wait_s is not None and run.wait(wait_s) is None:
            (os.killpg if group else os.kill)(run.pid, number)
            sent = True
        if run.wait() != 0:
            break
    return runs


def left_of(runs: Sequence[Run]) -> list[str]:
    """Name the processes of `runs` that still run, and kill them."""
    wrong = [f"still running: {name}" for name in left_running([run.pid for run in runs])]
    for run in runs:
        run.end()
    return wrong


def next_make(lab: Lab, spot: Path, journey: Journey) -> list[str]:
    """Run make once more, undisturbed, and return everything that is wrong afterwards."""
    run = Run(lab, spot, lab.make(spot, journey.model, journey.goal))
    run.wait()
    wrong = []
    if run.status != 0:
        wrong.append(f"the next make ends with status {run.status}: {run.said()[-1500:]}")
    if "waiting for another run" in run.said():
        wrong.append("the next make waited for a lock, although no other run is alive")
    return wrong + left_of([run]) + differences(lab, spot, journey.model, journey.goal)


def variants(journey: Journey) -> list[str]:
    return [name for name in VARIANTS if name in (journey.start, journey.goal)]


def _is_traceback(said: str, sources: str) -> bool:
    """Whether the output holds a traceback that this project should have prevented.

    A traceback from the interpreter's own start names no file of ours and does not count.
    """
    if "Traceback" not in said and "Exception ignored" not in said:
        return False
    return any(place in said for place in (sources, "site-packages", "multiprocessing"))


# --- the faults ---


def kill(lab: Lab, rng: random.Random, index: int, name: str) -> Outcome:
    """SIGKILL goes to the whole process group of `make export quantize eval`."""
    journey = _journey(rng, index)
    strike = _strike(lab, rng, journey)
    with new_spot(lab, name, journey) as spot:
        runs = _disturbed(lab, spot, [lab.make(spot, journey.model, journey.goal)], strike, signal.SIGKILL)
        struck = runs[-1].status != 0
        wrong = left_of(runs) + unsound(lab, spot, journey.model, variants(journey)) + next_make(lab, spot, journey)
    return Outcome(f"SIGKILL to the group, {told(journey)}, {strike.text}", struck, tuple(wrong))


def kill_one(lab: Lab, rng: random.Random, index: int, name: str) -> Outcome:
    """SIGKILL goes to one process of the pipeline, as when memory runs out; the next make starts at once."""
    journey = _journey(rng, index)
    after, pick = rng.uniform(0, lab.timeline(journey).seconds), rng.random()
    with new_spot(lab, name, journey) as spot:
        run = Run(lab, spot, lab.make(spot, journey.model, journey.goal))
        victim = ""
        if run.wait(after) is None:
            pids = session([run.pid])
            pid = pids[int(pick * len(pids))] if pids else run.pid
            try:
                victim = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:80]
                os.kill(pid, signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError):
                victim = ""
        run.wait()
        # A process that make left running may still hold the lock, rightly. Then the next make waits until it ends.
        again = Run(lab, spot, lab.make(spot, journey.model, journey.goal))
        again.wait()
        wrong = [] if again.status == 0 else [f"the next make ends with {again.status}: {again.said()[-1500:]}"]
        wrong += [f"a traceback: {run.said()[-1500:]}"] if "Traceback" in run.said() else []
        wrong += left_of([run, again]) + differences(lab, spot, journey.model, journey.goal)
    return Outcome(
        f"SIGKILL to {victim or 'nobody'}, {told(journey)}, {after:.2f} s after its start", bool(victim), tuple(wrong)
    )


def interrupt(lab: Lab, rng: random.Random, index: int, name: str) -> Outcome:
    """SIGINT goes to the process group, as Ctrl-C does, or SIGTERM to it or its leader; of make or of one stage."""
    journey = _journey(rng, index)
    number = rng.choice([signal.SIGINT, signal.SIGTERM])
    group = number == signal.SIGINT or rng.random() < 0.5
    through_make = rng.random() < 0.5
    strike = _strike(lab, rng, journey)
    with new_spot(lab, name, journey) as spot:
        make, stages = ([command(spot, journey.model, journey.goal)] for command in (lab.make, lab.stages))
        runs = _disturbed(lab, spot, make if through_make else stages[0], strike, number, group=group)
        last, wrong = runs[-1], []
        # Ctrl-C during the interpreter's own start ends it with status 1, which make then reports as its own.
        if last.status not in (0, 128 + number) and "KeyboardInterrupt" not in last.said():
            wrong.append(f"status {last.status} instead of {128 + number}: {last.said()[-1500:]}")
        if _is_traceback(last.said(), str(lab.sources)):
            wrong.append(f"a traceback: {last.said()[-1500:]}")
        wrong += left_of(runs) + [f"{item} is left" for item in leftovers(spot)]
        wrong += unsound(lab, spot, journey.model, variants(journey)) + next_make(lab, spot, journey)
    to = "the group" if group else "its leader"
    what = f"{number.name} to {to} of {'make' if through_make else 'a stage'}, {told(journey)}, {strike.text}"
    return Outcome(what, last.status != 0, tuple(wrong))


def crowd(lab: Lab, rng: random.Random, index: int, name: str) -> Outcome:
    """Four makes write to the same folders at once: for one model, for four models, or for one with one make killed."""
    start, goal = rng.choice([(None, "first"), ("first", "opset")]) if index % 3 != 1 else (None, "first")
    models = [shape.name for shape in TINY] if index % 3 == 1 else [TINY[0].name] * len(TINY)
    journeys = [Journey(model, start, goal) for model in models]
    for journey in journeys:
        lab.timeline(journey)
    after = rng.uniform(0, 2 * lab.timeline(journeys[0]).seconds) if index % 3 == 2 else None
    victim = rng.randrange(len(models))
    with new_spot(lab, name, journeys[0]) as spot:
        runs = [Run(lab, spot, lab.make(spot, model, goal)) for model in models]
        if after is not None and runs[victim].wait(after) is None:
            os.killpg(runs[victim].pid, signal.SIGKILL)
        for run in runs:
            run.wait()
        due = [0 if after is None or number != victim or run.status == 0 else 137 for number, run in enumerate(runs)]
        wrong = [
            f"a make ends with status {run.status}: {run.said()[-1500:]}"
            for run, status in zip(runs, due, strict=True)
            if run.status != status
        ]
        if after is None and index % 3 != 1 and start is None:
            builds = sum(run.said().count("/fp32: new") for run in runs)
            wrong += [] if builds == 1 else [f"fp32 was built {builds} times"]
        wrong += left_of(runs)
        for model in dict.fromkeys(models):
            wrong += differences(lab, spot, model, goal)
    what = f"4 makes at once, {len(set(models))} models, {told(journeys[0])}"
    killed = "" if after is None else f", one killed {after:.2f} s after the start"
    return Outcome(what + killed, True, tuple(wrong))
