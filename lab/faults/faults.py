"""The faults of the campaign: each does its harm to one run of the pipeline, and tells what does not hold afterwards."""

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

from lab.checkpoints.random import ES_MINI
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

EVERY_ES_MINI = 8  # of the moments that take any model, one in so many has the embedded one
NEAR_RENAME = 4  # changes that come so soon before or after a rename are chosen NEAR_RENAME times as often


@dataclass(frozen=True)
class Outcome:
    """`what` was done; whether it `struck` (a moment may come after the run's end); what is `wrong` afterwards."""

    what: str
    struck: bool
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Strike:
    """A moment of a run: seconds after its start, or a change of the timeline and a delay behind its beginning."""

    after_s: float | None = None
    change: int | None = None
    delay_s: float = 0
    text: str = ""


Fault = Callable[[Lab, random.Random, int, str], Outcome]


# --- what all share ---


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
    return f"{journey.model}, {'from nothing' if journey.start is None else f'over another, {journey.goal} changed'}"


def _strike(lab: Lab, rng: random.Random, journey: Journey) -> Strike:
    """Half of them anywhere in time, half at a change below the output folders, renames and their like preferred."""
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
    """`commands` in turn until one does not end with 0; signal `number` falls on the one that runs at the strike."""
    trap = None
    if strike.change is not None:
        trap = trap_of(spot, at=strike.change, delay_s=strike.delay_s, signal=number, group=group)
    begin, sent, runs = time.monotonic(), False, []
    for command in commands:
        run = Run(lab, spot, command, trap)
        runs.append(run)
        # A strike between two commands falls on the first moment of the next.
        wait_s = None if strike.after_s is None or sent else max(0.0, begin + strike.after_s - time.monotonic())
        if wait_s is not None and run.wait(wait_s) is None:
            (os.killpg if group else os.kill)(run.pid, number)
            sent = True
        if run.wait() != 0:
            break
    return runs


def left_of(runs: Sequence[Run]) -> list[str]:
    """What still runs of `runs` or was left by them; it is ended here."""
    wrong = [f"still running: {name}" for name in left_running([run.pid for run in runs])]
    for run in runs:
        run.end()
    return wrong


def next_make(lab: Lab, spot: Path, journey: Journey) -> list[str]:
    """What is wrong after the next, undisturbed make."""
    run = Run(lab, spot, lab.make(spot, journey.model, journey.goal))
    run.wait()
    wrong = []
    if run.status != 0:
        wrong.append(f"the next make ends with status {run.status}: {run.said()[-1500:]}")
    if "waiting for another run" in run.said():
        wrong.append("the next make waits for a lock that nobody holds")
    return wrong + left_of([run]) + differences(lab, spot, journey.model, journey.goal)


def variants(journey: Journey) -> list[str]:
    return [name for name in VARIANTS if name in (journey.start, journey.goal)]


def _is_traceback(said: str, sources: str) -> bool:
    """Whether there is one that is ours to prevent: not of the interpreter's start, before any file but its own runs."""
    if "Traceback" not in said and "Exception ignored" not in said:
        return False
    return any(place in said for place in (sources, "site-packages", "multiprocessing"))


# --- the faults ---


def kill(lab: Lab, rng: random.Random, index: int, name: str) -> Outcome:
    """SIGKILL to the whole process group of `make export quantize eval`."""
    journey = _journey(rng, index)
    strike = _strike(lab, rng, journey)
    with new_spot(lab, name, journey) as spot:
        runs = _disturbed(lab, spot, [lab.make(spot, journey.model, journey.goal)], strike, signal.SIGKILL)
        struck = runs[-1].status != 0
        wrong = left_of(runs) + unsound(lab, spot, journey.model, variants(journey)) + next_make(lab, spot, journey)
    return Outcome(f"SIGKILL to the group, {told(journey)}, {strike.text}", struck, tuple(wrong))


def kill_one(lab: Lab, rng: random.Random, index: int, name: str) -> Outcome:
    """SIGKILL to one process of the pipeline, as the kernel does where memory runs out; the next make comes at once."""
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
        # What make left running may hold the lock with good reason: then the next make waits for its end.
        again = Run(lab, spot, lab.make(spot, journey.model, journey.goal))
        again.wait()
        wrong = [] if again.status == 0 else [f"the next make ends with {again.status}: {again.said()[-1500:]}"]
        wrong += [f"a traceback: {run.said()[-1500:]}"] if "Traceback" in run.said() else []
        wrong += left_of([run, again]) + differences(lab, spot, journey.model, journey.goal)
    return Outcome(
        f"SIGKILL to {victim or 'nobody'}, {told(journey)}, {after:.2f} s after its start", bool(victim), tuple(wrong)
    )


def interrupt(lab: Lab, rng: random.Random, index: int, name: str) -> Outcome:
    """SIGINT to the group, as Ctrl-C does it, or SIGTERM to the group or to its leader; make, or the stages by themselves."""
    journey = _journey(rng, index)
    number = rng.choice([signal.SIGINT, signal.SIGTERM])
    group = number == signal.SIGINT or rng.random() < 0.5
    through_make = rng.random() < 0.5
    strike = _strike(lab, rng, journey)
    with new_spot(lab, name, journey) as spot:
        make, stages = ([command(spot, journey.model, journey.goal)] for command in (lab.make, lab.stages))
        runs = _disturbed(lab, spot, make if through_make else stages[0], strike, number, group=group)
        last, wrong = runs[-1], []
        # Python gives 1 itself where a Ctrl-C falls into its own start, and make tells its own.
        if last.status not in (0, 128 + number) and "KeyboardInterrupt" not in last.said():
            wrong.append(f"status {last.status} where {128 + number} is due: {last.said()[-1500:]}")
        if _is_traceback(last.said(), str(lab.sources)):
            wrong.append(f"a traceback: {last.said()[-1500:]}")
        wrong += left_of(runs) + [f"{item} is left" for item in leftovers(spot)]
        wrong += unsound(lab, spot, journey.model, variants(journey)) + next_make(lab, spot, journey)
    to = "the group" if group else "its leader"
    what = f"{number.name} to {to} of {'make' if through_make else 'a stage'}, {told(journey)}, {strike.text}"
    return Outcome(what, last.status != 0, tuple(wrong))


def crowd(lab: Lab, rng: random.Random, index: int, name: str) -> Outcome:
    """4 makes at once into the same folders: on one model, on four, and on one with one of the makes killed."""
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
