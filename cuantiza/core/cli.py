"""The command line: a parser whose help begins with an example, and the options that several commands share."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.defaults import CORPUS, MODEL, SELF
from cuantiza.core.machine.hardware import check_threads, default_threads

if TYPE_CHECKING:  # what reads texts takes a while to load, and `generate` reads none
    from cuantiza.core.inputs.corpus import Source


class _Store(argparse.Action):
    """What argparse does without an action, but of `--onnx a.onnx --onnx b.onnx` it would keep the last alone."""

    def __call__(self, _parser: Any, namespace: argparse.Namespace, values: Any, _option: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        more = isinstance(values, list) and before is not self.default
        setattr(namespace, self.dest, [*before, *values] if more else values)


class Parser(argparse.ArgumentParser):
    """The parser of `cuantiza COMMAND`. Bad options raise UserError instead of printing the usage and exiting."""

    def __init__(self, command: str, description: str | None, example: str) -> None:
        super().__init__(prog=f"cuantiza {command}", description=description)
        self._example = example
        self.register("action", None, _Store)

    def format_help(self) -> str:
        return f"example: {self._example}\n\n{super().format_help()}"

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        return super().parse_known_args(self._joined(sys.argv[1:] if args is None else list(args)), namespace)

    def _joined(self, words: list[str]) -> list[str]:
        """`words` with `--prompt -Hola` as `--prompt=-Hola`: argparse takes the dash of a value for another option's.

        A value that is the name of an option stays by itself, as it is more likely that the value was forgotten.
        """
        joined: list[str] = []
        for word in words:
            before = self._option_string_actions.get(joined[-1]) if joined else None
            name = word.split("=")[0]
            if (
                before is not None
                and before.nargs is None
                and name.startswith("-")
                and name not in ("-", "--")
                and not any(option.startswith(name) for option in self._option_string_actions)
            ):
                joined[-1] += f"={word}"
            else:
                joined.append(word)
        return joined

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; see `{self.prog} --help`")


def add_model(parser: argparse._ActionsContainer) -> None:
    """Add `--model`, which names a checkpoint."""
    parser.add_argument(
        "--model", default=MODEL, help=f"folder of the checkpoint, or hub id with an optional @revision ({MODEL})"
    )


def add_folder(parser: argparse._ActionsContainer, option: str, default: Path, text: str) -> None:
    """Add `option`, which names a folder."""
    parser.add_argument(option, type=_folder, default=default, metavar="FOLDER", help=f"{text} (default {default})")


def _folder(text: str) -> Path:
    """`text` as a path. An empty one, such as of `OUT=`, would be the folder that the command runs in."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; name a folder, or . for this one")
    return Path(text)


def add_number(parser: argparse._ActionsContainer, option: str, default: int, text: str) -> None:
    """Add `option`, which takes a whole number; `check_numbers` holds its limit."""
    parser.add_argument(option, type=int, default=default, metavar="N", help=f"{text} (default {default})")


def add_threads(parser: argparse._ActionsContainer) -> None:
    """Add `--threads`, which `check_numbers` checks."""
    parser.add_argument(
        "--threads", type=int, default=default_threads(), metavar="N", help="threads (default: all processors)"
    )


def add_corpus(parser: argparse._ActionsContainer) -> None:
    """Add the options that name a corpus, which `source_of` reads."""
    from cuantiza.core.inputs.texts.files import SUFFIXES

    parser.add_argument(
        "--corpus",
        action=_Corpus,
        default=CORPUS,
        help=f"file or folder of {', '.join(SUFFIXES)} or other text, packed or not, or hub data set id ({CORPUS}); "
        f"{SELF}: the model writes what calibrates it",
    )
    add_reading(parser)


def add_reading(parser: argparse._ActionsContainer) -> None:
    """Add the options that say how a corpus is read, which `source_of` reads."""
    from cuantiza.core.inputs.texts.divide import BY

    parser.add_argument("--corpus-config", metavar="NAME", help="configuration of a hub data set")
    parser.add_argument("--corpus-split", default="train", metavar="NAME", help="split of a data set (train)")
    parser.add_argument("--corpus-column", default="text", metavar="NAME", help="column of JSON and of tables (text)")
    parser.add_argument(
        "--corpus-by",
        default=BY[0],
        choices=BY,
        help="what a document is: a file or what markers end (document), a line, or the lines after a title (article)",
    )
    parser.add_argument(
        "--corpus-join",
        nargs="?",
        type=int,
        const=1,
        default=0,
        choices=(0, 1),
        help="join all rows or files to one text, as papers do with WikiText, and score all of it",
    )


class _Corpus(argparse.Action):
    """Stores a corpus. One that is given again is another text, and what was said of the first does not hold for it.

    So `make quantize CORPUS=… CORPUS_SPLIT=test QUANTIZE="--corpus OTHER"` calibrates on OTHER, which may have no splits.
    """

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, _option: str | None = None
    ) -> None:
        if getattr(namespace, "corpus_is_given", False):
            for name in ("config", "split", "column", "by", "join"):
                setattr(namespace, f"corpus_{name}", parser.get_default(f"corpus_{name}"))
        namespace.corpus, namespace.corpus_is_given = values, True


def source_of(args: argparse.Namespace, corpus: str | None = None) -> Source:
    """The corpus that the options of `add_corpus` name; or `corpus`, read as those of `add_reading` say."""
    from cuantiza.core.inputs.corpus import Source

    fields = (
        args.corpus if corpus is None else corpus,
        args.corpus_config,
        args.corpus_split,
        args.corpus_column,
        args.corpus_by,
    )
    return Source(*fields, join=bool(args.corpus_join))


def check_numbers(args: argparse.Namespace, **least: int) -> None:
    """Raises UserError if an option is below its least value, or `--threads` is more than the machine can use."""
    if hasattr(args, "threads"):
        check_threads(args.threads)
    for name, smallest in least.items():
        value = getattr(args, name)
        if not smallest <= value <= 10**9:
            raise UserError(f"--{name.replace('_', '-')} {value}: give a number from {smallest} to 1,000,000,000")
