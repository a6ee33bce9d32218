"""The import arrows: export -> core <- quantize, core <- eval; torch in the few files that need it."""

import ast
import tomllib

import pytest
from conftest import ROOT

TORCH = {"export/checkpoint.py", "export/parity.py", "eval/torch_baseline.py"}
STAGES = ("core", "export", "quantize", "eval")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("stage", STAGES)
def test_stages_import_core_alone(stage):
    for path in (ROOT / stage).glob("*.py"):
        others = set(imports(path)) & set(STAGES) - {stage, "core"}
        assert not others, f"{path} imports {others}"


def test_torch_is_imported_where_it_is_needed_only():
    found = {
        str(path.relative_to(ROOT))
        for stage in STAGES
        for path in (ROOT / stage).glob("*.py")
        if "torch" in set(imports(path))
    }
    assert found == TORCH


def test_files_stay_small():
    long = [
        path
        for path in ROOT.rglob("*.py")
        if ".venv" not in str(path) and len(path.read_text(encoding="utf-8").splitlines()) > 450
    ]
    assert not long


def test_every_direct_dependency_is_pinned():
    import re

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "pins/default.txt").read_text().splitlines()
    }
    wanted = {
        re.split(r"[\[>=<]", name)[0] for name in [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    }
    assert wanted <= pins
