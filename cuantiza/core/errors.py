"""UserError, for everything that a user can mend, and `run`, the one place that prints it.

Stage packages import this module before all others, so it imports nothing that takes time to load.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import FrameType
from typing import NoReturn

# How a user mends what the operating system refuses, by error number.
_DISK_FULL = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space")
_FORBIDDEN = dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "check its permissions")
_NO_SUCH_PLACE = dict.fromkeys(
    (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP), "choose another path"
)
_TOO_LARGE = {errno.EFBIG: "choose a place that takes files of that size (`ulimit -f`, another file system)"}
_BROKEN_DISK = {errno.EIO: "check the disk"}
MENDS = _DISK_FULL | _FORBIDDEN | _NO_SUCH_PLACE | _TOO_LARGE | _BROKEN_DISK
_OURS = ("cuantiza", "export", "quantize", "eval", "lab")  # packages that `python -m` runs
_STOPS = {signal.SIGINT, signal.SIGTERM}
_IGNORED = {number for number in _STOPS if signal.getsignal(number) is signal.SIG_IGN}
_came: list[int] = []  # the signals that `_stop` was called for


# Which extra of the distribution brings a module that cuantiza runs without.
EXTRAS = {
    **dict.fromkeys(("torch", "transformers", "onnxscript", "safetensors", "huggingface_hub", "httpx2"), "export"),
    **dict.fromkeys(("datasets", "pyarrow"), "corpora"),
    "matplotlib": "plots",
    "ray": "sweep",
}


# With this variable of the environment set, what went wrong in a child process is also shown as a traceback.
TRACEBACK = "CUANTIZA_TRACEBACK"


class UserError(Exception):
    """Bad input. The message is one line: the file or option, what is wrong with it, and how to mend it."""


@contextmanager
def naming(place: object, given: object) -> Iterator[None]:
    """Let a UserError of the block name `given`, as the user did, where it names `place`: a cache, a temporary folder."""
    try:
        yield
    except UserError as error:
        error.args = (str(error).replace(str(place), str(given).rstrip("/")),)
        raise


@contextmanager
def taken_for_hub_id(label: str) -> Iterator[None]:
    """Raise UserError where the block lacks a package for the hub, since what `label` names may be a mistyped path."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (install := _install(error)) is None:
            raise
        raise UserError(
            f"{label}: is neither a file nor a folder here; if it is an id of the hub, that takes {error.name}, which is not "
            f"installed: {install}"
        ) from None


def _install(error: ModuleNotFoundError) -> str | None:
    """How to install what is missing; None if it is no module of an extra."""
    extra = EXTRAS.get((error.name or "").split(".")[0])
    return extra and f"`pip install 'cuantiza[{extra}]'` brings it"


def unexpected(error: BaseException) -> str:
    """One line about an exception that nobody has foreseen: its type and what it says."""
    said = _one_line(error)
    if isinstance(error, MemoryError):
        return (
            f"there is not enough memory{f' ({said})' if said else ''}; close other programs, or take a smaller model"
        )
    return (
        f"{type(error).__name__}: {said}; {TRACEBACK}=1 shows where"
        if said
        else f"{type(error).__name__}; {TRACEBACK}=1 shows where"
    )


def end_quietly_while_loading() -> None:
    """Let Ctrl-C end `python -m STAGE` without a traceback while the stage's modules load; then `run` takes over.

    Our packages call this before they import anything else.
    """
    # Python sets argv[0] to "-m" only while it looks for the module to run. A program that imports the package keeps
    # its own handler, also where that program is run by -m.
    if sys.argv[0] != "-m" or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    module = next((after for word, after in pairwise(sys.orig_argv) if word == "-m"), "")
    if module.split(".")[0] in _OURS:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def is_told(error: Exception) -> bool:
    """Whether `run` tells `error` in one line that says how to mend it, with status 2."""
    if isinstance(error, ModuleNotFoundError):
        return _install(error) is not None
    return error.errno in MENDS if isinstance(error, OSError) else isinstance(error, UserError | MemoryError)


def drop_output() -> None:
    """Let what is printed go nowhere, as the reader (`| head`) is gone: the interpreter's own flush at exit would fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(main: Callable[[], int]) -> None:
    """Run a stage's `main` and exit with its status. A UserError is one line and status 2, never a traceback.

    A full disk and a path that cannot be read or written are the user's to mend, too (status 2). SIGINT exits with 130
    and SIGTERM with 143, both through `finally`, so that temporary folders are removed; a second signal does not
    interrupt that.
    """
    _came.clear()
    _set_handlers(_stop)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no ñ shows ?, in place of a traceback
    try:
        status = main()
    except UserError as error:
        status = _fail(_one_line(error))
    except ModuleNotFoundError as error:
        if (install := _install(error)) is None:
            raise
        status = _fail(f"{error.name}: is not installed; {install}")
    except MemoryError as error:
        status = _fail(unexpected(error))
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BrokenPipeError:
        drop_output()
        status = 1
    except OSError as error:
        if error.errno not in MENDS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        status = _fail(
            f"{where}{(error.strerror or str(error)).lower()}; {MENDS[error.errno]} and run the command again (nothing was published)"
        )
    finally:
        # Nothing is left to clean up while the interpreter ends, which joins threads first. An exception from a signal
        # handler would be a traceback there.
        _set_handlers(signal.SIG_DFL)
    sys.exit(status)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def raise_again() -> None:
    """Raise what a signal raised already, where a library swallowed it: nothing is begun after a signal."""
    if _came:
        _stop(_came[0], None)


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    _set_handlers(signal.SIG_IGN)
    _came.append(number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def _set_handlers(handler: signal.Handlers | Callable[[int, FrameType | None], NoReturn]) -> None:
    """Set `handler` for SIGINT and SIGTERM. A signal that the parent shell ignores (background jobs) stays ignored."""
    for number in _STOPS - _IGNORED:
        signal.signal(number, handler)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
