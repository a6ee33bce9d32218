"""`cuantiza COMMAND ...`: every command by its name. A command's module is imported when it is called."""

from __future__ import annotations

import sys
from importlib import import_module

from cuantiza import __version__
from cuantiza.core.errors import UserError, run

# A command's name: the module and function that run it, and what it does.
COMMANDS = {
    "inspect": ("cuantiza.export.inspect:main", "say what a checkpoint or an artifact is, without exporting"),
    "export": ("cuantiza.export.__main__:main", "export a checkpoint to ONNX"),
    "quantize": ("cuantiza.quantize.__main__:main", "quantize the exported model by one recipe or several"),
    "eval": ("cuantiza.eval.__main__:main", "measure perplexity, size and latency of artifacts"),
    "compare": ("cuantiza.eval.compare.cli:main", "tell whether artifacts or a report became worse"),
    "generate": ("cuantiza.generate:main", "continue a text with an artifact"),
    "bundle": ("cuantiza.bundle.__main__:main", "write a folder for the Hugging Face Hub"),
    "demo": ("cuantiza.demo.__main__:main", "serve a page that continues text in the browser"),
    "sweep": ("cuantiza.sweep.__main__:main", "measure a grid of models, recipes and corpora"),
    "recipes": ("cuantiza.quantize.inspect.commands:recipes", "list the recipes and what each costs"),
    "sensitivity": ("cuantiza.quantize.inspect.commands:sensitivity", "rank the linear layers by what each costs"),
    "histogram": ("cuantiza.quantize.inspect.commands:histogram", "show an activation and the ranges chosen for it"),
    "index": ("cuantiza.index:main", "fix which documents of a corpus calibrate and which test"),
}


def main() -> None:
    """Run the command that `sys.argv` names, and exit."""
    run(_dispatch)


def _dispatch() -> int:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"cuantiza {__version__}")
        return 0
    if name not in COMMANDS:
        raise UserError(f"cuantiza {name}: there is no such command; choose from {', '.join(COMMANDS)}")
    module, function = COMMANDS[name][0].split(":")
    status: int = getattr(import_module(module), function)(arguments)
    return status


def _help() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "example: cuantiza export && cuantiza quantize && cuantiza eval",
            "",
            "usage: cuantiza COMMAND [OPTIONS]",
            "",
            *(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()),
            "",
            "`cuantiza COMMAND --help` explains a command's options. `cuantiza --version` prints the version.",
        ]
    )


if __name__ == "__main__":
    main()
