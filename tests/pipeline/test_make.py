"""make, as a user calls it: nothing is done twice, what changed is rebuilt, and no moment spoils an artifact."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cuantiza.core.store.artifact import open_artifact

from helpers import CORPUS, ROOT, Result, copy_tokenizer, tiny_gpt2

QUICK = "EVAL=--tokens 300 --rounds 1 --without-torch"
PLACES = ("", "OPTIMUM_", "PEERS_", "RUNTIMES_", "RAY_", "RELEASE_")
GOALS = ("optimum", "peers", "runtimes-env", "ray", "sbom")
RECIPES = ("fp32", "int8-dynamic", "int8-static", "int8-dynamic-ort")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of the sources, with a tiny model of its own, that uses this environment."""
    folder = tmp_path / "clone"
    for name in ("cuantiza", "export", "quantize", "eval", "setup"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    tiny_gpt2(n_positions=64).save_pretrained(folder / "tiny")
    copy_tokenizer(folder / "tiny")
    shutil.copytree(CORPUS, folder / "texts")
    return folder


def command(clone: Path, *goals: str) -> list[str]:
    venv = Path(sys.executable).parent.parent
    # -o: this environment is up to date, whatever the times of the copied files are.
    return ["make", "-o", f"{venv}/.stamp", *goals, f"VENV={venv}", "MODEL=tiny", "CORPUS=texts", QUICK]


@pytest.fixture
def make(clone: Path) -> Callable[..., Result]:
    def call(*goals: str) -> Result:
        done = subprocess.run(command(clone, *goals), cwd=clone, capture_output=True, text=True, timeout=300)
        return Result(done.returncode, done.stdout, done.stderr)

    return call


def state(clone: Path) -> dict[str, int]:
    """Which published folders and reports are still the same ones."""
    paths = [clone / "artifacts/tiny" / name for name in RECIPES] + [clone / "reports/tiny/report.json"]
    return {path.name: path.stat().st_ino for path in paths}


def rebuilt(clone: Path, before: dict[str, int]) -> set[str]:
    return {name for name, inode in state(clone).items() if before[name] != inode}


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


def test_what_changed_is_rebuilt_and_nothing_else(clone: Path, make: Callable[..., Result]) -> None:
    first = make("export", "quantize", "eval")
    assert first.status == 0, first.stderr
    before = state(clone)
    again = make("export", "quantize", "eval")
    assert again.status == 0 and again.stderr.count("up to date") == 5 and not rebuilt(clone, before)

    append(clone / "eval/measure/latency.py", "# another version\n")
    assert make("eval").status == 0
    assert rebuilt(clone, before) == {"report.json"}

    before = state(clone)
    append(clone / "quantize/rewrite/dynamic.py", "# another version\n")
    result = make("eval")
    # The same bytes come of it, so the report has nothing to say anew.
    assert "int8-dynamic: changed: code" in result.stderr
    assert rebuilt(clone, before) == {"int8-dynamic", "int8-dynamic-ort"}

    before = state(clone)
    # Pages are made of what was measured: their code measures nothing again.
    append(clone / "eval/report/markdown.py", "# another version\n")
    append(clone / "quantize/rewrite/onnxruntime_tools.py", "# another version\n")
    assert make("eval").status == 0
    assert not rebuilt(clone, before)

    before = state(clone)
    index = json.loads((clone / "texts/index.json").read_text())
    moved = next(item for item in index["documents"] if item["split"] == "calibration")
    moved["split"] = "test"
    (clone / "texts/index.json").write_text(json.dumps(index))
    result = make("eval")
    assert result.status == 0 and "int8-dynamic: changed: calibration" in result.stderr
    assert rebuilt(clone, before) == {*RECIPES[1:], "report.json"}

    before = state(clone)
    tiny_gpt2(seed=1, n_positions=64).save_pretrained(clone / "tiny")
    result = make("eval")
    assert result.status == 0 and "fp32: changed: checkpoint" in result.stderr
    assert rebuilt(clone, before) == {*RECIPES, "report.json"}


def test_a_damaged_artifact_is_rebuilt(clone: Path, make: Callable[..., Result]) -> None:
    assert make("quantize").status == 0
    digests = {name: open_artifact(clone / "artifacts/tiny" / name).digest for name in RECIPES}
    (clone / "artifacts/tiny/fp32/model.onnx").write_bytes(b"spoilt")
    (clone / "artifacts/tiny/int8-dynamic/manifest.json").unlink()
    shutil.rmtree(clone / "artifacts/tiny/int8-static")
    assert make("quantize").status == 0
    assert {name: open_artifact(clone / "artifacts/tiny" / name).digest for name in RECIPES} == digests


def test_two_makes_at_once(clone: Path) -> None:
    runs = [
        subprocess.Popen(command(clone, "export", "quantize", "eval"), cwd=clone, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    errors = [run.communicate(timeout=300)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], errors
    assert (
        sum(error.count("fp32: new") for error in errors) == 1
        and sum(error.count("up to date") for error in errors) == 5
    )
    for name in RECIPES:
        open_artifact(clone / "artifacts/tiny" / name)
    assert not list(clone.rglob(".tmp-*"))


@pytest.mark.parametrize("seed", range(4))
def test_a_kill_leaves_whole_artifacts_or_none(clone: Path, make: Callable[..., Result], seed: int) -> None:
    """kill -9 of the whole group at a random moment, from nothing; the next make ends as an undisturbed one."""
    run = subprocess.Popen(
        command(clone, "export", "quantize", "eval"), cwd=clone, stderr=subprocess.DEVNULL, start_new_session=True
    )
    time.sleep(random.Random(seed).uniform(0.5, 9))
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    for name in RECIPES:
        if (clone / "artifacts/tiny" / name).exists():
            open_artifact(clone / "artifacts/tiny" / name)
    if (report := clone / "reports/tiny/report.json").exists():
        json.loads(report.read_text(encoding="utf-8"))
    assert make("export", "quantize", "eval").status == 0
    for name in RECIPES:
        open_artifact(clone / "artifacts/tiny" / name)
    assert not list(clone.rglob(".tmp-*"))


@pytest.mark.skipif(not (ROOT / "js/node_modules").is_dir(), reason="no js/node_modules here; `make js` creates it")
def test_the_goals_after_the_pipeline(clone: Path, make: Callable[..., Result]) -> None:
    """What is missing is built; the report of other recipes stays as it is."""
    (clone / "js").symlink_to(ROOT / "js")
    made = make("generate", "RECIPE=fp32", "PROMPT=-Hola", "GENERATE=--tokens 1")
    assert made.status == 0 and "-Hola" in made.stdout, made.stderr
    assert {path.name for path in (clone / "artifacts/tiny").glob("[!.]*")} == {"fp32"}
    made = make("generate", "RECIPE=fp16", "PROMPT=¿Y $HOME?", "GENERATE=--tokens 5 --seed 1")
    assert made.status == 0 and "¿Y $HOME?" in made.stdout, made.stderr  # within make, make says where it is first
    assert {path.name for path in (clone / "artifacts/tiny").glob("[!.]*")} == {"fp32", "fp16"}
    made = make("demo", "RECIPE=fp16", "BUILD=site")
    assert made.status == 0 and (clone / "site/index.html").is_file(), made.stderr
    assert make("eval", "RECIPES=fp32 fp16").status == 0
    before = (clone / "reports/tiny/report.json").read_bytes()
    made = make("bundle", "RECIPES=int8-dynamic")
    assert made.status == 0, made.stderr
    assert {path.name for path in (clone / "dist/tiny/onnx").iterdir()} == {"model.onnx", "model_quantized.onnx"}
    assert (clone / "reports/tiny/report.json").read_bytes() == before
    made = make("sweep", "RECIPES=fp16", "SWEEP=--tokens 300 --rounds 1")
    assert made.status == 0 and "fp16" in (clone / "reports/sweep/sweep.md").read_text(), made.stderr


def rules() -> tuple[str, set[str]]:
    """The text of both makefiles, and the goals that they declare phony."""
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "lab/lab.mk"))
    return text, set(" ".join(re.findall(r"^\.PHONY: (.+)", text, re.MULTILINE)).split())


def test_help_names_the_goals(make: Callable[..., Result]) -> None:
    assert "make export quantize eval" in make().stdout


def test_help_tells_every_goal_and_variable_and_nothing_else() -> None:
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    text, goals = rules()
    assert set(re.findall(r"^([a-z-]+):", text, re.MULTILINE)) == goals
    assert set(re.findall(r"^make ([a-z-]+)  ", shown, re.MULTILINE)) == goals
    variables = set(re.findall(r"^([A-Z_]+) +\?=", text, re.MULTILINE)) - {"ARTIFACT"}
    assert set(re.findall(r"^([A-Z_]+)=", shown, re.MULTILINE)) == variables
    for line in filter(None, shown.splitlines()):
        assert re.match(r"make [a-z]|[A-Z_]+=|For maintainers|Variables", line) and "##" not in line, line


def test_no_default_ends_in_a_space() -> None:
    """make counts the space before a comment as part of a value, which then is another folder's name."""
    text, _ = rules()
    assert not re.findall(r"^[A-Z_]+ +\?=.*\s##.*", text, re.MULTILINE)


def test_each_environment_is_made_of_its_pins_where_its_variable_says(tmp_path: Path) -> None:
    shown = subprocess.run(
        ["make", "-n", *(f"{name}VENV={tmp_path}/{name or 'DEFAULT_'}" for name in PLACES), "PYTHON=python", *GOALS],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    made = dict(re.findall(rf'^python setup/make_env.py "{tmp_path}/([A-Z]+)_" (.*\S)', shown, re.MULTILINE))
    assert made == {
        **{name.upper(): f"setup/{name}.txt" for name in ("default", "optimum", "peers", "runtimes", "release")},
        "RAY": f'setup/ray.txt "{tmp_path}/DEFAULT_"',
    }


def test_environment_is_made_once(tmp_path: Path) -> None:
    """A virtual environment from pins of nothing; a second run leaves it, changed pins do not."""
    pins, venv = tmp_path / "pins.txt", tmp_path / "venv"
    pins.write_text("# nothing\n")
    run = lambda: subprocess.run(  # noqa: E731
        [sys.executable, ROOT / "setup/make_env.py", venv, pins], capture_output=True, text=True, check=True
    )
    assert "setting up" in run().stderr and (venv / "bin/python").exists()
    assert run().stderr == ""
    pins.write_text("# nothing, in other words\n")
    assert "setting up" in run().stderr


def test_a_failed_installation_is_one_line_and_tried_again(tmp_path: Path) -> None:
    pins = tmp_path / "pins.txt"
    pins.write_text("this-package-does-not-exist-anywhere==0.0.1\n")
    done = subprocess.run(
        [sys.executable, ROOT / "setup/make_env.py", tmp_path / "venv", pins], capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.rstrip().splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "venv/.stamp").exists()
