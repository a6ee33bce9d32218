"""The fault campaign: its short form, tests that it notices what is wrong, and tests of what its long form found."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cuantiza.core.errors import UserError
from cuantiza.core.store import artifact, folders
from lab import reliability_page
from lab.faults import __main__ as torture
from lab.faults import faults as torture_faults
from lab.faults.__main__ import Moment, Result
from lab.faults.disk import DAMAGES, mounted, spoil
from lab.faults.faults import Outcome
from lab.faults.laboratory import Change, Journey, Lab, Run, Timeline, Trap, differences, left_running, unsound

from helpers import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
TINY = "tiny-0"


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("torture").resolve())
    yield lab
    lab.close()


# --- the short form ---


@pytest.mark.parametrize(
    ("kind", "index"),
    [
        ("kill", 12),  # at a change, from nothing
        ("interrupt", 1),  # SIGTERM to make alone
        ("full-disk", 17),
        ("size-limit", 9),  # the least limit
        ("read-only", 5),  # everything is up to date, so nothing has to be written
        ("damage", 40),
    ],
)
def test_a_moment(lab: Lab, kind: str, index: int) -> None:
    result = torture.carry_out_one(lab, Moment(kind, index, 0))
    if result.outcome is None:
        pytest.skip(result.skipped)
    assert not result.outcome.wrong, (result.outcome.what, *result.outcome.wrong)
    assert not (lab.root / f"{kind}-{index}").exists()


# --- the campaign notices what is wrong ---


@pytest.fixture
def spot(lab: Lab, tmp_path: Path) -> Path:
    """A copy of finished outputs, for the test to damage."""
    shutil.copytree(lab.finished(TINY, "first"), tmp_path / "out")
    return tmp_path


def edit_report(spot: Path, change: Callable[[dict], None]) -> None:
    path = spot / "out/reports" / TINY / "report.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    change(report)
    path.write_text(json.dumps(report), encoding="utf-8")


def test_undisturbed_outputs_are_as_they_should(lab: Lab, spot: Path) -> None:
    """Other timings in a report are not a difference."""
    assert not differences(lab, spot, TINY, "first")
    edit_report(spot, lambda report: report["artifacts"][0].update(load_ms=1e9, peak_rss_bytes=1))
    assert not differences(lab, spot, TINY, "first")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda out: (out / f"artifacts/{TINY}/fp32/config.json").write_text("{}"), "not whole"),
        (lambda out: (out / f"artifacts/{TINY}/int8-static/stray").write_text(""), "not the bytes"),
        (lambda out: shutil.rmtree(out / f"artifacts/{TINY}/int8-static"), "holds"),
        (lambda out: (out / f"artifacts/{TINY}/int8-static/.tmp-x").mkdir(), ".tmp-x is left"),
        (lambda out: (out / f"reports/{TINY}/report.md").write_text("other"), "not the page"),
        (lambda out: (out / f"reports/{TINY}/report.json").write_text("{"), "no whole report"),
        (lambda out: edit_report(out.parent, lambda report: report["corpus"].update(bytes=1)), "corpus differ"),
        (
            lambda out: edit_report(out.parent, lambda report: report["artifacts"][1].update(perplexity=1.0)),
            "artifacts",
        ),
    ],
)
def test_what_is_wrong_is_noticed(lab: Lab, spot: Path, change: Callable[[Path], object], told: str) -> None:
    change(spot / "out")
    assert any(told in line for line in differences(lab, spot, TINY, "first"))


def test_an_artifact_of_other_bytes_is_noticed(lab: Lab, spot: Path) -> None:
    """The artifact agrees with its manifest, but an undisturbed run makes other bytes."""
    folder = spot / "out/artifacts" / TINY / "fp32"
    found = artifact.open_artifact(folder)
    with folders.staging(folder) as work:
        shutil.copytree(folder, work, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        (work / "model.onnx").write_bytes(found.model.read_bytes() + b"\0")
        facts = {key: getattr(found.manifest, key) for key in ("model", "recipe", "inputs", "parent", "calibration")}
        artifact.publish(work, folder, name="fp32", versions={}, details={}, **facts)
    artifact.open_artifact(folder)
    assert any("not the bytes" in line for line in unsound(lab, spot, TINY, ["first"]))


def test_a_process_that_is_left_is_noticed(lab: Lab, tmp_path: Path) -> None:
    run = Run(lab, tmp_path, ["sh", "-c", "sleep 600 & exit 0"])
    assert run.wait() == 0
    assert left_running([run.pid], grace_s=0.2) == ["sleep 600 "]
    run.end()
    assert not left_running([run.pid])


@pytest.mark.parametrize("how", DAMAGES)
def test_damage(tmp_path: Path, how: str) -> None:
    file, data = tmp_path / "file", bytes(range(200))
    file.write_bytes(data)
    spoil(file, how, random.Random(3))
    if how == "deleted":
        assert not file.exists()
        return
    now = file.read_bytes()
    if how.endswith("bit"):
        flipped = [bin(a ^ b).count("1") for a, b in zip(data, now, strict=True)]
        assert sum(flipped) == 1 and (how == "one bit" or flipped[0 if how == "first bit" else -1])
    else:
        assert now == data[: {"emptied": 0, "halved": 100, "without its last byte": 199}[how]]


# --- moments ---


def test_the_same_moment_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A moment always draws the same strike; both kinds of strike occur, and changes near a rename are preferred."""
    changes = [Change(i / 10, "os.rename" if i == 90 else "open", f"file{i}") for i in range(100)]
    monkeypatch.setattr(lab, "timeline", lambda journey: Timeline(10.0, tuple(changes)))
    strikes = [
        torture_faults._strike(lab, random.Random(f"0/kill/{index % 400}"), Journey(TINY, None, "first"))
        for index in range(800)
    ]
    assert strikes[:400] == strikes[400:] and len(set(strikes)) > 200
    at_changes = [strike.change for strike in strikes[:400] if strike.change is not None]
    assert 150 < len(at_changes) < 250 and all(
        strike.change is not None or 0 <= strike.after_s <= 10 for strike in strikes
    )
    near = sum(86 <= change <= 94 for change in at_changes)
    assert near > len(at_changes) / 6  # 9 of 100, chosen 4 times as often: 28 % are expected


def test_plan() -> None:
    moments = torture.plan([*torture.KINDS], 200, 7)
    counts = {kind: sum(moment.kind == kind for moment in moments) for kind in torture.KINDS}
    assert counts["kill"] == 200 and all(counts.values()) and len(set(moments)) == len(moments)
    # Damage: each way on each of an artifact's 6 files. Read-only: each way for each pair of start and goal.
    assert counts["damage"] >= 6 * len(DAMAGES) and counts["read-only"] >= 12
    assert all(sum(moment.kind == kind for moment in torture.plan([kind], 1, 7)) == 1 for kind in torture.KINDS)
    assert torture.only("kill/17", 7) == Moment("kill", 17, 7)
    assert Moment("kill", 17, 7).command.endswith("--seed 7 --only kill/17")


@pytest.mark.parametrize("options", [["--only", "kill"], ["--only", "rain/3"], ["--moments", "0"], ["--jobs", "-1"]])
def test_bad_options(options: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "lab.faults", *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {options[0]} {options[1]}: ")


# --- the hook ---

CHANGES = """
import sys
from pathlib import Path
out = Path(sys.argv[1])
(out / "a").mkdir()
for name in "bcd":
    try:
        (out / "a" / name).write_bytes(bytes(100_000))
    except OSError as error:
        print(error.errno)
(out / "a" / "d").rename(out / "e")
"""


def hooked(lab: Lab, spot: Path, out: Path, **trap: object) -> Run:
    out.mkdir(exist_ok=True)
    run = Run(lab, spot, [sys.executable, "-c", CHANGES, str(out)], Trap(str(spot / "log"), (str(out),), **trap))
    run.wait()
    return run


def test_the_hook_counts_changes(lab: Lab, tmp_path: Path) -> None:
    assert hooked(lab, tmp_path, tmp_path / "out").status == 0
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert [event for _, event, _ in lines] == ["os.mkdir", "open", "open", "open", "os.rename"]
    assert [Path(path).name for *_, path in lines] == ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize("number", range(5))
def test_the_hook_strikes_before_a_change(lab: Lab, tmp_path: Path, number: int) -> None:
    assert hooked(lab, tmp_path, tmp_path / "out", at=number).status == 128 + signal.SIGKILL
    done = [path.name for path in sorted((tmp_path / "out").rglob("*"))]
    assert done == ["a", "b", "c", "d"][:number]


@pytest.mark.parametrize("fill", ["bytes", "inodes"])
def test_the_hook_fills_the_disk(lab: Lab, tmp_path: Path, fill: str) -> None:
    """The disk is full from the second file on; the first file is whole."""
    try:
        with mounted(tmp_path / "out", "size=4m,nr_inodes=64") as disk:
            run = hooked(lab, tmp_path, disk, at=2, fill=fill, disk=str(disk))
            assert run.said().splitlines()[:2] == [str(errno.ENOSPC)] * 2
            assert (disk / "a/b").stat().st_size == 100_000
            assert not (disk / "a/c").exists() or not (disk / "a/c").stat().st_size
    except UserError as error:
        pytest.skip(str(error))


# --- the page ---

REPORT = {
    "schema": reliability_page.SCHEMA,
    "seed": 3,
    "kills": 50,
    "changes": {"from_nothing": 85, "over_finished": 113},
    "seconds": 1234,
    "machine": {"cpu": "A processor"},
    "versions": {"python": "3.11.7", "onnxruntime": "1.2.3"},
    "kinds": [
        {"kind": "kill", "fault": "SIGKILL.", "moments": 1050, "struck": 1007, "findings": 1, "skipped": None},
        {"kind": "full-disk", "fault": "No room.", "moments": 0, "struck": 0, "findings": 0, "skipped": "takes root"},
    ],
    "findings": [{"moment": "at 3 s", "wrong": ["not\nwhole"], "again": "python -m lab.faults --only kill/3"}],
}


def test_the_page_is_made_of_its_json(tmp_path: Path) -> None:
    reliability_page.publish(REPORT, tmp_path / "reliability.json")
    text = (tmp_path / "reliability.md").read_text(encoding="utf-8")
    for part in ("| `kill` | SIGKILL. | 1,050 | 1,007 | 1 |", "|  | all | 1,050 | 1,007 | 1 |", "takes root"):
        assert part in text
    for part in (
        "85 from nothing",
        "A processor",
        "| at 3 s | not whole | `",
        "--only kill/3` |",
        "--seed 3 --moments 50",
    ):
        assert part in " ".join(text.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reliability.json", "reliability.md"]
    quiet = REPORT | {"findings": []}
    reliability_page.publish(quiet, tmp_path / "reliability.json")
    assert "No moment of this campaign had a finding" in (tmp_path / "reliability.md").read_text(encoding="utf-8")
    (tmp_path / "reliability.json").write_text("{}")
    with pytest.raises(UserError, match=r"reliability\.json: is broken"):
        reliability_page.page(tmp_path)


def test_results_become_the_json_of_the_page(tmp_path: Path) -> None:
    outcomes = [Outcome("at 3 s", True, ("not whole",)), Outcome("at 4 s", False, ()), None]
    results = [Result(Moment("kill", index, 3), outcome, "no root") for index, outcome in enumerate(outcomes)]
    report = torture.to_json(results, 3, {"kills": 3, "changes": REPORT["changes"], "seconds": 5})
    (kind,) = report["kinds"]
    assert (kind["moments"], kind["struck"], kind["findings"], kind["skipped"]) == (2, 1, 1, "no root")
    assert report["findings"][0]["again"] == Moment("kill", 0, 3).command
    assert "--only kill/0" in reliability_page.fault_section(report)


def test_what_was_mended_is_held_by_a_test_that_exists() -> None:
    lines = (ROOT / "docs/reliability-found.md").read_text(encoding="utf-8").splitlines()
    tests = [line.split(" | ")[-1].strip("` |") for line in lines if line.startswith("| ") and "held by" not in line]
    assert len(tests) == 20
    for test in tests:
        file, _, name = test.partition("::")
        held = (ROOT / "tests" / file).read_bytes()
        assert not name or f"def {name}(".encode() in held, test


# --- what the campaign found ---


def test_a_report_with_another_figure_is_measured_again(lab: Lab, spot: Path) -> None:
    edit_report(spot, lambda report: report["artifacts"][0].update(load_ms=1e9))
    run = Run(lab, spot, lab.stages(spot, TINY, "first")[-1])
    assert run.wait() == 0, run.said()
    report = json.loads((spot / "out/reports" / TINY / "report.json").read_text(encoding="utf-8"))
    assert report["artifacts"][0]["load_ms"] != 1e9 and not differences(lab, spot, TINY, "first")


def test_a_write_that_fails_names_the_artifact(tmp_path: Path) -> None:
    """The operating system's error of a failed write names no file, so `staging` adds the artifact's folder."""
    with pytest.raises(OSError) as caught, folders.staging(tmp_path / "fp32"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.filename == str(tmp_path / "fp32") and not list(tmp_path.iterdir())
    with pytest.raises(OSError) as caught, folders.staging(tmp_path / "fp32"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "elsewhere")
    assert caught.value.filename == "elsewhere"
