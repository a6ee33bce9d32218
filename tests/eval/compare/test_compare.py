"""The decision of `make compare` on reports: what raises an alarm, and what is refused."""

from __future__ import annotations

import copy
import errno
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cuantiza.core.errors import run
from cuantiza.eval.compare import cli
from cuantiza.eval.compare.budgets import Budget, Budgets
from cuantiza.eval.compare.cli import main, parser
from cuantiza.eval.compare.decide import FALSE_ALARMS, compare_reports
from cuantiza.eval.compare.folders import CONFIRMING_ROUNDS
from cuantiza.eval.compare.page import markdown
from cuantiza.eval.compare.reports import read_side

from helpers import ROOT, Result, assert_user_error, report_fields, report_row, stage

BUDGETS = Budgets(Budget(quality=0.005, size=0.01, latency=0.1), {})
FIGURES = (
    "prefill 32",
    "prefill 128",
    "prefill 512",
    "decode at 32",
    "decode at 128",
    "decode at 512",
    "decode at 1023",
)


def report(seed: int = 0, rounds: int = 12, slower: float = 0.0, nll: float = 0.0, **sizes: int) -> dict:
    """A report of three artifacts and a PyTorch row; `slower` (ln) and `nll` (nats a token) make q worse."""
    generator = np.random.default_rng(seed)
    documents = np.random.default_rng(7).integers(200, 900, 12)
    difficulty = np.random.default_rng(8).normal(4.2, 0.3, 12)

    def shapes(phase: str, key: str, places: tuple[int, ...], speed: float) -> list[dict]:
        return [
            {
                **report_row("")[phase][0],
                key: at,
                "samples_per_round": [3] * rounds,
                "samples_ns": [
                    int(value)
                    for _ in range(rounds)
                    for value in 1e6 * at * np.exp(speed + two_speeds(generator, ()) + generator.normal(0, 0.03, 3))
                ],
            }
            for at in places
        ]

    def row(name: str, worse: float, speed: float) -> dict:
        noise = np.random.default_rng(9).normal(0, 0.002, 12) if worse else 0
        return report_row(
            name,
            bytes=sizes.get(name, 1_000_000),
            nll_by_document=(documents * (difficulty + worse + noise)).tolist(),
            prefill=shapes("prefill", "tokens", (32, 128, 512), speed),
            decode=shapes("decode", "position", (32, 128, 512, 1023), speed),
        )

    torch = row("torch", 0, 0.4) | {"modules_with_weights": 40, "modules_quantized": 1}
    fields = report_fields([row("fp32", 0, 0), row("q", nll, slower - 0.7), row("s", 0, -0.5), torch])
    fields["corpus"]["document_tokens"] = documents.tolist()
    fields["inputs"]["artifacts"] = [[name, f"{name} {seed}"] for name in ("fp32", "q", "s")]
    return fields


def two_speeds(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """What a process keeps for its life: as fast as it can be, or a fifth slower, by the toss of a coin."""
    return math.log(1.2) * (generator.random(shape) < 0.5)


@pytest.fixture
def written(tmp_path: Path):
    """`written("base", report(...))`: a folder with that report.json."""

    def write(name: str, fields: object) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "report.json").write_text(fields if isinstance(fields, str) else json.dumps(fields))
        return folder

    return write


@pytest.fixture
def compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """`compare(base, head, *options)`: the command, in this process."""
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        options = [*map(str, arguments), "--output", str(tmp_path / "out/compare.md")]
        with pytest.raises(SystemExit) as end:
            run(lambda: main(options))
        return Result(end.value.code, *capsys.readouterr())

    return call


# Two reports


@pytest.mark.parametrize(
    "worse, figures",
    [
        ({}, set()),
        ({"slower": math.log(1.3)}, {("q", name) for name in FIGURES}),
        ({"nll": 0.02}, {("q", "ln perplexity")}),
        ({"nll": 0.004}, set()),
        ({"q": 1_050_000}, {("q", "size")}),
        ({"q": 1_009_000}, set()),
        ({"slower": -1.0, "q": 900_000}, set()),
    ],
)
def test_what_is_worse_in_a_report_is_found(written, compare, tmp_path, worse, figures):
    base, head = written("base", report(1, rounds=30)), written("head", report(2, rounds=30, **worse))
    checks, new = compare_reports(read_side(base), read_side(head), BUDGETS, None, latency=True)
    found = {(check.recipe, check.figure) for check in checks if check.regression}
    assert found <= figures and bool(found) == bool(figures) and not new
    assert {check.recipe for check in checks} == {"fp32", "q", "s"}
    result = compare(base, head)
    page = (tmp_path / "out/compare.md").read_text()
    assert result.status == (1 if figures else 0), result.stderr
    assert ("no regression" in page.splitlines()[0]) == (not figures)
    for recipe, figure in found:
        assert f"- **{recipe}, {figure}: +" in page and f"{recipe}, {figure}: +" in result.stdout


def test_reports_of_equal_artifacts_raise_no_alarm(written):
    reports = [read_side(written(str(seed), report(seed, rounds=7))) for seed in range(40)]
    pairs = itertools.pairwise(reports)
    assert not [
        check
        for base, head in pairs
        for check in compare_reports(base, head, BUDGETS, None, True)[0]
        if check.regression
    ]


def test_few_rounds_are_said_to_tell_nothing(written, compare, tmp_path):
    result = compare(written("base", report(1, rounds=3)), written("head", report(2, rounds=3, slower=1.0)))
    page = (tmp_path / "out/compare.md").read_text()
    assert result.status == 0 and "latency was not judged" in page.splitlines()[0]
    assert "3 rounds; 7 in each report are needed" in page


def test_the_same_file_is_not_timed_again(written):
    base, head = report(1, rounds=30), report(2, rounds=30, slower=1.0)
    head["inputs"]["artifacts"] = base["inputs"]["artifacts"]
    checks, _ = compare_reports(read_side(written("a", base)), read_side(written("b", head)), BUDGETS, None, True)
    assert not any(check.regression for check in checks)
    assert [check.note for check in checks if check.recipe == "q" and check.figure == "latency"] == ["same file"]


def test_a_page_speaks_of_times_only_where_some_were_compared(written, compare, tmp_path):
    one, other = report(1, rounds=12), report(2, rounds=12)
    other["inputs"]["artifacts"] = one["inputs"]["artifacts"]
    for fields in (one, other):
        fields["artifacts"] = fields["artifacts"][:3]
    assert compare(written("a", one), written("b", other)).status == 0
    page = (tmp_path / "out/compare.md").read_text()
    assert "same file" in page and "Latency is relative" not in page and "alarm of latency" not in page
    assert compare(written("a", one), written("b", report(2))).status == 0
    page = (tmp_path / "out/compare.md").read_text()
    assert "Latency is relative" in page and "alarm of latency" in page


def test_a_new_recipe_is_listed(written, compare, tmp_path):
    base = report(1)
    del base["artifacts"][2]
    assert compare(written("a", base), written("b", report(2))).status == 0
    assert "- s: new, only in head" in (tmp_path / "out/compare.md").read_text()


def test_formats_of_github(written, compare, tmp_path, monkeypatch):
    base, head = written("a", report(1)), written("b", report(2, q=2_000_000))
    printed = compare(base, head, "--format", "github", "--without-latency")
    page = (tmp_path / "out/compare.md").read_text()
    assert printed.status == 1 and printed.stdout == page and page.startswith("# es-mini: 1 regression\n")
    (tmp_path / "summary").write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary"))
    assert "regression" in compare(base, head, "--format", "github", "--without-latency").stdout
    assert (tmp_path / "summary").read_text() == "before\n" + page


def test_a_failure_is_never_called_a_regression(written, compare, tmp_path, monkeypatch):
    base, head = written("a", report(1)), written("b", report(2))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "none/summary"))
    assert_user_error(compare(base, head, "--format", "github", "--without-latency"), "GITHUB_STEP_SUMMARY=", "summary")
    command = f"{sys.executable} -m cuantiza compare {base} {head} --without-latency --output {tmp_path / 'page.md'}"
    gone = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | true"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert gone.returncode in (0, 3) and not gone.stderr, gone  # 0: all was printed before the reader went away
    for error, status in ((OSError(errno.ENOMEM, "no memory"), 3), (OSError(errno.ENOSPC, "full"), 2)):
        monkeypatch.setattr(cli, "_compare", lambda _, error=error: (_ for _ in ()).throw(error))
        assert compare(base, head).status == status


def edited(change) -> dict:
    fields = report(2)
    change(fields)
    return fields


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_likelihoods_of_a_report_that_are_not_finite_are_a_regression(written, compare, value):
    head = edited(lambda r: r["artifacts"][1]["nll_by_document"].__setitem__(3, value))
    result = compare(written("base", report(1)), written("head", head), "--without-latency")
    assert result.status == 1 and "not finite" in result.stdout and not result.stderr


def test_a_page_that_could_not_be_written_is_known_before_anything_is_measured(written, compare, tmp_path):
    (tmp_path / "out").touch()
    assert_user_error(compare(written("a", report(1)), written("b", report(2))), f"{tmp_path / 'out'} is a file")


@pytest.mark.parametrize(
    "change, fragments",
    [
        (lambda r: r["corpus"].update(tokens_sha256="cd"), ("not the same tokens", "one corpus")),
        (lambda r: r["corpus"].update(window_tokens=256), ("not the same window (512 and 256)", "--window")),
        (lambda r: r.update(model="gpt2"), ("not the same model (es-mini and gpt2)",)),
        (lambda r: r["machine"].update(threads=4), ("threads: 2 and 4", "--without-latency")),
        (lambda r: r["machine"].update(cpu="another"), ("cpu: a CPU and another", "--without-latency")),
        (lambda r: r["artifacts"].reverse() or r["artifacts"].pop(0), ("relative to fp32 here and s there",)),
        (lambda r: r["artifacts"].pop(1), ("HEAD=: lacks q", "--recipes")),
        (lambda r: r["artifacts"].append(copy.deepcopy(r["artifacts"][1])), ("artifacts[4].name", "second time")),
        (lambda r: r.update(schema="cuantiza/report/2"), ("cuantiza/report/2", "make eval")),
        (lambda r: r["artifacts"][1].pop("nll_by_document"), ("artifacts[1].nll_by_document is missing", "make eval")),
        (lambda r: r["artifacts"][1]["nll_by_document"].pop(), ("11 numbers for 12 documents",)),
        (lambda r: r["artifacts"][1].update(bytes=math.nan), ("artifacts[1].bytes is 'nan'",)),
        (lambda r: r["artifacts"][1].update(bytes="7"), ("artifacts[1].bytes is '7'",)),
        (lambda r: r["artifacts"][1].update(bytes=True), ("artifacts[1].bytes is 'True'",)),
        (lambda r: r["artifacts"][1].update(bytes=10**4000), ("artifacts[1].bytes",)),
        (lambda r: r["artifacts"][1]["nll_by_document"].__setitem__(3, 1e300), ("nll_by_document[3] is '1e+300'",)),
        (
            lambda r: r["artifacts"][1]["decode"][0]["samples_ns"].__setitem__(0, 0),
            ("artifacts[1].decode[0].samples_ns[0] is '0'",),
        ),
        (lambda r: r["artifacts"][1]["decode"][0]["samples_ns"].pop(), ("samples_per_round",)),
        (lambda r: r["artifacts"][1]["decode"].pop(), ("has no decode at 1023",)),
        (lambda r: r["corpus"].update(document_tokens=[]), ("corpus.document_tokens is '[]'",)),
        (lambda r: r["corpus"].update(document_tokens="many"), ("corpus.document_tokens is 'many'",)),
        (lambda r: r.update(artifacts=[]), ("artifacts is '[]'",)),
        (lambda r: r.update(artifacts=r["artifacts"][3:]), ("does not begin with an artifact",)),
        (lambda r: r.update(artifacts=[7]), ("artifacts[0] is '7'",)),
        (lambda r: r.update(machine=None), ("machine is 'None'",)),
        (lambda r: r.pop("machine"), ("machine is missing",)),
        (lambda r: r["inputs"].update(artifacts=[["a"]]), ("inputs.artifacts[0][1] is missing",)),
        (lambda r: r.update(model="\ud800\n"), ("is not JSON", "make eval")),
        (lambda r: r.update(model="a\n"), ("model is",)),
        (lambda r: r["artifacts"][1].update(kind="tensorflow"), ("artifacts[1].kind is 'tensorflow'",)),
        (lambda r: r["artifacts"][1].update(name="a\x1b[31m"), ("artifacts[1].name",)),
    ],
)
def test_reports_that_cannot_be_compared(written, compare, tmp_path, change, fragments):
    line = assert_user_error(compare(written("base", report(1)), written("head", edited(change))), *fragments)
    assert line.isprintable() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content", ["", "[]", "7", "{", "null", '{"schema": 1}', "[" * 100_000, "9" * 5000, '{"schema": "\\ud800"}']
)
def test_files_that_are_no_report(written, compare, content):
    assert_user_error(compare(written("base", report(1)), written("head", content)), "report.json", "make eval")


def test_other_machines_have_comparable_quality(written, compare):
    head = edited(lambda r: r["machine"].update(threads=4))
    assert compare(written("a", report(1)), written("b", head), "--without-latency").status == 0


def test_text_of_a_report_is_shown_and_nothing_else(written, compare, tmp_path):
    name = "<img src=x> | [a](b) *c* @d [red]"
    base, head = report(1), report(2)
    for fields in (base, head):
        fields["artifacts"][1]["name"] = name
    result = compare(written("a", base), written("b", head), "--without-latency")
    page = (tmp_path / "out/compare.md").read_text()
    assert result.status == 0 and "[red]" in result.stdout
    assert r"&lt;img src=x&gt; \| \[a\](b) \*c\* &#64;d \[red\]" in page and "<img" not in page


def test_the_command_as_a_user_calls_it(written, tmp_path):
    base, head = written("base", report(1)), written("head", report(2, q=2_000_000))
    output = tmp_path / "compare.md"
    done = stage("cuantiza", "compare", base / "report.json", head, "--without-latency", "--output", output)
    assert done.status == 1 and "q, size: +100.0 %" in done.stdout and not done.stderr
    assert "| q | size |" in output.read_text()
    assert_user_error(stage("cuantiza", "compare", base, tmp_path / "nowhere"), "HEAD=", "nowhere")
    assert_user_error(stage("cuantiza", "compare", base, head, "--output", tmp_path), "--output", "is a folder")
    assert_user_error(stage("cuantiza", "compare", base, head, "--rounds", 2), "--rounds 2")
    assert "BASE HEAD" in stage("cuantiza", "compare", "--help").stdout


def test_markdown_is_one_table(written):
    base, head = read_side(written("a", report(1))), read_side(written("b", report(2, nll=0.5)))
    from cuantiza.eval.compare.decide import Comparison

    checks, new = compare_reports(base, head, BUDGETS, ["q"], False)
    page = markdown(Comparison("es-mini", "a", "b", "measured", checks, new))
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {9} and len(table) == 2 + 2


# Budgets


def test_budgets_of_a_recipe_that_is_not_there_are_named(written, compare, tmp_path):
    text = "quality = 0.01\nsize = 2\nlatency = 10\n[recipes.q]\nsize = 3\n[recipes.int8-dinamic]\nsize = 3\n"
    (tmp_path / "b.toml").write_text(text)
    both = written("a", report(1)), written("b", report(2))
    compare(*both, "--budgets", tmp_path / "b.toml")
    page = (tmp_path / "out/compare.md").read_text()
    assert r"\[recipes.int8-dinamic\] is of no artifact" in page and "recipes.q" not in page


@pytest.mark.parametrize(
    "text, fragments",
    [
        ("quality = ", ("is not TOML",)),
        ("quality = 0.1\nsize = 1", ("names no latency", "percent")),
        ("quality = -1\nsize = 1\nlatency = 1", ("quality is '-1'", "nats")),
        ("quality = nan\nsize = 1\nlatency = 1", ("quality is 'nan'",)),
        (f"quality = 1{400 * '0'}\nsize = 1\nlatency = 1", ("quality is '1000",)),
        ("quality = true\nsize = 1\nlatency = 1", ("quality is 'True'",)),
        ("quality = 1\nsize = '1'\nlatency = 1", ("size is '1'", "percent")),
        ("quality = 1\nsize = 1\nlatency = inf", ("latency is 'inf'",)),
        ("quality = 1\nsize = 1\nlatency = 1\nspeed = 1", ("speed is not a budget",)),
        ("quality = 1\nsize = 1\nlatency = 1\n[recipes.a]\nsiz = 1", ("recipes.a.siz is not a budget",)),
        ("quality = 1\nsize = 1\nlatency = 1\nrecipes = 3", ("[recipes.NAME]",)),
    ],
)
def test_bad_budgets(written, compare, tmp_path, text, fragments):
    (tmp_path / "b.toml").write_text(text)
    result = compare(written("a", report(1)), written("b", report(2)), "--budgets", tmp_path / "b.toml")
    assert_user_error(result, "b.toml", *fragments)


def test_what_the_page_says_is_so():
    text = (ROOT / "docs/compare.md").read_text(encoding="utf-8")
    known = {option for action in parser()._actions for option in action.option_strings}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= known
    assert f"{100 * FALSE_ALARMS:g} %" in text and f"{CONFIRMING_ROUNDS} rounds" in text
