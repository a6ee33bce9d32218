"""One kind of error for everything a user can mend, and the one place that prints it."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable

# How a user mends what the operating system refuses, by error number.
_DISK_FULL = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space")
_FORBIDDEN = dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "check its permissions")
_NO_SUCH_PLACE = dict.fromkeys(
    (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP), "choose another path"
)
MENDS = _DISK_FULL | _FORBIDDEN | _NO_SUCH_PLACE


class UserError(Exception):
    """Bad input: the message is one line that names the file or option, what is wrong, how to mend it."""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def run(main: Callable[[], int]) -> None:
    """Run a stage's `main` and exit: bad input is one line and status 2, never a traceback.

    A full disk and a path that cannot be read or written are the user's to mend as well (status 2).
    SIGINT exits 130 and SIGTERM 143, both through `finally`, so that temporary folders are removed.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        status = main()
    except UserError as error:
        status = _fail(_one_line(error))
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
    sys.exit(status)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
