"""The import arrows: stages -> core; the rooms of cuantiza/ -> core; sweep -> stages; lab -> all of them, and nobody -> lab."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest

from helpers import ROOT

TORCH = {"export/weights.py", "export/parity.py", "eval/measure/torch_engine.py"}
STAGES = ("export", "quantize", "eval")
ROOMS = ("bundle", "demo", "generate", "index", "sweep")


def modules(path: Path) -> set[str]:
    """Every module that `path` imports; of `from a import b` both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def imports(path: Path) -> set[str]:
    """The packages that `path` imports."""
    return {name.split(".")[0] for name in modules(path)}


def rooms(path: Path) -> set[str]:
    """The rooms of ours that `path` imports: "core", a stage, one of ROOMS, "lab"."""
    names = [name.split(".") for name in modules(path)]
    own = {parts[1] for parts in names if parts[0] == "cuantiza" and len(parts) > 1}
    return (own & {"core", *STAGES, *ROOMS}) | {parts[0] for parts in names} & {"lab", *STAGES}


def sources(room: str) -> list[Path]:
    """The files of a room, which is a folder or one file."""
    for place in (ROOT / "cuantiza" / room, ROOT / room):
        if found := [*place.rglob("*.py"), *([file] if (file := place.with_suffix(".py")).is_file() else [])]:
            return found
    raise AssertionError(f"no room {room}")


@pytest.mark.parametrize("room", ["core", *STAGES, "bundle", "demo", "generate", "index"])
def test_stages_and_rooms_import_core_alone(room: str) -> None:
    for path in sources(room):
        others = rooms(path) - {room, "core"}
        assert not others, f"{path} imports {others}"


def test_sweep_imports_stages_and_core() -> None:
    for path in sources("sweep"):
        others = rooms(path) - {"sweep", "core", *STAGES}
        assert not others and "torch" not in imports(path), f"{path} imports {others}"


def test_what_runs_in_every_environment_imports_next_to_nothing() -> None:
    names = set(sys.stdlib_module_names)
    assert imports(ROOT / "lab/bench/worker.py") <= {*names, "numpy"}
    assert imports(ROOT / "lab/bench/__init__.py") | imports(ROOT / "lab/bench/peers/__init__.py") <= names
    assert imports(ROOT / "lab/__init__.py") | imports(ROOT / "cuantiza/__init__.py") <= names
    for path in (ROOT / "lab/bench/peers").glob("*.py"):
        own = {name for name in modules(path) if name.split(".")[0] in {"cuantiza", "lab", *STAGES}}
        assert all(name.startswith("lab.bench.peers") for name in own), f"{path} imports {own}"
    for path in (ROOT / "lab/matrix/python").glob("*.py"):
        own = {name for name in modules(path) if name.split(".")[0] in {"cuantiza", "lab", *STAGES}}
        allowed = ("lab.matrix.python", "cuantiza.core.onnx.genai_config", "cuantiza.core.inputs.model_config")
        assert all(name.startswith(allowed) for name in own), f"{path} imports {own}"


def test_torch_is_imported_where_it_is_needed_only() -> None:
    found = {
        str(path.relative_to(ROOT))
        for room in ("core", *STAGES, *ROOMS)
        for path in sources(room)
        if "torch" in imports(path)
    }
    assert found == TORCH


def test_ray_is_imported_in_one_file() -> None:
    for room in ("core", *STAGES, *ROOMS, "lab"):
        for path in sources(room):
            assert ("ray" in imports(path)) == (path == ROOT / "cuantiza/sweep/on_ray.py"), path


def test_files_stay_small() -> None:
    long = [
        path
        for path in ROOT.rglob("*.py")
        if ".venv" not in str(path)
        and "node_modules" not in str(path)
        and len(path.read_text(encoding="utf-8").splitlines()) > 450
    ]
    assert not long


def test_every_direct_dependency_is_pinned() -> None:
    import re

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "setup/default.txt").read_text().splitlines()
    }
    wanted = {
        re.split(r"[\[>=<]", name)[0] for name in [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    }
    assert wanted <= pins
