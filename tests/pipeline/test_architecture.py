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


def test_rooms_stay_small() -> None:
    rooms: dict[Path, int] = {}
    for path in sources(*PRODUCT, "tests"):
        rooms[path.parent] = rooms.get(path.parent, 0) + 1
    assert len(rooms) > 20 and not {room: count for room, count in rooms.items() if count > 10}


def test_files_stay_small() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(*PRODUCT, "tests")}
    assert len(lengths) > 200 and not {path: length for path, length in lengths.items() if length > 400}


# What the programs for other libraries' environments may import of core: these modules need NumPy at most.
LIGHT = {
    "cuantiza.core",
    "cuantiza.core.contract",
    "cuantiza.core.errors",
    "cuantiza.core.inputs.model_config",
    "cuantiza.core.machine.child",
    "cuantiza.core.machine.hardware",
    "cuantiza.core.machine.limits",
    "cuantiza.core.onnx.genai_config",
    "lab.checkpoints.gguf_file",
}


def loaded(path: Path) -> set[str]:
    """The modules of ours that `path` imports when it is loaded."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PRODUCT:
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                found.add(name if (ROOT / f"{name.replace('.', '/')}.py").is_file() else node.module)
    return found


def test_what_runs_in_every_environment_imports_next_to_nothing() -> None:
    standard = set(sys.stdlib_module_names)
    assert packages(ROOT / "lab/bench/worker.py") <= {*standard, "numpy", "cuantiza"}
    rooms = ("lab/bench", "lab/bench/peers", "lab/quality", "lab/quality/peers")
    for name in (*(f"{room}/__init__.py" for room in rooms), "setup/make_env.py"):
        assert packages(ROOT / name) <= standard, name
    for name in ("lab/__init__.py", "cuantiza/__init__.py"):
        assert packages(ROOT / name) <= {*standard, "cuantiza"} and not loaded(ROOT / name), name
    peers = ("lab/bench/peers", "lab/quality/peers", "lab/matrix/python")
    programs = [path for room in peers for path in (ROOT / room).glob("*.py")]
    assert len(programs) > 15
    for path in (*programs, ROOT / "lab/bench/worker.py"):
        others = loaded(path) - LIGHT
        assert all(name.startswith(tuple(room.replace("/", ".") for room in peers)) for name in others), (path, others)
    for name in LIGHT:
        path = ROOT / f"{name.replace('.', '/')}.py"
        assert not path.is_file() or loaded(path) <= LIGHT, name


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
        ("cuantiza/generate.py", "def late():\n    import torch", "torch is imported in four files"),
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


def test_no_child_process_is_given_what_a_main_module_defines() -> None:
    """A child cannot import from the `__main__.py` of a package, so a function of it fails there, and only there."""
    found = []
    for path in ROOT.glob("[a-z]*/**/__main__.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name))
        sent = {
            arg.id
            for call in calls
            if call.func.id in ("isolated", "Remote")
            for arg in call.args
            if isinstance(arg, ast.Name)
        }
        found += [(path, name) for name in own & sent]
    assert not found
