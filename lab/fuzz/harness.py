"""Reads one broken file as a stage does, under limits of time and memory, and decides whether that is a finding."""

from __future__ import annotations

import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cuantiza.core.errors import MENDS, UserError
from lab.fuzz.binary import CANARY
from lab.fuzz.formats import Format

SECONDS, BYTES = 10, 2 * 10**9
# Python raises an audit event before each of these actions (docs.python.org/3/library/audit_events.html). No reader may
# do any of them.
_FORBIDDEN = {
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen"),
    *("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo"),
    *(
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.mkdir",
        "os.symlink",
        "os.link",
        "os.truncate",
        "os.chmod",
        "shutil.rmtree",
    ),
}


class Finding(AssertionError):
    """A reader neither accepted the file nor refused it with one line."""


class _Watch:
    """Collects the forbidden audit events of the interpreter while a case is read.

    An audit hook cannot be removed, so one instance stays installed until the process ends.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        if self.folder is None:
            return
        if event in _FORBIDDEN:
            self.seen.append(f"{event} {arguments!r:.200}")
        elif event == "open" and isinstance(arguments[0], str):
            path, mode, flags = arguments
            writes = any(letter in (mode or "") for letter in "wax+") or (isinstance(flags, int) and flags & 3)
            # Libraries open files of their own, which is fine. The names passwd and x come only from broken files.
            outside = Path(path).name in ("passwd", "x") and self.folder not in Path(path).resolve().parents
            if (writes and path != "/dev/null") or outside:
                self.seen.append(f"opened {path!r} ({mode or flags})")


_watch: _Watch | None = None


@contextmanager
def watching(folder: Path) -> Iterator[list[str]]:
    """Yield a list that fills with the forbidden actions, and with files opened for writing or outside of `folder`."""
    global _watch
    _watch = _watch or _Watch()
    _watch.folder, _watch.seen = folder.absolute(), []
    try:
        yield _watch.seen
    finally:
        _watch.folder = None


def limit_memory() -> None:
    """Allow this process BYTES more memory than it has now; an allocation above that raises MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (pages + BYTES, resource.RLIM_INFINITY))


def read_case(form: Format, folder: Path, content: bytes) -> bool:
    """Return whether `form`'s reader accepts `content`, written to `folder`.

    Raises Finding if the reader neither accepts nor refuses it with a UserError, or breaks a limit.
    """
    target = folder / form.file
    target.write_bytes(content)
    canaries = [folder / CANARY, Path(CANARY)]
    start = time.monotonic()

    def late(*_: object) -> None:
        raise Finding(f"{form.name}: not read in {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    accepted = True
    with watching(folder) as seen:
        try:
            form.read(folder)
        except Finding:
            raise
        except UserError as error:
            accepted = False
            if len(" ".join(str(error).split())) < 10:
                raise Finding(f"{form.name}: refused with {str(error)!r}, too short to say how to mend it") from None
        except OSError as error:
            accepted = False
            if error.errno not in MENDS:
                raise Finding(f"{form.name}: {type(error).__name__}: {error}") from error
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            raise Finding(f"{form.name}: {type(error).__name__}: {error!s:.300}") from error
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    if seen:
        raise Finding(f"{form.name}: {seen[0]}")
    if any(canary.exists() for canary in canaries):
        raise Finding(f"{form.name}: ran code of the file")
    if time.monotonic() - start > SECONDS:
        raise Finding(f"{form.name}: took {time.monotonic() - start:.1f} s")
    return accepted
