"""The fault campaign kills, interrupts and damages `make export quantize eval`, or fills its disk, at many moments.

python -m lab.faults [--moments 200] [--seed 0] [--output docs/data/reliability.json] [--kinds KIND ...]
python -m lab.faults --seed 0 --only kill/17      repeats one moment
python -m lab.faults --kinds interrupt --output docs/data/reliability.json   repeats one kind; the others stay as they were

After each fault, every artifact that exists must be whole, and the next make must end with the bytes of an undisturbed
run. If that does not hold, it is a finding and the exit status is 1. Each finding names the command that repeats its
moment. `--moments` is the number of kills; each other kind of fault gets a fixed share of that number.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cuantiza.core.errors import UserError, run
from cuantiza.core.machine.hardware import machine, software
from cuantiza.core.machine.progress import report as say
from cuantiza.core.machine.progress import track, working
from lab.faults import disk as torture_disk
from lab.faults import faults as torture_faults
from lab.faults.faults import Fault, Outcome
from lab.faults.laboratory import Journey, Lab
from lab.reliability_page import SCHEMA, publish


@dataclass(frozen=True)
class Kind:
    """A kind of fault, and the ratio of its number of moments to the number of kills."""

    fault: Fault
    share: float


KINDS = {
    "kill": Kind(torture_faults.kill, 1),
    "kill-one": Kind(torture_faults.kill_one, 1 / 8),
    "interrupt": Kind(torture_faults.interrupt, 1 / 3),
    "crowd": Kind(torture_faults.crowd, 1 / 20),
    "full-disk": Kind(torture_disk.full_disk, 5 / 8),
    "size-limit": Kind(torture_disk.size_limit, 1 / 20),
    "read-only": Kind(torture_disk.read_only, 3 / 50),
    "damage": Kind(torture_disk.damage, 1 / 4),
}


# The page says how many changes to the output folders each of these runs makes.
JOURNEYS = {"from_nothing": Journey("tiny-0", None, "first"), "over_finished": Journey("tiny-0", "first", "opset")}


@dataclass(frozen=True)
class Moment:
    """One fault: the `index`-th of its kind. These three fields seed everything that is random about it."""

    kind: str
    index: int
    seed: int

    @property
    def command(self) -> str:
        """The command that repeats this moment."""
        return f"python -m lab.faults --seed {self.seed} --only {self.kind}/{self.index}"


@dataclass(frozen=True)
class Result:
    """A moment and its outcome. If the moment could not be tried on this machine, `skipped` says why."""

    moment: Moment
    outcome: Outcome | None
    skipped: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.faults", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--moments", type=int, default=200, help="number of kills; other faults in proportion (default 200)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default 0)")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=[*KINDS], help="kinds of fault to try (default: all)"
    )
    parser.add_argument("--only", metavar="KIND/NUMBER", help="repeat one moment, as a finding names it")
    parser.add_argument("--jobs", type=int, default=1, help="moments to try at the same time (default 1)")
    parser.add_argument("--work", type=Path, help="folder for the campaign's temporary folder (default: the system's)")
    parser.add_argument("--output", type=Path, help="write the campaign's JSON here, and its page beside it")
    args = parser.parse_args()
    for option in ("moments", "jobs"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option} {getattr(args, option)}: give 1 or more")
    moments = [only(args.only, args.seed)] if args.only else plan(args.kinds, args.moments, args.seed)
    # A shell starts background jobs with SIGINT ignored. The runs would inherit that, so restore the default handler.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cuantiza-torture-", dir=args.work) as folder, working("faults"):
        lab = Lab(Path(folder).resolve())
        results = []
        for result in track(carry_out(lab, moments, args.jobs), "torture   ", len(moments)):
            results.append(result)
            for line in told(result, verbose=args.only is not None):
                say(line)
        changes = (
            {name: len(lab.timeline(journey).changes) for name, journey in JOURNEYS.items()} if args.output else {}
        )
    findings = sum(bool(result.outcome and result.outcome.wrong) for result in results)
    say(f"torture   {len(results)} moments, {findings} with findings")
    if args.output:
        counts = {"kills": args.moments, "changes": changes, "seconds": round(time.monotonic() - start)}
        publish(join(to_json(results, args.seed, counts), args.output), args.output)
        say(f"torture   {args.output}: written")
    return 1 if findings else 0


def plan(kinds: list[str], moments: int, seed: int) -> list[Moment]:
    """The moments of a campaign with `moments` kills, grouped by kind; each kind has at least one."""
    return [
        Moment(kind, index, seed)
        for kind in KINDS
        if kind in kinds
        for index in range(max(1, round(moments * KINDS[kind].share)))
    ]


def only(spec: str, seed: int) -> Moment:
    """The moment that `spec`, such as kill/17, names. Raises UserError if `spec` is malformed."""
    kind, _, index = spec.partition("/")
    if kind not in KINDS or not index.isdecimal():
        raise UserError(
            f"--only {spec}: is not a moment; give KIND/NUMBER such as kill/17, with a kind from {', '.join(KINDS)}"
        )
    return Moment(kind, int(index), seed)


def carry_out(lab: Lab, moments: list[Moment], jobs: int) -> Iterator[Result]:
    """Try the moments, `jobs` at a time, and yield their results in order."""
    with ThreadPoolExecutor(jobs) as pool:
        try:
            yield from pool.map(lambda moment: carry_out_one(lab, moment), moments)
        finally:
            lab.close()
            pool.shutdown(cancel_futures=True)


def carry_out_one(lab: Lab, moment: Moment) -> Result:
    rng = random.Random(f"{moment.seed}/{moment.kind}/{moment.index}")
    try:
        return Result(moment, KINDS[moment.kind].fault(lab, rng, moment.index, f"{moment.kind}-{moment.index}"))
    except UserError as error:
        return Result(moment, None, str(error))


def told(result: Result, verbose: bool = False) -> Iterator[str]:
    """Yield the lines to print about a moment that was skipped or has a finding, or about any moment if `verbose`."""
    if result.outcome is None:
        yield f"skipped   {result.moment.kind}/{result.moment.index}: {result.skipped}"
    elif result.outcome.wrong or verbose:
        yield f"{'FINDING' if result.outcome.wrong else 'fine   '}   {result.outcome.what}"
        yield from (f"          {line}" for line in result.outcome.wrong)
        yield f"          again: {result.moment.command}"


def to_json(results: list[Result], seed: int, counts: dict) -> dict:
    """The content of docs/data/reliability.json (lab/reliability_page.py). `counts` are about the whole campaign."""
    kinds = []
    for kind in dict.fromkeys(result.moment.kind for result in results):
        own = [result for result in results if result.moment.kind == kind]
        outcomes = [result.outcome for result in own if result.outcome]
        kinds.append(
            {
                "kind": kind,
                "fault": KINDS[kind].fault.__doc__.strip(),
                "moments": len(outcomes),
                "struck": sum(outcome.struck for outcome in outcomes),
                "findings": sum(bool(outcome.wrong) for outcome in outcomes),
                "skipped": next((result.skipped for result in own if result.skipped), None),
            }
        )
    found = [result for result in results if result.outcome and result.outcome.wrong]
    return {
        "schema": SCHEMA,
        "seed": seed,
        **counts,
        "machine": {key: value for key, value in machine(1).items() if key != "threads"},
        "versions": software(),
        "kinds": kinds,
        "findings": [
            {"moment": item.outcome.what, "wrong": list(item.outcome.wrong), "again": item.moment.command}
            for item in found
        ],
    }


def join(report: dict, path: Path) -> dict:
    """Add to `report` the kinds that it did not try, as the file `path` has them.

    That happens only if the file comes from the same seed, number of kills, machine and versions.
    """
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return report
    if any(old[key] != report[key] for key in ("schema", "seed", "kills", "machine", "versions")):
        return report
    tried = {row["kind"] for row in report["kinds"]}
    rows = {row["kind"]: row for row in [*old["kinds"], *report["kinds"]]}
    kept = [item for item in old["findings"] if item["again"].split()[-1].split("/")[0] not in tried]
    return report | {
        "kinds": [rows[kind] for kind in KINDS if kind in rows],
        "findings": [*kept, *report["findings"]],
        "seconds": old["seconds"] + report["seconds"],
    }


if __name__ == "__main__":
    run(main)
