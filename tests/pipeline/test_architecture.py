"""What keeps the tree readable and no linter can say. Which module may import which is in pyproject.toml (importlinter)."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from helpers import ROOT

PRODUCT = ("cuantiza", "export", "quantize", "eval", "lab", "setup")
CODE = {".py", ".js", ".mjs", ".mk"}


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in CODE]


def modules(path: Path) -> set[str]:
    """Every module that `path` imports; of `from a import b` both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in modules(path)}


def test_the_top_level_stays_small() -> None:
    ignored = [name.strip("/") for name in (ROOT / ".gitignore").read_text(encoding="utf-8").split()]
    shown = [path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."]
    kept = [name for name in shown if not any(fnmatch(name, pattern) for pattern in ignored)]
    assert 5 < len(kept) <= 11, kept


<<<<<<< HEAD
def test_rooms_stay_small() -> None:
    rooms: dict[Path, int] = {}
    for path in sources(*PRODUCT):
        rooms[path.parent] = rooms.get(path.parent, 0) + 1
    assert len(rooms) > 20 and not {room: count for room, count in rooms.items() if count > 10}
=======
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


# What the programs for other libraries' environments may import of core: these need NumPy at most.
LIGHT = {
    "cuantiza.core",
    "cuantiza.core.contract",
    "cuantiza.core.errors",
    "cuantiza.core.inputs.model_config",
    "cuantiza.core.machine.child",
    "cuantiza.core.machine.hardware",
    "cuantiza.core.onnx.genai_config",
}


def own_modules(path: Path) -> set[str]:
    """The modules of ours that `path` imports when it is loaded."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in {"cuantiza", "lab", *STAGES}:
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                found.add(name if (ROOT / f"{name.replace('.', '/')}.py").is_file() else node.module)
    return found


def test_what_runs_in_every_environment_imports_next_to_nothing() -> None:
    names = set(sys.stdlib_module_names)
    assert imports(ROOT / "lab/bench/worker.py") <= {*names, "numpy", "cuantiza"}
    assert imports(ROOT / "lab/bench/__init__.py") | imports(ROOT / "lab/bench/peers/__init__.py") <= names
    for path in (ROOT / "lab/__init__.py", ROOT / "cuantiza/__init__.py"):
        assert imports(path) <= {*names, "cuantiza"} and not own_modules(path), path
    programs = {
        *(ROOT / "lab/bench/peers").glob("*.py"),
        *(ROOT / "lab/matrix/python").glob("*.py"),
        ROOT / "lab/bench/worker.py",
    }
    for path in programs:
        others = own_modules(path) - LIGHT
        assert all(name.startswith(("lab.bench.peers", "lab.matrix.python")) for name in others), f"{path}: {others}"
    for name in LIGHT:
        path = ROOT / f"{name.replace('.', '/')}.py"
        assert not path.is_file() or own_modules(path) <= LIGHT, name


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
>>>>>>> main


def test_files_stay_small() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(*PRODUCT, "tests")}
    assert len(lengths) > 200 and not {path: length for path, length in lengths.items() if length > 400}


def test_what_runs_in_every_environment_imports_next_to_nothing() -> None:
    standard = set(sys.stdlib_module_names)
    assert packages(ROOT / "lab/bench/worker.py") <= {*standard, "numpy"}
    for name in ("lab/__init__.py", "lab/bench/__init__.py", "lab/bench/peers/__init__.py", "setup/make_env.py"):
        assert packages(ROOT / name) <= standard, name
    for folder, allowed in (
        ("lab/bench/peers", ("lab.bench.peers", "cuantiza.core.contract", "cuantiza.core.onnx.genai_config")),
        (
            "lab/matrix/python",
            (
                "lab.matrix.python",
                "cuantiza.core.contract",
                "cuantiza.core.onnx.genai_config",
                "cuantiza.core.inputs.model_config",
            ),
        ),
    ):
        for path in (ROOT / folder).glob("*.py"):
            own = {name for name in modules(path) if name.split(".")[0] in PRODUCT}
            assert all(name.startswith(allowed) or allowed[-1].startswith(name) for name in own), (
                f"{path} imports {own}"
            )


def test_every_direct_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "setup/default.txt").read_text().splitlines()
    }
    needed = [
        *project["dependencies"],
        *(name for extra in ("export", "corpora", "plots", "dev") for name in extras[extra]),
    ]
    wanted = {re.split(r"[\[>=<]", name)[0] for name in needed} - {project["name"]}
    assert len(wanted) > 20 and wanted <= pinned


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("quantize/__main__.py", "import cuantiza.eval.measure", "A stage imports core and no other stage"),
        ("cuantiza/core/errors.py", "from cuantiza.core.store import artifact", "core has layers of its own"),
        ("cuantiza/generate.py", "def late():\n    import torch", "torch is imported in three files"),
        ("cuantiza/bundle/card.py", "import lab.bench", "Nothing that is installed imports lab/"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, line: str, contract: str) -> None:
    for name in PRODUCT:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.json"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / file).open("a", encoding="utf-8") as code:
        code.write(f"\n\n{line}\n")
    done = subprocess.run(
        [sys.executable, tmp_path / "setup/check_tree.py", "imports"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and re.search(rf"{contract}.* BROKEN", done.stdout), done.stdout + done.stderr
