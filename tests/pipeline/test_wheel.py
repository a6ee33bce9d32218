"""The wheel, as a user installs it: in a fresh environment with what it declares and nothing else, in an empty folder.

The environments hold links to the packages that this one has, those in the closure of what the wheel declares: an
import that it does not declare fails in them as it would for a user, and nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lab.installed_size import closure, installed

from helpers import ROOT, Result, assert_user_error, copy_tokenizer, stage, tiny_gpt2

LIMIT_BYTES = 20_000_000
LITTLE = ("--tokens", "300", "--rounds", "1")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources: a build leaves files beside them."""
    sources, built = tmp_path_factory.mktemp("sources") / "cuantiza", tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, sources, ignore=shutil.ignore_patterns(".*", "artifacts", "reports", "node_modules", "build"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        built,
        sources,
    ]
    subprocess.run(list(map(str, command)), check=True)
    (found,) = built.glob("cuantiza-*.whl")
    return found


def test_one_name_goes_into_site_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"cuantiza"}
    assert "cuantiza/py.typed" in names and wheel.stat().st_size < LIMIT_BYTES


def test_the_wheel_has_every_module_and_every_file_that_is_read(wheel: Path) -> None:
    """pyproject.toml lists packages and data by hand, so a new room could be forgotten."""
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    wanted = {
        name if name.startswith("cuantiza/") else f"cuantiza/{name}"
        for name in tracked
        if name.startswith(("cuantiza/", "export/", "quantize/", "eval/", "models/", "corpus/"))
    }
    assert len(wanted) > 150 and not wanted - names


def install(wheel: Path, folder: Path, *extras: str) -> Path:
    """An environment with the wheel and what it declares, with `extras`. Gives the folder of its programs."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    command = [sys.executable, "-m", "pip", "--python", folder, "install", "--quiet", "--no-deps", wheel]
    subprocess.run(list(map(str, command)), check=True)
    site = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(folder)}))
    declared = [
        requirement
        for line in PathDistribution(next(site.glob("cuantiza-*.dist-info"))).requires or []
        if (requirement := Requirement(line)).marker is None
        or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)
    ]
    for found in closure([str(item).split(";")[0] for item in declared], installed()).values():
        for top in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(str(found.locate_file(top)))
    return folder / "bin"


def call(programs: Path, where: Path, *arguments: object) -> Result:
    """`cuantiza ARGUMENTS` in the folder `where`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [programs / "cuantiza", *map(str, arguments)], cwd=where, env=environment, capture_output=True, text=True
    )
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def plain(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(wheel, tmp_path_factory.mktemp("plain") / "venv")


@pytest.fixture(scope="module")
def full(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(wheel, tmp_path_factory.mktemp("full") / "venv", "export")


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of artifacts that a checkout made."""
    output = tmp_path_factory.mktemp("elsewhere")
    for arguments in (("export", "--output", output), ("quantize", "--recipes", "fp16", "--output", output)):
        result = stage(*arguments)
        assert result.status == 0, result.stderr
    return output / "es-mini"


def test_artifacts_run_without_torch(plain: Path, elsewhere: Path, tmp_path: Path) -> None:
    imported = subprocess.run([plain / "python", "-c", "import torch"], capture_output=True, text=True)
    assert "No module named 'torch'" in imported.stderr
    said = call(plain, tmp_path, "generate", "--artifact", elsewhere / "fp16", "--tokens", 5)
    assert said.status == 0 and said.stdout.startswith("Me gusta mucho el futbol"), said.stderr
    same = call(plain, tmp_path, "compare", elsewhere, elsewhere, "--without-latency")
    assert same.status == 0 and "no regression" in same.stdout, same.stderr
    copy = shutil.copytree(elsewhere, tmp_path / "artifacts" / "es-mini")
    made = call(plain, tmp_path, "quantize", "--recipes", "int8-weight")
    assert made.status == 0 and (copy / "int8-weight/model.onnx").is_file(), made.stderr
    options = ("--recipes", "fp32", "int8-weight", *LITTLE)
    measured = call(plain, tmp_path, "eval", "--without-torch", *options)
    assert measured.status == 0 and "int8-weight" in measured.stdout, measured.stderr
    assert_user_error(call(plain, tmp_path, "export"), "pip install 'cuantiza[export]'")
    assert_user_error(call(plain, tmp_path, "eval", *options), "pip install 'cuantiza[export]'")
    assert_user_error(call(plain, tmp_path, "sensitivity", "--plot", "chart.svg"), "pip install 'cuantiza[plots]'")
    assert call(plain, tmp_path, "recipes").stdout.count("int8-static") > 2


def test_three_stages_from_an_empty_folder(full: Path, elsewhere: Path, tmp_path: Path) -> None:
    """The embedded model gives the same bytes as in a checkout, and the embedded text is there to measure it on."""
    measured = ("eval", "--without-torch", "--recipes", "fp32", "fp16", *LITTLE)
    for arguments in (("export",), ("quantize", "--recipes", "fp16"), measured):
        result = call(full, tmp_path, *arguments)
        assert result.status == 0, result.stderr
    report = json.loads((tmp_path / "reports/es-mini/report.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in report["artifacts"]] == ["fp32", "fp16"]
    assert report["corpus"]["source"] == "corpus/es"
    for name in ("fp32", "fp16"):
        made = (tmp_path / "artifacts/es-mini" / name / "model.onnx").read_bytes()
        assert made == (elsewhere / name / "model.onnx").read_bytes()


def test_three_stages_on_a_checkpoint_and_a_text_of_the_users_own(full: Path, tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "mine")
    copy_tokenizer(tmp_path / "mine")
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(f"Frase número {n}. " * 90 for n in range(20)))
    own = ("--model", "mine", "--corpus", "text.txt")
    for arguments in (("export", *own[:2]), ("quantize", *own), ("eval", *own, *LITTLE)):
        result = call(full, tmp_path, *arguments)
        assert result.status == 0, result.stderr
    assert (tmp_path / "reports/mine/report.html").is_file()
    report = json.loads((tmp_path / "reports/mine/report.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in report["artifacts"]][:3] == ["fp32", "int8-dynamic", "int8-static"]
