"""What make hands on: every path and prompt arrives as it was typed, and make and the shell run nothing of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cuantiza.core.inputs.checkpoints import model_name

from helpers import ROOT

# Each would run a command, or vanish, if make or the shell looked into it.
ODD = (
    "My Drive/gpt2-es",
    'it\'s "so" $(shell touch ran) ${HOME} $$ $',
    "`touch ran` $(touch ran); touch ran # no comment, 100 % \\",
)


@pytest.fixture
def called(tmp_path: Path) -> Callable[..., list[dict]]:
    """`called(goal, MODEL=...)` runs make with an interpreter that only notes what it is given, and gives these notes."""
    notes, venv = tmp_path / "notes", tmp_path / "venv"
    python = venv / "bin/python"
    python.parent.mkdir(parents=True)
    note = (
        "import json, os, sys\n"
        f"if sys.argv[1] == '-c': os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])\n"  # make asks for a name
        f"print(json.dumps([sys.argv[1:], os.environ.get('PROMPT')]), file=open({str(notes)!r}, 'a'))"
    )
    python.write_text(f"#!{sys.executable} -IS\n{note}\n")
    python.chmod(0o755)
    (venv / ".stamp").touch()  # newer than what it is made of

    def call(*goals: str, environment: dict[str, str] | None = None, **given: str) -> list[dict]:
        notes.write_text("")
        done = subprocess.run(
            ["make", "-o", "js/node_modules/.stamp", *goals, f"VENV={venv}", *(f"{name}={value}" for name, value in given.items())],
            cwd=ROOT, env=os.environ | (environment or {}), capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert not list(ROOT.glob("ran")) and "HOLA" not in done.stdout
        return [_note(*json.loads(line)) for line in notes.read_text().splitlines()]

    return call


def _note(arguments: list[str], prompt: str | None) -> dict:
    """{option: value} of a call; `module` is what ran, and `prompt` the variable of the environment."""
    options = dict(word.split("=", 1) for word in arguments if word.startswith("--") and "=" in word)
    return {"module": arguments[1], "words": arguments, "PROMPT": prompt, **options}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("by", ["command line", "environment"])
def test_paths_arrive_as_typed(called: Callable[..., list[dict]], odd: str, by: str) -> None:
    given = {name: f"{odd} {name}" for name in ("MODEL", "CORPUS", "CORPUS_COLUMN", "OUT", "REPORTS", "DIST")}
    notes = called("bundle", **given) if by == "command line" else called("bundle", environment=given)
    names, *notes = notes  # whether the recipes can be in a bundle is asked first
    assert names["module"] == "cuantiza.bundle" and "--names" in names["words"]
    export, quantize, measure, bundle = notes
    assert [note["module"] for note in notes] == ["export", "quantize", "eval", "cuantiza.bundle"]
    assert {note["--model"] for note in notes} == {given["MODEL"]}
    assert export["--output"] == quantize["--output"] == measure["--artifacts"] == bundle["--artifacts"] == given["OUT"]
    assert quantize["--corpus"] == measure["--corpus"] == given["CORPUS"]
    assert quantize["--corpus-column"] == given["CORPUS_COLUMN"]
    assert measure["--output"] == bundle["--reports"] == f"{given['REPORTS']}/bundle"
    assert bundle["--output"] == given["DIST"]


def test_a_text_that_is_joined_calibrates_and_is_scored_so(called: Callable[..., list[dict]]) -> None:
    """EVAL= and QUANTIZE= come last, so that each may name a text of its own."""
    _, quantize, measure = called("eval", CORPUS="owner/text", CORPUS_JOIN="1", QUANTIZE="--corpus self")
    assert "--corpus-join=1" in quantize["words"] and "--corpus-join=1" in measure["words"]
    assert quantize["words"][-2:] == ["--corpus", "self"] and measure["--corpus"] == "owner/text"
    _, plain, _ = called("eval")
    assert not any(word.startswith("--corpus-join") for word in plain["words"])


@pytest.mark.parametrize("odd", ODD)
def test_other_goals_hand_on_what_they_are_given(called: Callable[..., list[dict]], odd: str) -> None:
    compare, = called("compare", BASE=odd, HEAD=f"{odd} 2", ARGS="--rounds 4")  # fmt: skip
    assert compare["words"] == ["-m", "cuantiza", "compare", odd, f"{odd} 2", "--rounds", "4"]
    sweep, = called("sweep", MODEL=odd, CORPUS=f"{odd} 2", OUT=f"{odd} 3", CORPUS_COLUMN=odd, CORPUS_BY="line")  # fmt: skip
    assert sweep["--corpus-column"] == odd and sweep["--corpus-by"] == "line"
    assert sweep["words"][3] == odd and f"{odd} 2" in sweep["words"] and sweep["--work"] == f"{odd} 3/sweep"
    emulation, = called("emulation", MODEL="owner/name", OUT=odd)  # fmt: skip
    assert emulation["--artifacts"] == f"{odd}/owner--name"
    *_, demo = called("demo", MODEL="owner/name", OUT=odd, BUILD=f"{odd} 2")
    assert demo["--artifact"] == f"{odd}/owner--name/int8-dynamic" and demo["--build"] == f"{odd} 2"


@pytest.mark.parametrize("by", ["command line", "environment"])
@pytest.mark.parametrize(
    "prompt",
    [
        *ODD,
        "Cuesta $100 y $(shell echo HOLA)",
        "50 $",
        "a ${HOME} b $(MODEL)",
        "dos # tres",
        '  espacios y "comillas" y `id`  ',
        "\tuna línea\n  y otra\n\ny otra: \\n",
        "\n\n",
        "-Hola",
        "--tokens",
        "$${MODEL} %s \\t 'x'",
        "",
    ],
)
def test_a_prompt_arrives_as_typed(called: Callable[..., list[dict]], prompt: str, by: str) -> None:
    notes = (
        called("generate", PROMPT=prompt)
        if by == "command line"
        else called("generate", environment={"PROMPT": prompt})
    )
    told = notes[-1]["--prompt"]
    if by == "command line" and not Path("/proc/self/cmdline").exists():
        assert told == prompt.lstrip()  # make drops these, and only Linux shows its command line
    else:
        assert told == prompt


def test_make_within_make_expands_nothing_either(called: Callable[..., list[dict]]) -> None:
    *_, measure, chapters = called("chapters", OUT=ODD[1], PROMPT=ODD[2])
    assert measure["--artifacts"] == f"{ODD[1]}/chapters" and chapters["--artifacts"] == f"{ODD[1]}/chapters/es-mini"
    assert measure["PROMPT"] == ODD[2]


def test_an_artifact_that_is_there_is_not_built(called: Callable[..., list[dict]], tmp_path: Path) -> None:
    model, out = tmp_path / "My Drive/gpt2 es", tmp_path / "mis artefactos"
    model.mkdir(parents=True)
    (tmp_path / "link").symlink_to(model)
    names = {"MODEL": str(model), "OUT": str(out), "RECIPE": "fp16"}
    assert [note["module"] for note in called("generate", **names)] == ["export", "quantize", "cuantiza.generate"]
    (folder := out / "gpt2 es/fp16").mkdir(parents=True)
    (folder / "manifest.json").touch()
    for spec in (str(model), f"{model}/", f"{tmp_path}/link", f"{tmp_path}/My Drive/./gpt2 es/../gpt2 es"):
        generate, = called("generate", **names | {"MODEL": spec})  # fmt: skip
        assert generate["--artifact"] == f"{out}/{model_name(spec)}/fp16" == str(folder)
    assert [note["module"] for note in called("demo", **names)] == ["cuantiza.demo"]
    given, = called("generate", ARTIFACT=str(folder))  # fmt: skip
    assert given["--artifact"] == str(folder)


@pytest.mark.parametrize("spec", ["owner/name", "owner/name@v1.0", "models/es-mini", "-x", "it's/so", "no folder/here"])
def test_make_names_a_model_as_python_does(called: Callable[..., list[dict]], spec: str) -> None:
    emulation, = called("emulation", MODEL=spec)  # fmt: skip
    assert emulation["--artifacts"] == f"artifacts/{model_name(spec)}"


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("mis recetas/mi receta.json", "{}", "mi receta"),
        ("it's/b.json $(touch ran).json", "{}", "b.json $(touch ran)"),
        ("a/manifest.json", '{"name": "suya", "recipe": {}}', "suya"),
        ("fp16.jsonette", "", "{path}"),
    ],
)
def test_make_names_the_artifact_of_a_file_as_python_does(
    called: Callable[..., list[dict]], tmp_path: Path, name: str, content: str, wanted: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    *_, quantize, generate = called("generate", RECIPE=str(path), OUT=f"{tmp_path}/o")
    assert str(path) in quantize["words"]
    assert generate["--artifact"] == f"{tmp_path}/o/es-mini/{wanted.format(path=path)}"
    if wanted != "{path}":
        (folder := tmp_path / "o/es-mini" / wanted).mkdir(parents=True)
        (folder / "manifest.json").touch()
        assert [note["module"] for note in called("demo", RECIPE=str(path), OUT=f"{tmp_path}/o")] == ["cuantiza.demo"]


@pytest.mark.parametrize("name", ["MODEL", "RECIPES"])
def test_a_value_of_several_lines_is_told(name: str) -> None:
    for given, environment in (([f"{name}=a\nb"], {}), ([], {name: "a\nb"})):
        command = ["make", "-n", "export", *given]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
        assert done.returncode == 2 and f"{name}= has several lines; write one" in done.stderr


def test_make_runs_nothing_of_any_variable(tmp_path: Path) -> None:
    """Every variable that the makefiles read, in the environment and on the command line, through every goal."""
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "lab/lab.mk"))
    used = set(re.findall(r"\$\(([A-Z_]+)\)", text)) - {"MAKE", "NAME", "GIVEN", "MAKEFILE_LIST", "PYTHON"}
    values = {name: f"$(shell touch {tmp_path}/{name})" for name in used if not name.endswith("VENV")}
    goals = set(" ".join(re.findall(r"^\.PHONY: (.+)", text, re.MULTILINE)).split())
    assert {"MODEL", "EVAL", "SWEEP", "BENCH", "TEXT"} <= values.keys() and {"generate", "bench"} <= goals
    for given, environment in (([f"{name}={value}" for name, value in values.items()], {}), ([], values)):
        command = ["make", "-n", "VENV=.venv", *sorted(goals), *given]
        subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, timeout=60)
        assert not list(tmp_path.iterdir())


def test_ending_make_ends_the_server(tmp_path: Path) -> None:
    """make hands SIGTERM to its child, which is the server itself and no shell."""
    python, told = tmp_path / "bin/python", tmp_path / "pid"
    python.parent.mkdir()
    lines = [
        f"#!{sys.executable} -IS",
        "import os, pathlib, time",
        f"pathlib.Path({str(told)!r}).write_text(f'{{os.getpid()}} ')",
        "time.sleep(60)",
    ]
    python.write_text("\n".join(lines))
    python.chmod(0o755)
    for name in (".stamp", "manifest.json"):
        (tmp_path / name).touch()
    command = ["make", "-o", "js/node_modules/.stamp", "demo", f"VENV={tmp_path}", f"ARTIFACT={tmp_path}"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as make:
        while not (told.exists() and told.read_text().endswith(" ")):
            assert make.poll() is None
            time.sleep(0.01)
        server = int(told.read_text())
        make.terminate()
        make.wait(timeout=60)
    end = time.monotonic() + 30
    while Path(f"/proc/{server}").exists() and time.monotonic() < end:
        time.sleep(0.01)
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)
