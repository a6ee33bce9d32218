"""Measures how soon an artifact's first token is there and what memory that takes; writes docs/performance/cold-start.md.

python -m lab.cold_start ARTIFACT ...                    in interleaved rounds, with and without the user's cache
python -m lab.cold_start ARTIFACT ... --before FOLDER    also by another checkout's code
python -m lab.cold_start --reprint                       the page again, from docs/data/cold-start.json

Every sample is a process of its own over files in the page cache. "Library" is a process that has imported
`cuantiza.model`: from `load` to the first token. "Shell" is `cuantiza generate`, from the start of the process to the
first character after the prompt. Memory is read in the former when that token is there: USS is what only this process
has, RSS also counts mapped files and libraries, which processes share.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from cuantiza.core.errors import UserError, run
from cuantiza.core.machine.hardware import machine
from cuantiza.core.machine.progress import report as say
from cuantiza.core.machine.progress import track
from cuantiza.core.store import digests
from cuantiza.core.store.user_cache import OFF, VARIABLE
from lab import DATA, DOCS, ROOT
from lab.pages import filled, write

JSON, PAGE = DATA / "cold-start.json", DOCS / "performance" / "cold-start.md"
PROMPT, THREADS = "Me gusta mucho el futbol", 2
BEFORE, WITHOUT, MAKING, WITH = "before", "without the cache", "makes the copy", "with the cache"
# Also runs in other checkouts, so it imports no more of them than `load`.
_WORKER = """
import json, resource, sys, time
from cuantiza.model import load
from cuantiza.core.run.sampling import Sampling

def used():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime

start, busy = time.perf_counter(), used()
model = load(sys.argv[1], int(sys.argv[2]))
loaded = time.perf_counter()
next(model.tokens(model.encode(sys.argv[3]), 2, Sampling(0)))
told = {"load_s": loaded - start, "library_s": time.perf_counter() - start, "library_cpu_s": used() - busy}
for file in ("status", "smaps_rollup"):
    for line in open(f"/proc/self/{file}"):
        name, _, value = line.partition(":")
        if value.strip().endswith("kB"):
            told[name] = 1024 * int(value.split()[0])
told["uss_bytes"] = told["Private_Clean"] + told["Private_Dirty"]
print(json.dumps({"peak_bytes": told["VmHWM"], "rss_bytes": told["Rss"], "pss_bytes": told["Pss"],
                  **{name: value for name, value in told.items() if name.islower()}}))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.cold_start", description=__doc__)
    parser.add_argument("artifacts", nargs="*", type=Path, metavar="ARTIFACT", help="folders of artifacts")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="samples of each (default 9)")
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="another checkout, measured beside this one")
    parser.add_argument("--reprint", action="store_true", help="write the page from the JSON, without measuring")
    args = parser.parse_args(arguments)
    if not args.reprint:
        if not args.artifacts or args.rounds < 1:
            raise UserError("ARTIFACT, --rounds: name at least one artifact's folder, and a number from 1 on")
        write(JSON, json.dumps(measured(args.artifacts, args.rounds, args.before), indent=1) + "\n")
    write(PAGE, page(json.loads(JSON.read_text(encoding="utf-8"))))
    say(f"cold start {PAGE.relative_to(ROOT)}: written")
    return 0


def measured(artifacts: Sequence[Path], rounds: int, before: Path | None) -> dict:
    """The content of the JSON: samples of every artifact, by variant."""
    variants = [*([BEFORE] if before else []), WITHOUT, MAKING, WITH]
    with tempfile.TemporaryDirectory(prefix="cold-start-") as work:
        samples: dict[tuple[Path, str], list[dict]] = {(path, name): [] for path in artifacts for name in variants}
        for number in track(range(rounds), "rounds", rounds):
            for path in artifacts:
                # A cache of its own for each round, in which the first process makes the copy and the next finds it.
                caches = {MAKING: f"{work}/{number}", WITH: f"{work}/{number}"}
                for name in variants:
                    checkout = before if name == BEFORE and before else ROOT
                    environment = os.environ | {"PYTHONPATH": str(checkout), VARIABLE: caches.get(name, OFF)}
                    sample = in_library(path, checkout, environment)
                    if name != MAKING:  # which only one process does
                        if name == WITH:
                            sample = in_library(path, checkout, environment)  # the sha256 of the copy is known now
                        sample |= from_shell(path, checkout, environment)
                    samples[path, name].append(sample)
    return {
        "machine": machine(THREADS),
        "busy": os.getloadavg()[1] / (os.cpu_count() or 1),
        "versions": digests.versions("onnxruntime", "numpy", "tokenizers"),
        "rounds": rounds,
        "artifacts": [
            {"name": f"{path.parent.name}/{path.name}", "samples": {name: samples[path, name] for name in variants}}
            for path in artifacts
        ],
    }


def in_library(artifact: Path, checkout: Path, environment: dict[str, str]) -> dict:
    """A sample of a process that has imported the library. Raises UserError if it fails."""
    command = [sys.executable, "-c", _WORKER, str(artifact.absolute()), str(THREADS), PROMPT]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{artifact}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    return json.loads(done.stdout)


def from_shell(artifact: Path, checkout: Path, environment: dict[str, str]) -> dict:
    """A sample of the command. `shell_cpu_s` is that of the whole process."""
    options = ["--artifact", str(artifact.absolute()), "--threads", str(THREADS), "--tokens", "1", "--greedy"]
    command = [sys.executable, "-m", "cuantiza", "generate", *options, "--prompt", PROMPT]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with subprocess.Popen(
        command, cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as made:
        assert made.stdout is not None
        made.stdout.read(len(PROMPT.encode()) + 1)
        elapsed = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"shell_s": elapsed, "shell_cpu_s": busy}


def page(result: dict) -> str:
    """The page, from the content of the JSON."""
    shown = (("library_s", 1, 2), ("library_cpu_s", 1, 2), ("shell_s", 1, 2), ("shell_cpu_s", 1, 2))
    shown += tuple((f"{name}_bytes", 1e6, 0) for name in ("peak", "rss", "pss", "uss"))
    lines = []
    for artifact in result["artifacts"]:
        for name, samples in artifact["samples"].items():
            cells = [
                f"{median(sample[field] for sample in samples) / unit:.{digits}f}" if field in samples[0] else ""
                for field, unit, digits in shown
            ]
            lines.append([f"`{artifact['name']}`", name, *cells])
    return filled(ROOT / "lab" / "templates" / "cold-start.md.j2", lines=lines, **result)


if __name__ == "__main__":
    run(main)
