"""A sweep gives the same results as the single stages, here and on a Ray cluster of three nodes of which one dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cuantiza.core.inputs.corpus import Source, load_splits
from cuantiza.core.store.artifact import open_artifact
from cuantiza.sweep.grid import read_grid
from cuantiza.sweep.page import html, markdown
from cuantiza.sweep.result import Result as Grid
from lab.speedup import __main__ as sweep_speedup
from lab.speedup.ray_cluster import Cluster

from helpers import (
    CORPUS,
    ROOT,
    Result,
    assert_nothing_published,
    assert_user_error,
    copy_tokenizer,
    stage,
    tiny_gpt2,
)

VENV = ROOT / ".venv-ray"
needs_ray = pytest.mark.skipif(not (VENV / "bin" / "ray").exists(), reason="no .venv-ray here; `make ray` creates it")
RECIPES = ("int8-dynamic", "fp16")
SETTINGS = ("--tokens", "1500", "--rounds", "1", "--threads", "1")
# The fields of quality and size in a report's row. Latencies are not compared, because they differ from run to run.
QUALITY = [
    "tokens_scored",
    "perplexity",
    "perplexity_stderr",
    "bits_per_byte",
    "word_perplexity",
    "byte_perplexity",
    "delta_ln_ppl",
    "delta_ln_ppl_stderr",
    "kl_divergence",
    "kl_divergence_stderr",
    "kl_divergence_p50",
    "kl_divergence_p99",
    "top1_agreement",
    "top1_agreement_stderr",
    "nll_by_document",
    "bytes",
    "model_bytes",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models and a second corpus."""
    folder = tmp_path_factory.mktemp("grid")
    for seed, name in enumerate(("one", "two")):
        tiny_gpt2(seed).save_pretrained(folder / name)
        copy_tokenizer(folder / name)
    texts = [file.read_text(encoding="utf-8") for file in sorted(CORPUS.glob("*.txt"))[:30]]
    lines = [json.dumps({"text": text[::-1]}) for text in texts]
    (folder / "backwards.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def arguments(place: Path, name: str, *options: object, models: tuple[str, ...] = ("one", "two")) -> list[str]:
    """The arguments of `python -m cuantiza.sweep` for the grid of `models`, with output folders that begin with `name`."""
    grid = ["--models", *(place / model for model in models), "--recipes", *RECIPES]
    grid += ["--corpora", CORPUS, place / "backwards.jsonl", "--shard", "500"]
    return [*map(str, [*grid, *SETTINGS, "--work", place / name, "--output", place / f"{name}-report", *options])]


@pytest.fixture(scope="module")
def here(place: Path) -> Result:
    """The result of the whole grid in one process, with its outputs in `place`/here."""
    result = stage("cuantiza.sweep", *arguments(place, "here"))
    assert result.status == 0, result.stderr
    return result


def cells(place: Path, name: str) -> dict[tuple[str, str, str], dict]:
    found = json.loads((place / f"{name}-report" / "sweep.json").read_text(encoding="utf-8"))
    return {(row["model"], row["recipe"], row["corpus"]): row for row in found["cells"]}


def assert_equal(place: Path, one: str, other: str, models: tuple[str, ...] = ("one", "two")) -> None:
    """Assert that two runs gave bit-equal cells and the same artifacts. The run `other` has only those of `models`."""
    first, second = cells(place, one), cells(place, other)
    assert second.keys() == {cell for cell in first if cell[0] in models}
    for cell, row in ((cell, first[cell]) for cell in second):
        assert {key: row[key] for key in QUALITY} == {key: second[cell][key] for key in QUALITY}, cell
        assert row["artifact"] == second[cell]["artifact"], cell


def leftovers(folder: Path) -> list[Path]:
    return list(folder.rglob(".tmp-*"))


def test_a_cell_is_what_the_stages_give_one_by_one(place: Path, here: Result) -> None:
    found = cells(place, "here")
    for corpus, name in ((CORPUS, "es"), (place / "backwards.jsonl", "backwards")):
        output, reports = place / f"stages-{name}", place / f"reports-{name}"
        of_model = ("--model", place / "one", "--output")
        commands = [
            ("export", *of_model, output),
            ("quantize", *of_model, output, "--corpus", corpus, "--recipes", *RECIPES),
            (
                "eval",
                *of_model,
                reports,
                "--artifacts",
                output,
                "--corpus",
                corpus,
                "--without-torch",
                *SETTINGS,
                "--recipes",
                "fp32",
                *RECIPES,
            ),
        ]
        for command in commands:
            result = stage(*command)
            assert result.status == 0, result.stderr
        rows = json.loads((reports / "one" / "report.json").read_text(encoding="utf-8"))["artifacts"]
        for row in rows:
            own = found["one", row["name"], name]
            assert {key: own[key] for key in QUALITY} == {key: row[key] for key in QUALITY}
            assert own["artifact"] == open_artifact(output / "one" / row["name"]).digest
            assert own["prefill"][0].keys() == row["prefill"][0].keys() and own.keys() > row.keys() - {
                "name",
                "kind",
                "llama_cpp",
                "continuation",
                "key_error",
            }


def test_what_is_measured_is_not_measured_again(place: Path, here: Result) -> None:
    shutil.copytree(place / "here", place / "again")
    shutil.copytree(place / "here-report", place / "again-report")
    kept = {path: path.read_bytes() for path in (place / "again" / "cells").iterdir()}
    # There is one latency per artifact. An artifact that is not calibrated belongs to both corpora.
    assert len(kept) == 2 * (2 * 3) + 2 * (2 + 2)
    result = stage("cuantiza.sweep", *arguments(place, "again"))
    assert result.status == 0 and "up to date" in result.stderr.splitlines()[-1], result.stderr
    assert "quality  " not in result.stderr and "latency  " not in result.stderr
    assert {path: path.read_bytes() for path in (place / "again" / "cells").iterdir()} == kept

    damaged = next(path for path in sorted(kept) if path.name.startswith("quality-"))
    damaged.write_bytes(kept[damaged].replace(b"nll", b"nil", 1))
    result = stage("cuantiza.sweep", *arguments(place, "again"))
    assert result.status == 0 and "quality  " in result.stderr and "latency  " not in result.stderr, result.stderr
    assert {path: path.read_bytes() for path in (place / "again" / "cells").iterdir()} == kept


def test_ctrl_c_leaves_what_can_go_on(place: Path, here: Result) -> None:
    given = arguments(place, "stopped", models=("one",))
    interrupted(
        [sys.executable, "-m", "cuantiza.sweep", *given], place / "stopped", "quantize  one × int8-dynamic × es: "
    )
    result = stage("cuantiza.sweep", *given)
    assert result.status == 0, result.stderr
    assert_equal(place, "here", "stopped", ("one",))


def interrupted(command: list[str], work: Path, line: str) -> None:
    """Run `command` and send Ctrl-C half a second after `line`: it ends with 130, no traceback, and no leftovers."""
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        said = []
        for text in process.stderr:
            said.append(text)
            if text.startswith(line):
                break
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        said.append(process.stderr.read())
        assert process.wait(120) == 130 and "Traceback" not in "".join(said), "".join(said)
    assert not leftovers(work) and not list((work / "cells").glob("latency-*"))


def test_one_cell_that_fails_keeps_the_others(place: Path) -> None:
    (place / "short.jsonl").write_text("\n".join(json.dumps({"text": f"Hola, mundo {n}."}) for n in range(9)))
    outputs = ["--work", place / "short", "--output", place / "short-report"]
    result = stage(
        "cuantiza.sweep", "--models", place / "one", "--recipes", "int8-dynamic", "fp16", "--corpora", place / "short.jsonl",
        *SETTINGS, *outputs,
    )  # fmt: skip
    assert_user_error(result, "1 of 3 cells", "one × int8-dynamic × short", "calibration needs at least 8")
    assert {recipe for _, recipe, _ in cells(place, "short")} == {"fp32", "fp16"}
    assert "int8-dynamic × short" in (place / "short-report" / "sweep.md").read_text(encoding="utf-8")


def test_a_text_that_is_unfit_for_a_model_keeps_the_others(place: Path) -> None:
    (place / "letters.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    outputs = ["--work", place / "unfit", "--output", place / "unfit-report"]
    result = stage(
        "cuantiza.sweep", "--models", place / "one", "--recipes", "fp16", "--corpora", place / "letters.jsonl",
        place / "backwards.jsonl", *SETTINGS, *outputs,
    )  # fmt: skip
    assert_user_error(result, "2 of 4 cells", "one × fp32 × letters", "fewer than 2 tokens")
    assert {cell[1:] for cell in cells(place, "unfit")} == {("fp32", "backwards"), ("fp16", "backwards")}


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (("--models", "models/none"), ("MODEL=models/none", "folder")),
        (("--models",), ("MODELS=", "is empty")),
        (("--recipes", "int9"), ("RECIPES=int9", "choose from")),
        (("--corpora", "corpus/none.txt"), ("CORPUS=corpus/none.txt",)),
        (("--corpora", "corpus/es", "{twin}"), ("CORPORA=", "called es", "rename")),
        (("--shard", "0"), ("--shard 0", "from 1")),
        (("--output", "{work}"), ("--output", "--work")),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(tmp_path: Path, options: tuple, fragments: tuple) -> None:
    shutil.copytree(CORPUS, tmp_path / "twin" / "es")
    next((tmp_path / "twin" / "es").glob("*.txt")).unlink()
    (tmp_path / "twin" / "es" / "index.json").unlink()
    named = {"twin": tmp_path / "twin" / "es", "work": tmp_path / "work"}
    outputs = ("--work", tmp_path / "work", "--output", tmp_path / "report")
    result = stage(
        "cuantiza.sweep", *outputs, *(option.format(**named) for option in options), env={"HF_HUB_OFFLINE": "1"}
    )
    assert_user_error(result, *fragments)
    assert_nothing_published(tmp_path / "work")
    assert not result.stderr.count("export  ")


def test_without_ray_its_option_is_told(tmp_path: Path) -> None:
    env = {"PYTHONPATH": str(tmp_path)}
    # This hides Ray if the test's environment happens to have it.
    (tmp_path / "ray.py").write_text("raise ModuleNotFoundError('no ray', name='ray')")
    result = stage(
        "cuantiza.sweep", "--ray", "auto", "--work", tmp_path / "work", "--output", tmp_path / "report", env=env
    )
    assert_user_error(result, "RAY=auto", "setup/ray.txt")


def test_the_page_has_every_cell_and_escapes_names(place: Path, here: Result) -> None:
    text = (place / "here-report" / "sweep.json").read_text(encoding="utf-8")
    found = Grid.from_json(text)
    assert found.to_json() == text
    assert (place / "here-report" / "sweep.html").read_text(encoding="utf-8") == html(found)
    assert (
        html(found).count("<tr") == 1 + 12
        and html(found).count("<svg") == 4
        and "http" not in html(found).replace("http://www.w3.org/2000/svg", "")
    )
    assert markdown(found).count("\n| ") == 12 + 1 and " ● " in markdown(found)
    assert all(f"{cell.perplexity:,.2f}" in html(found) for cell in found.cells)
    named = tuple(cell.model_copy(update={"model": "<script>|"}) for cell in found.cells)
    found = found.model_copy(update={"cells": named})
    assert "<script>" not in html(found) and "<script>\\|" in markdown(found)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster of three nodes with one processor each."""
    processors = sorted(os.sched_getaffinity(0))
    with Cluster(VENV, [[processors[n % len(processors)]] for n in range(3)]) as found:
        yield found


def on_ray(cluster: Cluster, place: Path, name: str) -> list[str]:
    return [str(VENV / "bin" / "python"), "-m", "cuantiza.sweep", *arguments(place, name, "--ray", cluster.address)]


PROGRAM = """
import json, os, signal, sys, time
from dataclasses import dataclass
from pathlib import Path
from cuantiza.core.errors import UserError
from cuantiza.sweep.on_ray import OnRay

@dataclass(frozen=True)
class Sleep:
    alone: bool
    kind, label = "sleep", "a while"
    def run(self):
        start = time.monotonic()
        time.sleep(0.5)
        return start, time.monotonic(), self.alone

@dataclass(frozen=True)
class Dies:
    kind, label, alone = "dies", "of a signal", False
    times: int
    log: Path
    def run(self):
        with self.log.open("a") as log:
            log.write("x")
        if len(self.log.read_text()) <= self.times:
            os.kill(os.getpid(), signal.SIGKILL)
        return "lived"

@dataclass(frozen=True)
class Refuses:
    kind, label, alone = "refuses", "an input", False
    def run(self):
        raise UserError("file: is wrong; mend it")

work = Path(sys.argv[2])
with OnRay(sys.argv[1], 1, work) as place:
    tasks = [Sleep(number % 2 == 0) for number in range(18)]
    spans = [[*done.value, done.where] for done in place.run(tasks)]
    rest = list(place.run([Dies(2, work / "two"), Dies(99, work / "always"), Refuses()]))
print(json.dumps({"spans": spans, "ends": {f"{done.task}": [done.value, done.error] for done in rest}}))
"""


@needs_ray
def test_alone_is_alone_and_the_dead_are_tried_again(cluster: Cluster, tmp_path: Path) -> None:
    command = [VENV / "bin" / "python", "-c", PROGRAM, cluster.address, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["spans"]) == 18 and len({where for *_, where in found["spans"]}) == 3
    for start, end, alone, where in found["spans"]:
        others = [span for span in found["spans"] if span[3] == where and span != [start, end, alone, where]]
        assert not [span for span in others if span[0] < end and start < span[1]]
    two, always, refused = found["ends"].values() if len(found["ends"]) == 3 else pytest.fail(str(found["ends"]))
    ends = sorted(map(str, (two, always, refused)))
    assert ends == sorted(
        ["['lived', None]", "[None, 'WorkerCrashedError, 4 times']", "[None, 'file: is wrong; mend it']"]
    )
    assert (tmp_path / "always").read_text() == "xxxx" and done.stderr.count("again  ") == 2 + 3


@needs_ray
def test_no_cluster_and_too_small_a_cluster_are_one_line(cluster: Cluster, place: Path) -> None:
    command = on_ray(cluster, place, "small")
    done = subprocess.run([*command, "--threads", "2"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert_user_error(Result(done.returncode, done.stdout, done.stderr), "no node with 2 processors", "--threads")
    command[command.index(cluster.address)] = "127.0.0.1:1"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert_user_error(Result(done.returncode, done.stdout, done.stderr), "RAY=127.0.0.1:1", "ray start --head")
    assert_nothing_published(place / "small" / "artifacts")


@needs_ray
def test_ctrl_c_on_a_cluster_leaves_what_can_go_on(cluster: Cluster, place: Path) -> None:
    interrupted(on_ray(cluster, place, "ray"), place / "ray", "quantize  ")
    tasks = [line for node in range(3) for line in cluster.processes(node).values() if "_perform" in line]
    assert not tasks, tasks


@needs_ray
def test_a_node_that_dies_changes_nothing(cluster: Cluster, place: Path, here: Result) -> None:
    """Continues where Ctrl-C stopped the run, and loses a busy node. Runs last, as the other tests need all three."""
    process = subprocess.Popen(on_ray(cluster, place, "ray"), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not any("spawn_main" in line for line in cluster.processes(2).values()):
        time.sleep(0.05)
    assert process.poll() is None, process.stderr.read()
    cluster.kill(2)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0 and "Traceback" not in said, said
    assert "again     " in said
    assert not leftovers(place / "ray")
    assert_equal(place, "here", "ray")


def test_the_page_of_the_speed_up_is_made_of_its_figures() -> None:
    tasks = {"export": [10.0, 10.0], "quantize": [20.0] * 10, "quality": [6.0] * 12, "latency": [5.0] * 12}
    runs = {
        str(workers): [{"seconds": seconds, "tasks": tasks}] * 3 for workers, seconds in ((0, 350), (1, 360), (2, 200))
    }
    fields = {"cpu": "a CPU", "recipes": ["a"] * 5, "tokens": 1000, "cells": 12, "runs": runs}
    text = sweep_speedup.page(fields)
    assert "| 2 workers | 200 200 200 | 1.80 | 20 | 200 | 72 | 60 |" in text
    # 20 exports of 10 s, 900 quantizations of 20 s, 1,000 cells of 72 / 12 s, 920 latencies of 5 s.
    plain = " ".join(text.split())
    assert "20 exports of 10.0 s, 900 quantizations of 20.0 s, 1000 cells to score of 6.0 s, 920 latencies" in plain
    assert "| 1 | 3.3 | 300.0 | 100.0 | 76.7 | 8.00 |" in text and "| 50 | 0.2 | 6.0 | 2.0 | 1.5 | 0.16 |" in text


def test_a_text_of_the_grid_may_be_what_each_model_writes() -> None:
    """It calibrates alone; what is scored is the embedded text, so that its cells compare with those of real text."""
    corpora = read_grid(["models/es-mini"], ["int8-static"], [Source("corpus/es"), Source("self")]).corpora
    assert corpora["self"].calibration.seed == 0 and corpora["es"].calibration == load_splits(Source())[0]
    assert corpora["self"].test == corpora["es"].test
