"""What is installed is what was pinned, and what is installed needs no network."""

import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.utils import canonicalize_name

from helpers import ROOT

PINS = sorted((ROOT / "setup").glob("*.txt"))
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PIN = re.compile(r"([A-Za-z0-9._-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n")


@pytest.mark.parametrize("path", PINS, ids=lambda path: path.stem)
def test_every_package_is_pinned_with_hashes(path):
    text = path.read_text()
    pins = PIN.findall(text)
    assert "".join(f"{name}=={number}{hashes}\n" for name, number, hashes in pins) == text  # and nothing else
    assert len({canonicalize_name(name) for name, *_ in pins}) == len(pins) > 20


@pytest.mark.parametrize("path", PINS, ids=lambda path: path.stem)
def test_the_hashes_that_a_file_has_are_found(path):
    """setup/pin.py keeps those of torch's CPU build where its index does not answer."""
    text, kept = path.read_text(), runpy.run_path(str(ROOT / "setup/pin.py"))["kept_hashes"]
    for name, _, hashes in PIN.findall(text):
        assert kept(text, name) == set(re.findall(r"sha256:(\w+)", hashes)), name
    assert kept(text, "no-such-package") == set()


def test_this_environment_is_what_the_pins_say():
    pins = PIN.findall((ROOT / "setup/default.txt").read_text())
    assert {name: version(name).split("+")[0] for name, *_ in pins} == {name: number for name, number, _ in pins}


def wheel(folder: Path, name: str = "tiny", needs: str = "", version: str = "1.0") -> str:
    """Make a package of one empty module in `folder`; returns its sha256 in hex."""
    path, about = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": "",
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    return hashlib.sha256(path.read_bytes()).hexdigest()


PACKAGES = f"venv/lib/python3.{sys.version_info.minor}/site-packages"


def set_up(folder: Path, pins: str, venv: str = "venv", *below: Path) -> subprocess.CompletedProcess:
    (folder / "pins.txt").write_text(pins)
    command = [sys.executable, ROOT / "setup/make_env.py", folder / venv, folder / "pins.txt", *below]
    env = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def test_a_file_with_another_hash_is_not_installed(tmp_path):
    digest = wheel(tmp_path)
    module = tmp_path / PACKAGES / "tiny.py"
    for pins in (f"tiny==1.0 --hash=sha256:{digest[::-1]}\n", "tiny==1.0\n"):
        refused = set_up(tmp_path, pins)
        assert refused.returncode == 2 and not module.exists(), refused.stderr
        assert refused.stderr.splitlines()[-1].startswith("error: could not install the packages")
        assert "hash" in refused.stderr.lower()  # pip's own words say which file
    accepted = set_up(tmp_path, f"tiny==1.0 --hash=sha256:{digest}\n")
    assert accepted.returncode == 0 and module.exists(), accepted.stderr


def test_an_environment_that_stands_on_another_installs_only_what_that_lacks(tmp_path):
    pins = {name: f"{name}==1.0 --hash=sha256:{wheel(tmp_path, name)}\n" for name in ("tiny", "other")}
    own = lambda: {file.name for file in (tmp_path / "above").rglob("*.py")} & {"tiny.py", "other.py"}  # noqa: E731
    assert set_up(tmp_path, pins["tiny"]).returncode == 0
    done = set_up(tmp_path, "".join(pins.values()), "above", tmp_path / "venv")
    assert done.returncode == 0 and own() == {"other.py"}, done.stderr
    subprocess.run([tmp_path / "above/bin/python", "-c", "import tiny, other"], check=True)
    # The lower one has another version now, which is not the upper one's pin: that gets its own.
    newer = wheel(tmp_path, version="2.0")
    assert set_up(tmp_path, f"tiny==2.0 --hash=sha256:{newer}\n").returncode == 0
    done = set_up(tmp_path, "".join(pins.values()), "above", tmp_path / "venv")
    assert done.returncode == 0 and own() == {"tiny.py", "other.py"}, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="torch's CPU build is asked for on Linux alone")
def test_where_torch_has_no_cpu_build_the_other_has_a_hash_too(tmp_path):
    """What that needs, CUDA on real machines, has none, which is said."""
    digest = wheel(tmp_path, "torch", needs="Requires-Dist: tiny\n")
    wheel(tmp_path)
    refused = set_up(tmp_path, f"torch==1.0 --hash=sha256:{digest[::-1]}\n")
    assert refused.returncode == 2 and not (tmp_path / PACKAGES / "torch.py").exists()
    done = set_up(tmp_path, f"torch==1.0 --hash=sha256:{digest}\n")
    assert done.returncode == 0 and "CUDA packages have no hash" in done.stderr
    assert (tmp_path / PACKAGES / "torch.py").exists() and (tmp_path / PACKAGES / "tiny.py").exists()


@pytest.mark.skipif(
    subprocess.run(["unshare", "--map-root-user", "--net", "true"], capture_output=True).returncode
    if shutil.which("unshare")
    else True,
    reason="no unshare, or not permitted to make a network namespace",
)
def test_the_pipeline_needs_no_network(tiny_folder, tmp_path):
    def offline(*command: str) -> subprocess.CompletedProcess:
        # Without the variables that tell the hub's client not to try, and with a cache that holds nothing.
        env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
        return subprocess.run(
            ["unshare", "--map-root-user", "--net", *command],
            cwd=ROOT,
            env={**env, "HF_HOME": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            timeout=600,
        )

    # A connection fails there, so that a stage that needed one would.
    reach = offline(sys.executable, "-c", "import socket; socket.create_connection(('1.1.1.1', 443), 5)")
    assert "Network is unreachable" in reach.stderr
    venv = Path(sys.executable).parent.parent
    where = (f"VENV={venv}", f"MODEL={tiny_folder}", f"OUT={tmp_path / 'artifacts'}", f"REPORTS={tmp_path / 'reports'}")
    done = offline("make", "export", "quantize", "eval", *where, "EVAL=--tokens 600 --rounds 1")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "reports/tiny/report.json").read_text())
    assert [row["name"] for row in report["artifacts"]][:3] == ["fp32", "int8-dynamic", "int8-static"]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_what_exists_by_actions_that_cannot_change(path):
    fields = yaml.safe_load(path.read_text())
    assert fields["permissions"] in ({"contents": "read"}, {"contents": "write"})
    assert (fields["permissions"]["contents"] == "write") == (path.stem == "release")
    makefiles = (ROOT / "Makefile").read_text() + (ROOT / "lab/lab.mk").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefiles, re.MULTILINE))
    steps = [step for job in fields["jobs"].values() for step in job["steps"]]
    for step in steps:
        # "./" is this repository's own action.
        assert "uses" not in step or step["uses"] == "./" or re.fullmatch(r"[a-z-]+/[a-z-]+@[0-9a-f]{40}", step["uses"])
        for target in re.findall(r"\bmake ([a-z-]+)", step.get("run", "")):
            assert target in targets
        for script in re.findall(r"\bbash (\S+)", step.get("run", "")):
            assert (ROOT / script).is_file()
    assert any("run" in step for step in steps)


def test_npm_packages_are_locked_with_hashes():
    lock = json.loads((ROOT / "js/package-lock.json").read_text())
    packages = [fields for name, fields in lock["packages"].items() if name]
    assert len(packages) > 20 and all(fields["integrity"].startswith("sha512-") for fields in packages)
