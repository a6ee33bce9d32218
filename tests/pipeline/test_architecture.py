"""The import arrows: every stage and what is beside it -> core; sweep -> all stages; torch and ray where they are needed."""

import ast
import sys
import tomllib

import pytest

from helpers import ROOT

TORCH = {"export/weights.py", "export/parity.py", "eval/measure/torch_engine.py"}
STAGES = ("core", "export", "quantize", "eval")


def modules(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def imports(path):
    yield from (name.split(".")[0] for name in modules(path))


@pytest.mark.parametrize("stage", STAGES)
def test_stages_import_core_alone(stage):
    for path in (ROOT / stage).glob("*.py"):
        others = set(imports(path)) & {*STAGES, "bench"} - {stage, "core"}
        assert not others, f"{path} imports {others}"


@pytest.mark.parametrize("room", ["bench", "bundle", "demo", "generate", "runtimes"])
def test_what_is_beside_the_stages_imports_core_alone(room):
    for path in (ROOT / room).rglob("*.py"):
        others = set(imports(path)) & {*STAGES, "bench"} - {room, "core"}
        assert not others, f"{path} imports {others}"


def test_what_runs_in_every_environment_imports_next_to_nothing():
    names = set(sys.stdlib_module_names)
    assert set(imports(ROOT / "lab/bench/worker.py")) <= {*names, "numpy"}
    assert set(imports(ROOT / "lab/bench/__init__.py")) | set(imports(ROOT / "lab/bench/peers/__init__.py")) <= names
    for path in (ROOT / "lab/bench/peers").glob("*.py"):
        own = {name for name in modules(path) if name.split(".")[0] in {*STAGES, "bench"}}
        assert all(name.startswith("lab.bench.peers") for name in own), f"{path} imports {own}"
    for path in (ROOT / "lab/matrix/python").glob("*.py"):
        own = {name for name in modules(path) if name.split(".")[0] in {*STAGES, "bench", "runtimes"}}
        others = {name for name in own if not name.startswith("lab.matrix.python")}
        assert others <= {"cuantiza.core.onnx.genai_config", "cuantiza.core.inputs.model_config"}, (
            f"{path} imports {others}"
        )


def test_torch_is_imported_where_it_is_needed_only():
    found = {
        str(path.relative_to(ROOT))
        for stage in STAGES
        for path in (ROOT / stage).glob("*.py")
        if "torch" in set(imports(path))
    }
    assert found == TORCH


def test_ray_is_imported_in_one_file_and_sweep_by_none():
    rooms = [path.parent for path in ROOT.glob("*/__init__.py")]
    assert ROOT / "sweep" in rooms
    for path in (file for room in rooms for file in room.rglob("*.py")):
        found = set(imports(path))
        assert ("ray" in found) == (path == ROOT / "cuantiza/sweep/on_ray.py"), path
        assert path.parent.name == "sweep" or "sweep" not in found, path
        if path.parent.name == "sweep":
            own = found & {room.name for room in rooms}
            assert own <= {*STAGES, "sweep"} and "torch" not in found, path


def test_files_stay_small():
    long = [
        path
        for path in ROOT.rglob("*.py")
        if ".venv" not in str(path)
        and "node_modules" not in str(path)
        and len(path.read_text(encoding="utf-8").splitlines()) > 450
    ]
    assert not long


def test_every_direct_dependency_is_pinned():
    import re

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "setup/default.txt").read_text().splitlines()
    }
    wanted = {
        re.split(r"[\[>=<]", name)[0] for name in [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    }
    assert wanted <= pins
