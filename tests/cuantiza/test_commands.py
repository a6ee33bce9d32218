"""`cuantiza COMMAND`: every command explains itself, bad input is one line, and nothing heavy is imported for nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import cuantiza
from cuantiza.__main__ import COMMANDS
from cuantiza.core.cli import Parser, add_folder
from cuantiza.core.errors import EXTRAS, UserError

from helpers import ROOT, assert_user_error, stage

HEAVY = {"torch", "transformers", "onnxscript", "datasets", "matplotlib", "ray"}


def test_the_overview_names_every_command() -> None:
    for arguments in ((), ("--help",), ("-h",)):
        result = stage("cuantiza", *arguments)
        assert result.status == 0 and result.stdout.startswith("example: cuantiza export")
        assert all(f"  {name} " in result.stdout for name in COMMANDS)
    assert stage("cuantiza", "--version").stdout == f"cuantiza {cuantiza.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_begins_with_an_example_and_needs_nothing_heavy(name: str) -> None:
    """The process also ends well where every optional package is missing."""
    code = (
        "import sys; from importlib.abc import MetaPathFinder\n"
        "class Missing(MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name in {sorted(HEAVY)}: raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        f"sys.argv = ['cuantiza', {name!r}, '--help']\n"
        "from cuantiza.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"example: cuantiza {name}") and f"usage: cuantiza {name}" in done.stdout


def test_bad_words_are_one_line() -> None:
    assert_user_error(stage("cuantiza", "exprot"), "cuantiza exprot", "export, quantize")
    assert_user_error(stage("cuantiza", "--output", "x", "sensitivity"), "--output", "no such command")
    assert_user_error(stage("cuantiza", "eval", "--tokens", "many"), "--tokens", "many", "cuantiza eval --help")
    assert_user_error(stage("cuantiza", "eval", "--frobnicate"), "--frobnicate", "cuantiza eval --help")
    assert_user_error(stage("export", "--opset"), "--opset", "cuantiza export --help")


def test_an_option_of_several_words_may_be_given_again() -> None:
    parser = Parser("x", None, "x")
    parser.add_argument("--onnx", nargs="*", default=["fp32"])
    assert parser.parse_args([]).onnx == ["fp32"]
    assert parser.parse_args(["--onnx", "a", "b"]).onnx == ["a", "b"]
    assert parser.parse_args(["--onnx", "a", "b", "--onnx", "c"]).onnx == ["a", "b", "c"]


@pytest.mark.parametrize("option", ["--output=", "--output= "])
def test_an_empty_folder_is_not_the_current_one(option: str) -> None:
    parser = Parser("x", None, "x")
    add_folder(parser, "--output", Path("artifacts"), "folder")
    assert parser.parse_args([]).output == Path("artifacts")
    with pytest.raises(UserError, match="--output: is empty"):
        parser.parse_args([option])


@pytest.mark.parametrize("module, extra", [("torch", "export"), ("datasets", "corpora"), ("matplotlib", "plots")])
def test_a_missing_extra_is_one_line_that_names_it(module: str, extra: str) -> None:
    code = f"from cuantiza.core.errors import run\ndef main():\n    raise ModuleNotFoundError(name='{module}.nn')\nrun(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {module}") and f"pip install 'cuantiza[{extra}]'" in done.stderr


def test_every_extra_is_declared() -> None:
    import tomllib

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for module, extra in EXTRAS.items():
        assert any(line.startswith(module.replace("_", "-")) for line in declared[extra]), (module, extra)


def test_importing_cuantiza_is_light() -> None:
    code = "import sys, cuantiza; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert "cuantiza" in loaded and not (HEAVY | {"numpy", "onnxruntime"}) & set(loaded)


def test_what_python_offers_is_there() -> None:
    for name in cuantiza.__all__:
        assert callable(getattr(cuantiza, name)), name
    with pytest.raises(AttributeError, match="nonsense"):
        cuantiza.nonsense  # noqa: B018
    with pytest.raises(UserError, match="nowhere"):
        cuantiza.export("nowhere/at/all")


def test_the_defaults_are_found_from_any_folder(tmp_path: Path) -> None:
    """The embedded model and text, by the names that they have in the repository; nothing else is looked for elsewhere."""
    code = (
        "from cuantiza.core.inputs.defaults import CORPUS, MODEL, place\n"
        "from cuantiza.core.inputs.corpus import Source, load_splits\n"
        "assert (place(MODEL) / 'config.json').is_file() and len(load_splits(Source())[1].documents) > 40\n"
        "assert not place('models').exists()"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


INTERRUPTED = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["WHILE"]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
"""


@pytest.mark.parametrize(
    ("command", "while_loading"),
    [
        (("cuantiza.generate",), "cuantiza.core.cli"),
        (("cuantiza.generate",), "numpy"),
        (("cuantiza.generate",), "onnxruntime"),
        (("cuantiza", "generate"), "numpy"),
        (("cuantiza.demo",), "cuantiza.demo.site"),
        (("cuantiza.bundle",), "cuantiza.eval.report.read"),
        (("export",), "cuantiza.core.cli"),
        (("eval",), "cuantiza.eval.stage"),
    ],
)
def test_ctrl_c_while_a_command_loads(
    tmp_path: Path, command: tuple[str, ...], while_loading: str, es_mini_fp32
) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED)
    options = ("--artifact", es_mini_fp32.path) if "generate" in command[-1] else ()
    done = stage(*command, *options, env={"PYTHONPATH": str(tmp_path), "WHILE": while_loading})
    assert done.status in (130, -2) and done.stderr == "", done.stderr


def test_a_program_that_imports_cuantiza_keeps_its_own_ctrl_c(tmp_path: Path) -> None:
    """Also one that `python -m` runs, which imports it while Python looks for the module."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/__init__.py").write_text("import cuantiza\n")
    (tmp_path / "theirs/__main__.py").write_text(
        "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)\n"
    )
    done = stage("theirs", env={"PYTHONPATH": str(tmp_path)})
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("value", ["-Hola", "--hola", "-5", "-h,i", "- "])
def test_a_value_may_begin_with_a_dash(value: str) -> None:
    from cuantiza.core.cli import Parser

    parser = Parser("generate", "", "")
    parser.add_argument("--prompt")
    parser.add_argument("--tokens", type=int)
    for words in (["--prompt", value, "--tokens", "-3"], [f"--prompt={value}", "--tokens=-3"]):
        args = parser.parse_args(words)
        assert (args.prompt, args.tokens) == (value, -3)
    for words in (["--prompt", "--tokens", "3"], ["--prompt", "--tok=3"], ["--prompt", "-h"], ["--prompt"]):
        with pytest.raises(UserError, match="--prompt: expected one argument"):
            parser.parse_args(words)
