"""Where the fault campaign works: a copy of the sources, small models, runs of the pipeline, checks of their outputs.

A `spot` is the folder of one moment. spot/out holds the pipeline's `artifacts` and `reports`; every other file in the
spot belongs to the campaign.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cuantiza.core.errors import UserError
from cuantiza.core.store import artifact, digests
from lab import ES_MINI, ROOT
from lab.checkpoints.random import checkpoint
from lab.checkpoints.shapes import Shape
from lab.faults.hook.sitecustomize import RECORD

HOOK = ROOT / "lab" / "faults" / "hook"
SOURCES = ("cuantiza", "export", "quantize", "eval", "lab", "setup", "corpus", "Makefile", "pyproject.toml")
# A random weight depends only on its name and shape, so the models differ in width to have different weights.
TINY = tuple(
    Shape(f"tiny-{number}", layers=2, width=32 + 8 * number, heads=2, vocabulary=8192, positions=64)
    for number in range(4)
)
MODELS = (*(shape.name for shape in TINY), ES_MINI.name)
# Options of make. After a run of "first", "opset" rebuilds everything and "corpus" rebuilds what is calibrated.
VARIANTS = {"first": {}, "opset": {"OPSET": "22"}, "corpus": {"CORPUS": "corpus/other"}}
EVAL = "--tokens 300 --rounds 1 --without-torch"
# Fields of a report that are measured again in each run, so they may differ from an undisturbed run's.
MEASURED = {"load_ms", "load_samples_ns", "peak_rss_bytes", "prefill", "decode"}
HASHES = {"sha256", "pages"}
PATIENCE_S = 1800  # a run must end within this time; long, because a shared machine may pause it
GRACE_S = 60  # processes must be gone this long after their leader ended


@dataclass(frozen=True)
class Trap:
    """Instructions for lab/faults/hook: log every change below `roots`, and strike at change number `at`.

    The hook strikes by sending `signal` to the process group (without `group`: to its leader) after `delay_s`. With
    `fill` ("bytes" or "inodes") it uses up those of the file system `disk` instead, all but `slack`.
    """

    log: str
    roots: tuple[str, ...]
    at: int | None = None
    delay_s: float = 0
    signal: int = signal.SIGKILL
    group: bool = True
    fill: str | None = None
    disk: str = ""
    slack: int = 0


@dataclass(frozen=True)
class Change:
    """A change below the output folders: seconds since the run's start, audit event, path below the spot's `out`."""

    seconds: float
    event: str
    path: str


@dataclass(frozen=True)
class Journey:
    """A run that builds the variant `goal` over the finished outputs of the variant `start` (None: from nothing)."""

    model: str
    start: str | None
    goal: str


@dataclass(frozen=True)
class Timeline:
    """The record of an undisturbed journey: its duration, and its changes in order."""

    seconds: float
    changes: tuple[Change, ...]


class Lab:
    """The campaign's folder: a copy of the sources, made at its start, the models, and undisturbed reference runs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sources = root / "sources"
        self.venv = Path(sys.prefix)
        self._lock = threading.RLock()
        self.sources.mkdir(parents=True)
        for name in SOURCES:
            copy = functools.partial(shutil.copytree, ignore=shutil.ignore_patterns("__pycache__"))
            (copy if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, self.sources / name)
        for shape in TINY:
            checkpoint(shape, self.sources / "models")
        shutil.copytree(ES_MINI, self.sources / "models" / ES_MINI.name)
        _other_corpus(self.sources / "corpus" / "es", self.sources / "corpus" / "other")
        self._timelines: dict[Journey, Timeline] = {}
        self._runs: list[Run] | None = []

    def close(self) -> None:
        """End every run, and refuse new ones."""
        runs, self._runs = self._runs or [], None
        for run in runs:
            run.end()

    def add(self, run: Run) -> None:
        """Remember `run`, so that `close` ends it. After `close`, ends `run` and raises UserError."""
        if self._runs is None:
            run.end()
            raise UserError("the campaign was interrupted")
        self._runs = [other for other in self._runs if other.process.returncode is None] + [run]

    def timeline(self, journey: Journey) -> Timeline:
        """The timeline of `journey`, which runs undisturbed the first time.

        Raises UserError if that run fails, or if its outputs differ from those of the same variant made from nothing.
        """
        with self._lock:
            if journey not in self._timelines:
                self._timelines[journey] = self._run_undisturbed(journey)
            return self._timelines[journey]

    def finished(self, model: str, variant: str) -> Path:
        """The output folder of an undisturbed run that made `variant` from nothing."""
        self.timeline(Journey(model, None, variant))
        return self.root / "undisturbed" / f"{model}-{variant}" / "out"

    def spot(self, name: str, journey: Journey) -> Path:
        """Make a new spot that holds the outputs from which `journey` starts."""
        folder = self.root / name
        folder.mkdir(parents=True)
        if journey.start is not None:
            shutil.copytree(self.finished(journey.model, journey.start), folder / "out")
        return folder

    def _run_undisturbed(self, journey: Journey) -> Timeline:
        start = f"{journey.start}-" if journey.start else ""
        spot = self.spot(f"undisturbed/{journey.model}-{start}{journey.goal}", journey)
        trap = Trap(str(spot / "log"), tuple(str(spot / "out" / name) for name in ("artifacts", "reports")))
        begin, since = time.monotonic(), time.time()
        run = Run(self, spot, self.make(spot, journey.model, journey.goal), trap)
        if run.wait() != 0:
            raise UserError(f"{journey}: the undisturbed run ended with status {run.status}: {run.said()[-2000:]}")
        seconds = time.monotonic() - begin
        if journey.start is not None:
            # The bytes must not depend on what was there before the run.
            if wrong := differences(self, spot, journey.model, journey.goal):
                raise UserError(
                    f"{journey}: the undisturbed run differs from one that began with nothing: {'; '.join(wrong)}"
                )
            shutil.rmtree(spot / "out")
        return Timeline(seconds, _read_log(spot, since))

    def make(self, spot: Path, model: str, variant: str) -> list[str]:
        """The command `make export quantize eval`, with its outputs in `spot`."""
        options = {
            "VENV": str(self.venv),
            "MODEL": f"models/{model}",
            "OUT": f"{spot}/out/artifacts",
            "REPORTS": f"{spot}/out/reports",
            "EVAL": EVAL,
        } | VARIANTS[variant]
        # -o tells make not to rebuild the environment: the copied files have new times, which would make it look stale.
        goals = ["make", "-o", f"{self.venv}/.stamp", "export", "quantize", "eval"]
        return [*goals, *(f"{name}={value}" for name, value in options.items())]

    def stages(self, spot: Path, model: str, variant: str) -> list[list[str]]:
        """The stages' own commands, as `make export quantize eval` runs them for `variant`."""
        given = VARIANTS[variant]
        corpus = ["--corpus", given.get("CORPUS", "corpus/es")]
        artifacts, reports = f"{spot}/out/artifacts", f"{spot}/out/reports"
        stages = (
            ["export", "--opset", given.get("OPSET", "21"), "--output", artifacts],
            ["quantize", *corpus, "--output", artifacts],
            ["eval", *corpus, "--artifacts", artifacts, "--output", reports, *EVAL.split()],
        )
        return [[sys.executable, "-m", *stage, "--model", f"models/{model}"] for stage in stages]


class Run:
    """A command that runs in the copy of the sources, as the leader of its own session. Its output goes to a file."""

    def __init__(self, lab: Lab, spot: Path, command: Sequence[str], trap: Trap | None = None, **kwargs) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
        if trap:
            environment |= {"TORTURE": json.dumps(dataclasses.asdict(trap)), "PYTHONPATH": str(HOOK)}
        spot.mkdir(parents=True, exist_ok=True)
        self._log = spot / f"said-{time.monotonic_ns()}.txt"
        with self._log.open("wb") as said:
            self.process = subprocess.Popen(
                command,
                cwd=lab.sources,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
                **kwargs,
            )
        lab.add(self)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def status(self) -> int | None:
        """The exit status as a shell reports it: 128 + the signal's number after a signal. None while it runs."""
        code = self.process.returncode
        return code if code is None or code >= 0 else 128 - code

    def wait(self, timeout: float = PATIENCE_S) -> int | None:
        """Wait for the end and return the status; None if the command still runs after `timeout` seconds."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        return self.status

    def said(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def end(self) -> None:
        """Kill every process of the session that still runs."""
        for pid in session([self.pid]):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


def session(leaders: Sequence[int]) -> list[int]:
    """The ids of the processes that still run in the sessions of `leaders`, in order."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, *fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) in leaders and state not in "ZX":
            found.append(int(entry.name))
    return sorted(found)


def left_running(leaders: Sequence[int], grace_s: float = GRACE_S) -> list[str]:
    """Command lines of the processes in the sessions of `leaders` that still run after `grace_s` seconds."""
    deadline = time.monotonic() + grace_s
    while (pids := session(leaders)) and time.monotonic() < deadline:
        time.sleep(0.05)
    names = []
    for pid in pids:
        try:
            names.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:200])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return names


def leftovers(spot: Path) -> list[str]:
    """Temporary files and folders that are still below the outputs."""
    return sorted(str(path.relative_to(spot)) for path in (spot / "out").rglob(".tmp-*"))


def files_of(folder: Path) -> dict[str, str]:
    """The sha256 of every file below `folder`, by its relative path."""
    return {
        str(path.relative_to(folder)): digests.sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def unsound(lab: Lab, spot: Path, model: str, variants: Sequence[str]) -> list[str]:
    """Return what is wrong with the outputs for `model` in `spot`.

    This must hold at any moment: each artifact is whole and equals that of one of `variants`, and a report is JSON.
    """
    wrong = []
    for path in sorted((spot / "out" / "artifacts" / model).glob("[!.]*")):
        try:
            artifact.open_artifact(path)
        except UserError as error:
            wrong.append(f"not whole: {error}")
            continue
        known = [files_of(lab.finished(model, variant) / "artifacts" / model / path.name) for variant in variants]
        if files_of(path) not in known:
            wrong.append(f"{path}: opens, but is not the bytes of an undisturbed run")
    report = spot / "out" / "reports" / model / "report.json"
    if report.is_file():
        try:
            json.loads(report.read_text(encoding="utf-8"))
        except ValueError as error:
            wrong.append(f"{report}: {error}")
    return wrong


def differences(lab: Lab, spot: Path, model: str, variant: str) -> list[str]:
    """Return where the outputs in `spot` differ from an undisturbed run of `variant`, except for a report's timings."""
    theirs, ours = lab.finished(model, variant), spot / "out"
    wrong = unsound(lab, spot, model, [variant])
    names = [sorted(path.name for path in (out / "artifacts" / model).glob("[!.]*")) for out in (theirs, ours)]
    if names[0] != names[1]:
        wrong.append(f"{ours}/artifacts/{model} holds {names[1]} where an undisturbed run leaves {names[0]}")
    wrong += [f"{name} is left" for name in leftovers(spot)]
    folder = ours / "reports" / model
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        reference = json.loads((theirs / "reports" / model / "report.json").read_text(encoding="utf-8"))
        wrong += [
            f"{folder / name}: is not the page of its report"
            for name in reference["pages"]
            if digests.sha256_file(folder / name) != report["pages"][name]
        ]
        if changed := [key for key in reference if _content(report).get(key) != _content(reference).get(key)]:
            wrong.append(f"{folder}/report.json: {', '.join(changed)} differ from an undisturbed run's")
    except (OSError, ValueError, KeyError) as error:
        wrong.append(f"{folder}: no whole report ({error!r})")
    return wrong


def _content(report: dict) -> dict:
    """`report` without the timings and memory figures of this run, and without the hashes that depend on them."""
    rows = [{key: value for key, value in row.items() if key not in MEASURED} for row in report["artifacts"]]
    return {key: value for key, value in report.items() if key not in HASHES} | {"artifacts": rows}


def _read_log(spot: Path, since: float) -> tuple[Change, ...]:
    data = (spot / "log").read_bytes()
    changes = []
    for start in range(0, len(data), RECORD):
        seconds, event, path = data[start : start + RECORD].decode(errors="replace").split(maxsplit=2)
        changes.append(Change(float(seconds) - since, event, path.strip().removeprefix(f"{spot}/out/")))
    return tuple(changes)


def _other_corpus(source: Path, target: Path) -> None:
    """Copy a corpus, and move one document from its calibration split to its test split."""
    shutil.copytree(source, target)
    index = json.loads((target / "index.json").read_text(encoding="utf-8"))
    next(item for item in index["documents"] if item["split"] == "calibration")["split"] = "test"
    (target / "index.json").write_text(json.dumps(index), encoding="utf-8")
