"""What the rebuild digests count: every module of ours that makes an artifact or measures one, and no other recipe's.

Each recipe, the export and the measuring run in a fresh process, whose own and whose children's imports are recorded.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import cuantiza
from cuantiza.core.inputs.corpus import Source, load_splits
from cuantiza.core.machine.hardware import machine, software
from cuantiza.core.store.artifact import Artifact
from cuantiza.core.store.digests import code_digest, code_files
from cuantiza.eval.measure.engines import Subject
from cuantiza.eval.measure.report import measure
from cuantiza.eval.report.schema import Inputs
from cuantiza.export.stage import export
from cuantiza.quantize.recipes.registry import RECIPES, Recipe, calibration_of
from cuantiza.quantize.settings import Calibration
from cuantiza.quantize.stage import inputs_of

from helpers import CORPUS, ROOT

KINDS = list(dict.fromkeys(type(recipe) for recipe in RECIPES.values()))
QUICK = Calibration(windows=4, tokens=32, minimum=4)
# Python imports this file at its start. A finder that finds nothing sees every module that is about to be loaded.
RECORDER = """\
import os, sys

class Recorder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "cuantiza":
            with open(os.environ["CUANTIZA_TEST_LOADED"], "a") as file:
                file.write(name + "\\n")

sys.meta_path.insert(0, Recorder)
"""
CALLER = "import pickle, sys\nwith open(sys.argv[1], 'rb') as file:\n    calls = pickle.load(file)\nfor call in calls: call()"


def loaded_by(calls: list[Callable], folder: Path) -> set[str]:
    """The modules of ours that a fresh process and its children load for `calls`, which cross over as pickles."""
    (folder / "sitecustomize.py").write_text(RECORDER)
    (folder / "calls").write_bytes(pickle.dumps(calls))
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "CUANTIZA_TEST_LOADED": f"{folder}/loaded"}
    done = subprocess.run(
        [sys.executable, "-c", CALLER, folder / "calls"], env=environment, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set((folder / "loaded").read_text().split())


def quick(recipe: Recipe) -> Recipe:
    """`recipe` with little to calibrate on; a mixed one with a budget that makes it rank the layers."""
    if hasattr(recipe, "static"):
        return dataclasses.replace(recipe, max_delta_ln_ppl=0.0, static=quick(recipe.static))
    if hasattr(recipe, "max_kl"):
        return dataclasses.replace(recipe, max_bytes=None, max_kl=9.0, calibration=QUICK)
    return dataclasses.replace(recipe, calibration=QUICK) if calibration_of(recipe) else recipe


@pytest.fixture(scope="module")
def fp32(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The fp32 artifact of a tiny checkpoint."""
    return export(tiny_folder, tmp_path_factory.mktemp("artifacts"))


@pytest.fixture(scope="module")
def loaded(fp32: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Callable[[type], set[str]]:
    """`loaded(kind)`: the modules of ours that all recipes of `kind` load when they make their files."""
    split = load_splits(Source(str(CORPUS)))[0]

    @functools.cache
    def call(kind: type) -> set[str]:
        folder = tmp_path_factory.mktemp(kind.__name__)
        calls = []
        for name, recipe in RECIPES.items():
            if type(recipe) is kind:
                (folder / name).mkdir()
                text = split if calibration_of(recipe) else None
                calls.append(functools.partial(quick(recipe).make, fp32.path, folder / name, text))
        found = loaded_by(calls, folder)
        assert all((folder / name / "model.onnx").is_file() for name in RECIPES if (folder / name).is_dir())
        return found

    return call


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_module_that_a_recipe_runs_is_in_its_digest(kind: type, loaded: Callable[[type], set[str]]) -> None:
    found = loaded(kind)
    assert {kind.__module__, "cuantiza.core.onnx.file", "cuantiza"} <= found
    assert found <= code_files(kind.__module__).keys()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_changed_byte_in_any_of_them_makes_quantize_rebuild(
    kind: type,
    loaded: Callable[[type], set[str]],
    fp32: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    for name in ("cuantiza", "export", "quantize", "eval"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("web", "__pycache__"))
    monkeypatch.setattr(cuantiza, "__path__", [str(tmp_path / "cuantiza"), str(tmp_path)])
    request.addfinalizer(code_digest.cache_clear)
    recipes = [recipe for recipe in RECIPES.values() if type(recipe) is kind]

    def digests() -> list[str]:
        code_digest.cache_clear()
        return [inputs_of(fp32, recipe, None)["code"] for recipe in recipes]

    before = digests()
    assert digests() == before
    for name in sorted(loaded(kind)):
        path = code_files(kind.__module__)[name]
        assert path.is_relative_to(tmp_path)
        source = path.read_bytes()
        path.write_bytes(source + b"#")
        assert all(new != old for new, old in zip(digests(), before, strict=True)), name
        path.write_bytes(source)
    assert digests() == before
    (tmp_path / "quantize/stage.py").write_text("# another version\n")
    (tmp_path / "quantize/recipes/registry.py").write_text("# another version\n")
    assert digests() == before


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_recipe_depends_on_no_other(kind: type) -> None:
    files = code_files(kind.__module__)
    inside = {name for name in files if name.startswith("cuantiza.quantize.recipes.")}
    recipes = {name for name in inside if files[name].name != "__init__.py"}
    shared = {"cuantiza.quantize.recipes.int8_static"} if kind.__name__ == "MixedStaticInt8" else set()
    assert recipes == {kind.__module__, *shared}


def test_every_module_that_exports_is_in_the_exports_digest(fp32: Artifact, tiny_folder: Path, tmp_path: Path) -> None:
    found = loaded_by([functools.partial(export, tiny_folder, tmp_path / "artifacts")], tmp_path)
    assert {"cuantiza.export.graphs.gpt2", "cuantiza.export.parity", "cuantiza.core.run.runtime"} <= found
    files = code_files("cuantiza.export.stage")
    assert found <= files.keys() and "cuantiza.export.optimum" in files
    assert fp32.manifest.inputs["code"] == code_digest("cuantiza.export.stage")


def test_every_module_that_measures_is_in_the_reports_digest(fp32: Artifact, tiny_folder: Path, tmp_path: Path) -> None:
    subjects = [
        Subject("fp32", "onnx", fp32.model),
        Subject("torch-fp32", "torch", tiny_folder),
        Subject("torch-dynamic", "torch-dynamic", tiny_folder),
    ]
    test = load_splits(Source(str(CORPUS)))[1]
    settings = {"tokens": 300, "window": 64, "rounds": 1, "positions": 1024}
    inputs = Inputs(
        artifacts=(),
        onnx=(),
        torch=True,
        corpus=test.sha256,
        machine=machine(1),
        code="",
        versions=software(),
        **settings,
    )
    call = functools.partial(measure, "tiny", subjects, fp32.path, test, str(CORPUS), inputs, **settings, threads=1)
    found = loaded_by([call], tmp_path)
    assert {"cuantiza.eval.measure.torch_engine", "cuantiza.eval.measure.latency"} <= found
    assert found <= code_files("cuantiza.eval.measure.report").keys()
