"""README.md and the pages: links resolve, commands exist, and the README's commands run as they are written."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from cuantiza.__main__ import COMMANDS
from cuantiza.core.store.artifact import Artifact

from helpers import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "lab/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
# Commands of README.md and docs/README.md that this test does not run, each with the reason.
NOT_RUN = {
    "make export quantize eval": "takes minutes in a fresh environment; .ci/run runs it as written",
    "make test": "is what runs this test; .ci/run runs it as written",
    'pip install ".[export]"': "needs the network; the test of the wheel installs it",
    'make bench BENCH_ARGS="--shapes gpt2 --rounds 5 --threads 2 --batches 1"': "takes a quarter of an hour; test_bench.py runs a small one",
    'make generate PROMPT="Me gusta mucho el futbol"': "builds artifacts; test_make.py runs it with a tiny model",
    "make compare BASE=... HEAD=...": "names no folders; test_compare.py and test_workflow.py run it",
    "make bundle": "measures for minutes; test_make.py runs it with a tiny model",
    "make demo": "serves until Ctrl-C; test_make.py builds its page",
    'make sweep MODELS="..." RECIPES="..." CORPORA="..."': "names no models; test_make.py runs it with a tiny one",
}
# Commands that take minutes.
SLOW = {"cuantiza export && cuantiza quantize && cuantiza eval"}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_code(text: str) -> str:
    """`text` without fenced and indented blocks and code in lines, where brackets are no links."""
    return re.sub(r"`[^`]*`", "", re.sub(r"^ {4}\S.*$", "", without_blocks(text), flags=re.MULTILINE))


def without_blocks(text: str) -> str:
    """`text` without fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = without_blocks(page.read_text(encoding="utf-8"))
    found: set[str] = set()
    for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        found.add(next(name for name in (slug, *(f"{slug}-{n}" for n in range(1, 50))) if name not in found))
    return found | set(re.findall(r'<a (?:id|name)="([^"]+)"', text))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_resolves(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name_of(page)}: {target} is not there"
        assert not anchor or anchor in anchors(file), f"{name_of(page)}: {target}: there is no such heading"


def test_the_index_has_every_page() -> None:
    linked = set(re.findall(r"\]\(([^)#\s]+)\)", (ROOT / "docs/README.md").read_text(encoding="utf-8")))
    pages = {file.name for file in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= linked, f"docs/README.md does not name {pages - linked}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 90


def written_commands() -> Iterator[str]:
    """The commands of README.md and docs/README.md: each line of a fenced block, and `make …` and `cuantiza …` in text."""
    for page in ("README.md", "docs/README.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for block in re.findall(r"^```(?:sh|bash)?\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            yield from (line for line in block.splitlines() if line.strip())
        yield from re.findall(r"`((?:make|cuantiza) [^`]+)`", without_blocks(text))


def test_commands_that_are_not_run_are_written_somewhere() -> None:
    assert NOT_RUN.keys() | SLOW <= set(written_commands())
    by_ci = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert {command for command, reason in NOT_RUN.items() if ".ci/run" in reason} <= set(by_ci)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=pytest.mark.slow if command in SLOW else ())
        for command in dict.fromkeys(written_commands())
        if command not in NOT_RUN
    ],
)
def test_a_command_runs_as_it_is_written(command: str, tmp_path: Path) -> None:
    programs, work = tmp_path / "bin", tmp_path / "work"
    programs.mkdir()
    work.mkdir()
    # What pip would put on the path, for this checkout.
    (programs / "cuantiza").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cuantiza "$@"\n')
    (programs / "cuantiza").chmod(0o755)
    paths = {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    place = ROOT if command.startswith("make ") else work
    done = subprocess.run(
        command, shell=True, cwd=place, env={**os.environ, **paths}, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0 and done.stdout, done.stderr
    assert not command.endswith("cuantiza eval") or list(work.rglob("report.html")), done.stdout


def test_the_program_that_opens_an_artifact_runs(
    es_mini_fp32: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = (ROOT / "docs/artifact.md").read_text(encoding="utf-8")
    program = next(code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "InferenceSession" in code)
    (tmp_path / "program.py").write_text(program)
    monkeypatch.chdir(es_mini_fp32.path)
    found = runpy.run_path(str(tmp_path / "program.py"))
    assert found["logits"].shape == (*found["ids"].shape, 8192)


def commands(text: str) -> Iterator[list[str]]:
    """The words of every `make`, `cuantiza` and `python -m` command of a page, in blocks or in lines."""
    text = re.sub(r"\| before \| now \|.*?\n\n", "", text, flags=re.DOTALL)  # the changelog's commands of before
    blocks = re.findall(r"^```.*?\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    lines = "\n".join([*blocks, *re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)])
    found = re.findall(r"^((?:make|cuantiza|python -m) .+)$", lines, re.MULTILINE)
    found += [" ".join(code.split()) for code in re.findall(r"`((?:make|cuantiza|python\s+-m)\s[^`]+)`", text)]
    for command in found:
        for part in re.split(r"&&|;", command.partition(" #")[0]):
            yield re.findall(r'[^\s"]+="[^"]*"|"[^"]*"|\S+', part)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_commands_of_a_page_exist(page: Path) -> None:
    makefiles = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "Makefile", *ROOT.glob("lab/*.mk")))
    targets = set(re.findall(r"^([a-z-]+)(?: [a-z-]+)*:", makefiles, re.MULTILINE))
    variables = set(
        re.findall(r"\$\(([A-Z_]+)\)|\$\((?:if|or) \$\(([A-Z_]+)\)|^([A-Z_]+) *\?=", makefiles, re.MULTILINE)
    )
    known = {name for names in variables for name in names if name}
    for program, *words in commands(page.read_text(encoding="utf-8")):
        if program == "make":
            for word in words:
                name, is_variable, _ = word.partition("=")
                assert name in (known if is_variable else targets) or word == "...", f"make {' '.join(words)}: {name}"
        elif program == "cuantiza":
            assert words[0].rstrip(",") in COMMANDS or words[0].startswith("-"), f"cuantiza {' '.join(words)}"
        elif words[0] == "-m" and words[1] != "pytest":
            assert find_spec(words[1]), f"python -m {words[1]}: there is no such module"
