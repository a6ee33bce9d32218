"""The runtimes: the program of each, the environment that it needs, and how a job is run in it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from cuantiza.core.machine import child
from lab import ROOT

# The slowest takes a minute on an idle machine; a busy one may take much longer.
LIMIT_SECONDS = 900.0


@dataclass(frozen=True)
class Program:
    """A runtime: the command that takes a job (lab/matrix/python/job.py, js/runtimes/common.mjs).

    `needs` are files of its environment; where they are missing, `install` says how to make them.
    """

    name: str
    title: str
    command: tuple[str, ...]
    needs: tuple[Path, ...] = ()
    install: str | None = None

    def missing(self) -> str | None:
        """Why it cannot run here, and what installs it; None if it can run."""
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
    """The result of `job`, whose `output` folder exists. Raises child.Failed, also after `limit` seconds."""
    output = Path(job["output"])
    path = output / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    alone = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(job["threads"])}
    child.run([*program.command, path], timeout=limit, cwd=ROOT, environment=alone)
    return json.loads((output / "result.json").read_text(encoding="utf-8"))


def chromium() -> str | None:
    """The path of the browser that js/browser.mjs uses; None if there is none."""
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
