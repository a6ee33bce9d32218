"""One kind of error for everything a user can mend, and the one place that prints it."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
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
_STOPS = {signal.SIGINT, signal.SIGTERM}
_IGNORED = {number for number in _STOPS if signal.getsignal(number) is signal.SIG_IGN}


# Which extra of the distribution brings a module that cuantiza runs without.
EXTRAS = {
    **dict.fromkeys(("torch", "transformers", "onnxscript", "safetensors", "huggingface_hub", "httpx2"), "export"),
    **dict.fromkeys(("datasets", "pyarrow"), "corpora"),
    "matplotlib": "plots",
    "ray": "sweep",
}


class UserError(Exception):
    """Bad input: the message is one line that names the file or option, what is wrong, how to mend it."""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def run(main: Callable[[], int]) -> None:
    """Run a stage's `main` and exit: bad input is one line and status 2, never a traceback.

    A full disk and a path that cannot be read or written are the user's to mend as well (status 2).
    SIGINT exits 130 and SIGTERM 143, both through `finally`, so that temporary folders are removed; a second one
    does not break that off.
    """
    _set_handlers(_stop)
    try:
        status = main()
    except UserError as error:
        status = _fail(_one_line(error))
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        status = _fail(f"{error.name}: is not installed; `pip install 'cuantiza[{extra}]'` brings it")
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader (`| head`) is gone: silence the interpreter's own flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except OSError as error:
        if error.errno not in MENDS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        status = _fail(
            f"{where}{error.strerror.lower()}; {MENDS[error.errno]} and run the command again (nothing was published)"
        )
    finally:
        # While the interpreter ends (it joins threads first) nothing is left to unwind, and an exception would be a
        # traceback.
        _set_handlers(signal.SIG_DFL)
    sys.exit(status)


def _stop(number: int, _frame: object) -> NoReturn:
    _set_handlers(signal.SIG_IGN)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def _set_handlers(handler: signal.Handlers | Callable) -> None:
    """Of both signals, but where a shell has one ignored, as in the background of a script."""
    for number in _STOPS - _IGNORED:
        signal.signal(number, handler)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
