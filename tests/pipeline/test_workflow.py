"""The GitHub Action, and the workflow that a user copies: they call what exists, and give strangers no rights."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import yaml

from cuantiza.core.onnx import file as onnx_file
from cuantiza.core.store import artifact

from helpers import ROOT

ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
STEPS = {step.get("id") or step.get("name"): step for step in ACTION["runs"]["steps"] if "run" in step}
QUICK = "--without-latency --tokens 1500"


PINNED = r"actions/[a-z/-]+@[0-9a-f]{40}"


def workflow() -> tuple[dict, str]:
    path = ROOT / "docs/examples/compare.yml"
    return yaml.safe_load(path.read_text(encoding="utf-8")), path.read_text(encoding="utf-8")


def test_the_workflow_gives_strangers_no_rights():
    fields, text = workflow()
    assert fields["permissions"] == {} and "pull_request" in fields[True]  # YAML reads `on` as true
    jobs = fields["jobs"]
    assert "pull_request_target" not in text and "secrets." not in text
    assert jobs["compare"]["permissions"] == {"contents": "read"}
    assert jobs["comment"]["permissions"] == {"pull-requests": "write"}
    # What may write runs no code of the pull request, and not for one from a fork.
    assert not [step for step in jobs["comment"]["steps"] if "run" in step or "checkout" in step.get("uses", "")]
    assert "head.repo.full_name == github.repository" in jobs["comment"]["if"]
    for job in jobs.values():
        for step in job["steps"]:
            assert "uses" not in step or step["uses"] == "./head" or re.fullmatch(PINNED, step["uses"]), step


def test_the_workflow_calls_what_exists() -> None:
    fields, _ = workflow()
    (given,) = [step["with"] for step in fields["jobs"]["compare"]["steps"] if step.get("uses") == "./head"]
    assert given.keys() <= ACTION["inputs"].keys()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    for side in ("base", "head"):
        program, option, folder, *words = given[f"build-{side}"].split()
        assert (program, option, folder) == ("make", "-C", side) and given[side].startswith(f"{side}/artifacts/")
        assert words == ["export", "quantize", 'RECIPES="$RECIPES"'] and {"export", "quantize"} <= targets


def test_make_compare_passes_its_options_on() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^compare:.*\n\t(.+)", makefile, re.MULTILINE)
    assert recipe and "cuantiza compare" in recipe[1] and "$(ARGS)" in recipe[1]


def test_the_action_takes_what_it_declares_and_only_through_the_environment() -> None:
    text = (ROOT / "action.yml").read_text(encoding="utf-8")
    used = set(re.findall(r"inputs\.([a-z-]+)", text))
    assert used == ACTION["inputs"].keys()
    for step in ACTION["runs"]["steps"]:
        # A value written into a script could end its line and begin a command of its own.
        assert "${{" not in step.get("run", "") and ("run" in step) == ("shell" in step)
        assert "run" in step or re.fullmatch(PINNED, step["uses"]), step


@dataclass(frozen=True)
class Job:
    """What a runner gives a step, and what the steps leave."""

    folder: Path

    def run(self, name: str, path: str = os.environ["PATH"], **inputs: str) -> subprocess.CompletedProcess[str]:
        """A step's own lines by GitHub's own shell, in a workspace, with `inputs` of the action."""
        given = {key: field.get("default", "") for key, field in ACTION["inputs"].items()}
        given |= {key.replace("_", "-"): value for key, value in inputs.items()}
        values = {"github.action_path": str(ROOT), **{f"inputs.{key}": value for key, value in given.items()}}
        env = {
            key: re.sub(r"\$\{\{ (.+?) \}\}", lambda name: values[name[1]], text)
            for key, text in STEPS[name]["env"].items()
        }
        files = {key: str(self.folder / key) for key in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY", "RUNNER_TEMP")}
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", STEPS[name]["run"]]
        env = {**os.environ, **env, **files, "PATH": path}
        return subprocess.run(command, cwd=self.folder / "work", env=env, capture_output=True, text=True, timeout=300)

    def left(self, name: str) -> str:
        path = self.folder / name
        return path.read_text(encoding="utf-8") if path.exists() else ""


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A job whose install step is done: `cuantiza` there is this checkout's."""
    (tmp_path / "work").mkdir()
    command = tmp_path / "RUNNER_TEMP/cuantiza/bin/cuantiza"
    command.parent.mkdir(parents=True)
    command.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m cuantiza "$@"\n')
    command.chmod(0o755)
    return Job(tmp_path)


@pytest.fixture
def folders(es_mini_fp32: artifact.Artifact, tmp_path: Path) -> Callable[[int], Path]:
    """`folders(n)`: a folder of one artifact, with `n` bytes that nothing uses among its weights."""

    def make(extra: int) -> Path:
        model, work, told = onnx_file.load(es_mini_fp32.model), tmp_path / "made", es_mini_fp32.manifest
        padding = ir.tensor(np.zeros(extra, np.uint8), name="padding")
        model.graph.register_initializer(ir.Value(name="padding", const_value=padding))
        shutil.copytree(es_mini_fp32.path, work)
        for name in ("manifest.json", "model.onnx", "model.onnx.data"):
            (work / name).unlink(missing_ok=True)
        onnx_file.save(model, work)
        fields = {name: getattr(told, name) for name in ("name", "model", "recipe", "inputs", "parent", "calibration")}
        folder = tmp_path / f"work/{extra}"
        folder.mkdir()
        artifact.publish(work, folder / told.name, **fields, versions=told.versions, details=told.details)
        return folder

    return make


def test_the_action_passes_what_is_no_worse(job: Job, folders: Callable[[int], Path]) -> None:
    done = job.run("compare", base=str(folders(10)), head=str(folders(11)), args=QUICK)
    assert done.returncode == 0 and job.left("GITHUB_OUTPUT") == "status=0\n", done.stdout + done.stderr
    page = job.left("work/reports/compare.md")
    assert "fp32" in page and job.left("GITHUB_STEP_SUMMARY") == page


def test_the_action_fails_on_a_regression(job: Job, folders: Callable[[int], Path]) -> None:
    done = job.run("compare", base=str(folders(0)), head=str(folders(2_000_000)), args=QUICK, output="page.md")
    assert done.returncode == 1 and job.left("GITHUB_OUTPUT") == "status=1\n", done.stdout + done.stderr
    assert "REGRESSION" in job.left("GITHUB_STEP_SUMMARY").upper() and job.left("work/page.md")
    # The workspace's own budgets come before the action's, and an input before both.
    generous = (ROOT / "budgets.toml").read_text(encoding="utf-8").replace("size = 1.0", "size = 99.0")
    (job.folder / "work/budgets.toml").write_text(generous, encoding="utf-8")
    sides = {"base": "0", "head": "2000000", "args": QUICK}
    assert job.run("compare", **sides).returncode == 0
    assert job.run("compare", **sides, budgets=str(ROOT / "budgets.toml")).returncode == 1


def test_the_action_reads_args_as_a_shell_reads_words(job: Job) -> None:
    told = job.folder / "told"
    command = job.folder / "RUNNER_TEMP/cuantiza/bin/cuantiza"
    command.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{told}"\n')
    for args, words in (
        ("--without-latency\n--corpus 'my texts/a.txt'\n", ["--without-latency", "--corpus", "my texts/a.txt"]),
        ("--corpus \"$(touch ran) # $HOME\" ''", ["--corpus", "$(touch ran) # $HOME", ""]),
        ("", []),
    ):
        done = job.run("compare", base="a", head="b", args=args)
        assert done.returncode == 0, done.stderr
        assert told.read_text().split("\n")[9:-1] == words and not (job.folder / "work/ran").exists()
    told.unlink()
    done = job.run("compare", base="a", head="b", args="--corpus 'my texts")
    assert done.returncode == 2 and not told.exists() and "No closing quotation" in job.left("GITHUB_STEP_SUMMARY")


def test_the_action_says_why_nothing_was_compared(job: Job, folders: Callable[[int], Path]) -> None:
    done = job.run("compare", base=str(folders(0)), head="elsewhere", args=QUICK)
    assert done.returncode == 2 and job.left("GITHUB_OUTPUT") == "status=2\n", done.stdout + done.stderr
    summary = job.left("GITHUB_STEP_SUMMARY")
    assert "were not compared" in summary and "HEAD=elsewhere" in summary and not job.left("work/reports/compare.md")


def test_the_action_builds_what_is_not_there(job: Job) -> None:
    commands = "mkdir built\ncuantiza --version > built/version"
    for side, name in (("base", "Build base"), ("head", "Build head")):
        done = job.run(name, **{side: "built", f"build_{side}": commands})
        assert done.returncode == 0 and job.left("work/built/version").startswith("cuantiza "), done.stderr
        again = job.run(name, **{side: "built", f"build_{side}": "false"})
        assert again.returncode == 0  # a folder from the cache, say
        shutil.rmtree(job.folder / "work/built")
        failed = job.run(name, **{side: "built", f"build_{side}": "false\nmkdir built"})
        assert failed.returncode == 1 and not (job.folder / "work/built").exists()


def test_the_action_installs_its_own_checkout_with_the_pinned_versions(job: Job) -> None:
    programs = job.folder / "programs"
    programs.mkdir()
    pip = job.folder / "RUNNER_TEMP/cuantiza/bin/python"
    pip.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$RUNNER_TEMP/asked"\n')
    (programs / "python3").write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$RUNNER_TEMP/venv"\n')
    for script in (pip, programs / "python3"):
        script.chmod(0o755)
    (install,) = [name for name in STEPS if name.startswith("Install")]
    done = job.run(install, path=f"{programs}:{os.environ['PATH']}", extras="export")
    assert done.returncode == 0, done.stderr
    assert job.left("RUNNER_TEMP/venv").split() == ["-m", "venv", str(job.folder / "RUNNER_TEMP/cuantiza")]
    asked = job.left("RUNNER_TEMP/asked").splitlines()
    assert asked[:3] == ["-m", "pip", "install"] and asked[-1] == f"{ROOT}[export]"
    pins = re.findall(r"^([A-Za-z0-9._-]+==[^ ]+)", (ROOT / "setup/default.txt").read_text(), re.MULTILINE)
    assert job.left("RUNNER_TEMP/constraints.txt").split() == pins and len(pins) > 50
    assert asked[asked.index("--constraint") + 1] == str(job.folder / "RUNNER_TEMP/constraints.txt")
