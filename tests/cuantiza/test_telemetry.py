"""ONNX Runtime and OpenVINO send no telemetry from our processes: they leave no device id and ask for no name.

Every test that sees nothing has a counterpart in which the user allowed telemetry, where the same means see it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from cuantiza.core.store.artifact import Artifact

from helpers import ROOT

SWITCH = "ORT_DISABLE_TELEMETRY"
OPENVINO = Path(os.environ.get("RUNTIMES_PYTHON", ROOT / ".venv-runtimes/bin/python"))
# Both send nothing where one of these says that it runs in continuous integration.
CI = ("CI", "TF_BUILD", "GITHUB_ACTIONS", "GITLAB_CI", "CIRCLECI", "TRAVIS", "JENKINS_URL", "CODEBUILD_BUILD_ID")
CI += ("BUILDKITE", "TEAMCITY_VERSION", "ORT_RUNNING_UNIT_TESTS")
PYTHON = "import cuantiza, sys; import onnxruntime; onnxruntime.InferenceSession(sys.argv[1]); sys.stdin.read()"
NODE = """import "./runtimes/common.mjs";
const { default: ort } = await import("onnxruntime-node");
await ort.InferenceSession.create(process.argv[1]);
await new Promise((end) => process.stdin.on("end", end).resume());"""
HELD = {"python": (sys.executable, "-c", PYTHON), "node": ("node", "--input-type=module", "-e", NODE)}
# The tracer refuses every socket to a program, so that nothing leaves the machine.
TRACER = ("strace", "-f", "-e", "trace=socket", "-e", "inject=socket:error=EACCES", "-o")

needs_node = pytest.mark.skipif(
    not (shutil.which("node") and (ROOT / "js/node_modules/onnxruntime-node").is_dir()),
    reason="no node on PATH, or no js/node_modules; run `make js`",
)
needs_strace = pytest.mark.skipif(
    not shutil.which("strace") or subprocess.run(["strace", "-f", "-o", os.devnull, "true"]).returncode != 0,
    reason="no strace, or not permitted to trace",
)


@pytest.fixture
def job(es_mini_fp32: Artifact, tmp_path: Path) -> Path:
    """A job for the programs of the matrix of runtimes, and for the driver of the emulated processors."""
    fields = {"folder": str(es_mini_fp32.path), "target": "portable", "ids": [0, 5, 6, 7], "prefill": 2, "pad": 1}
    fields |= {"start": 0, "prompt": "Me gusta", "generate": 2, "threads": 1, "output": str(tmp_path)}
    fields |= {"windows": str(tmp_path / "windows.npy"), "cached": 1, "runs": [], "probe": ""}
    (tmp_path / "job.json").write_text(json.dumps(fields))
    return tmp_path / "job.json"


def surroundings(home: Path, allowed: bool) -> dict[str, str]:
    """The environment of a user with the empty home `home`, who has allowed telemetry, or said nothing about it."""
    home.mkdir(parents=True)
    kept = {name: value for name, value in os.environ.items() if name not in (*CI, SWITCH, "XDG_CACHE_HOME")}
    own = {"HOME": str(home), "CUANTIZA_CACHE": "off"}  # what cuantiza itself keeps there is not what is looked for
    return kept | own | ({SWITCH: "0"} if allowed else {})


def left_in(home: Path) -> list[str]:
    """The files that a program left in `home`."""
    return sorted(file.name for file in home.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(["python", "-m", "cuantiza", "generate", "--artifact", "FOLDER", "--tokens", "2"], id="command"),
        pytest.param(["python", "-m", "lab.matrix.python.ort", "JOB"], id="runtime"),
        pytest.param(["python", "-c", "import lab.bench.ours"], id="imports-onnxruntime-first"),
        pytest.param(["python", "lab/matrix/emulation/driver.py", "missing.json"], id="without-cuantiza"),
        pytest.param(["node", "js/runtimes/node.mjs", "JOB"], marks=needs_node, id="node"),
        pytest.param(["node", "js/runtimes/transformers.mjs", "JOB"], marks=needs_node, id="transformers.js"),
    ],
)
def test_a_program_of_ours_leaves_no_device_id(
    program: list[str], job: Path, es_mini_fp32: Artifact, tmp_path: Path
) -> None:
    places = {"python": sys.executable, "FOLDER": str(es_mini_fp32.path), "JOB": str(job)}
    command = [places.get(word, word) for word in program]
    always_off = "transformers.mjs" in command[1]  # transformers.js switches it off, whatever the user says
    for allowed in (False, True):
        home = tmp_path / f"home-{allowed}"
        done = subprocess.run(
            command, cwd=ROOT, env=surroundings(home, allowed), capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        assert done.returncode == ("missing.json" in command), done.stderr
        assert left_in(home) == (["deviceid", "onnxruntime.db"] if allowed and not always_off else [])


@pytest.mark.parametrize("allowed", [False, True])
def test_what_a_process_of_ours_starts_leaves_none_either(allowed: bool, tmp_path: Path) -> None:
    """Another interpreter, which never imports cuantiza, as optimum's; and a child process for our own functions."""
    code = (
        "import sys\n"
        "from importlib import import_module\n"
        "from cuantiza.core.machine import child, process\n"
        "if __name__ == '__main__':\n"
        "    child.run([sys.executable, '-I', '-c', 'import onnxruntime'])\n"
        "    process.isolated(exec, 'import onnxruntime')\n"
    )
    (tmp_path / "script.py").write_text(code)
    home = tmp_path / "home"
    environment = surroundings(home, allowed) | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=environment, check=True)
    assert bool(left_in(home)) is allowed


@needs_strace
def test_no_name_is_asked_for(es_mini_fp32: Artifact, tmp_path: Path) -> None:
    """Telemetry asks for its collector's address some ten seconds after the start, if it is allowed."""
    runs = {(name, allowed): tmp_path / f"{name}-{allowed}" for name in ("python", "node") for allowed in (False, True)}
    if not (shutil.which("node") and (ROOT / "js/node_modules/onnxruntime-node").is_dir()):
        runs = {run: log for run, log in runs.items() if run[0] != "node"}
    with ExitStack() as stack:
        for (name, allowed), log in runs.items():
            process = subprocess.Popen(
                [*TRACER, str(log), *HELD[name], str(es_mini_fp32.path / "model.onnx")],
                cwd=ROOT / "js" if name == "node" else ROOT,
                env=surroundings(tmp_path / f"home-{name}-{allowed}", allowed),
                stdin=subprocess.PIPE,
            )
            stack.enter_context(process)  # leaving it closes standard input, which ends the program
        limit = time.monotonic() + 60
        while not all(asked(log) for (_, allowed), log in runs.items() if allowed):
            assert time.monotonic() < limit, "telemetry that was allowed asked for nothing"
            time.sleep(0.2)
    for (name, allowed), log in runs.items():
        assert asked(log) is allowed, log.read_text()
        assert bool(left_in(tmp_path / f"home-{name}-{allowed}")) is allowed


@needs_strace
@pytest.mark.skipif(not OPENVINO.exists(), reason="no environment with OpenVINO; run `make runtimes-env`")
def test_openvino_sends_no_event_either(tmp_path: Path) -> None:
    """It does so at its import, unless lab/ is imported first."""
    for code, sends in (("import openvino", True), ("import lab, openvino", False)):
        log, home = tmp_path / f"log-{sends}", tmp_path / f"home-{sends}"
        command = [*TRACER, str(log), OPENVINO, "-c", code]
        subprocess.run(command, cwd=ROOT, env=surroundings(home, allowed=False), check=True)
        assert asked(log) is sends and bool(left_in(home)) is sends


def asked(log: Path) -> bool:
    """Whether a traced program wanted a socket of the Internet."""
    return log.exists() and "AF_INET" in log.read_text()
