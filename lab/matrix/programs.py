"""The runtimes: which program each is, in whose environment, and how one is run in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lab import ROOT

# Generous: the slowest takes a minute on an idle machine, and a machine may be busy.
LIMIT_SECONDS = 900.0


class Failed(Exception):
    """Why a runtime gave no result: the last line of what it said."""


@dataclass(frozen=True)
class Program:
    """A runtime as the command that is given a job (lab/matrix/python/job.py, js/runtimes/common.mjs).

    `needs` are files that are there where its environment is, which `install` makes.
    """

    name: str
    title: str
    command: tuple[str, ...]
    needs: tuple[Path, ...] = ()
    install: str | None = None

    def missing(self) -> str | None:
        """Why it cannot be run here and what installs it; None where it can."""
        if not shutil.which(self.command[0]):
            what = "no node on PATH" if self.command[0] == "node" else f"no {_relative(Path(self.command[0]))}"
        elif absent := next((path for path in self.needs if not path.exists()), None):
            what = f"no {_relative(absent)}"
        elif self.name == "web" and chromium() is None:
            return "no Chromium: install one, or name it by CHROME_PATH"
        else:
            return None
        return f"{what}: {self.install}"


def programs() -> dict[str, Program]:
    """All runtimes by name, in the order of the page's columns."""
    optimum = os.environ.get("OPTIMUM_PYTHON", ROOT / ".venv-optimum/bin/python")
    others = os.environ.get("RUNTIMES_PYTHON", ROOT / ".venv-runtimes/bin/python")
    found = [
        Program("ort", "ONNX Runtime", _python(sys.executable, "ort")),
        Program("optimum", "optimum", _python(optimum, "optimum"), install="run `make optimum`"),
        Program("genai", "ORT GenAI", _python(others, "genai"), install="run `make runtimes`"),
        Program("openvino", "OpenVINO, f32", (*_python(others, "openvino"), "f32"), install="run `make runtimes`"),
        Program(
            "openvino-default", "OpenVINO", (*_python(others, "openvino"), "default"), install="run `make runtimes`"
        ),
        Program("reference", "ONNX reference", _python(sys.executable, "reference")),
        _javascript("node", "ORT Node", "onnxruntime-node"),
        _javascript("web", "ORT Web", "onnxruntime-web"),
        _javascript("transformers", "transformers.js", "@huggingface/transformers"),
    ]
    return {program.name: program for program in found}


def run(program: Program, job: dict, limit: float = LIMIT_SECONDS) -> dict:
    """The result of `job`, whose `output` folder exists. Raises Failed where there is none after `limit` seconds."""
    output = Path(job["output"])
    path = output / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    process = subprocess.Popen(
        [*program.command, str(path)],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(job["threads"])},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # so that it can be killed with all that it started
    )
    try:
        _, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        raise Failed(f"no result after {limit:.0f} s") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode < 0:
        raise Failed(f"died of {signal.Signals(-process.returncode).name}")
    if process.returncode:
        lines = [line.strip() for line in errors.splitlines() if line.strip()]
        raise Failed(lines[-1] if lines else f"ended with status {process.returncode}")
    return json.loads((output / "result.json").read_text(encoding="utf-8"))


def chromium() -> str | None:
    """The browser that js/browser.mjs takes."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("CHROME_PATH") or next(filter(None, map(shutil.which, names)), None)


def _python(interpreter: str | Path, name: str) -> tuple[str, ...]:
    return (str(interpreter), "-m", f"lab.matrix.python.{name}")


def _javascript(name: str, title: str, package: str) -> Program:
    needs = (ROOT / "js/node_modules" / package,)
    return Program(
        name, title, ("node", str(ROOT / f"js/runtimes/{name}.mjs")), needs, "install Node.js 20, run `make js`"
    )


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
