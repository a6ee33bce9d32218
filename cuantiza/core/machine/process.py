"""Run our functions in a process of their own: it returns its memory to the system, and its death is one clear line.

For programs in other interpreters there is cuantiza/core/machine/child.py.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

from cuantiza.core.errors import EXTRAS, MENDS, TRACEBACK, UserError, raise_again, unexpected
from cuantiza.core.machine.progress import working
from cuantiza.core.machine.shared import Message, pack, receive, send

_context = multiprocessing.get_context("spawn")
_FD = 2  # standard error, as libraries in C++ and Rust write to it
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_KEPT_BYTES = 2**16  # how much of it is looked through for its last line


class ChildError(UserError):
    """What went wrong in the child process `label`."""

    def __init__(self, message: str, label: str) -> None:
        super().__init__(message)
        self.label = label

    @property
    def reason(self) -> str:
        """The message without the label."""
        return str(self).removeprefix(f"{self.label}: ")


class Remote:
    """An object in a child process, made there by `factory(*args)`; `call` runs its methods.

    `label` names in messages what it does, and may be changed between two calls.
    The child ends with the `with` block, and also when this process dies. Whatever goes wrong in it is one line here:
    raises ChildError where the child raises an exception, with its type and its message, or where it dies (killed by
    the kernel when memory runs out, or by a library), with the last line that it wrote. A full disk and a package that
    is not installed are raised as they are, since cuantiza.core.errors says how to mend them.
    """

    def __init__(self, factory: Callable[..., Any], *args: Any, label: str | None = None) -> None:
        self.label = label or f"{factory.__name__}({', '.join(map(str, args))})"
        self._here, there = _context.Pipe()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the child
        saying = Connection(os.dup(self._said.fileno()))  # which, unlike a number, is handed to a new process
        # Pickled here and read in `_serve`, where an import that fails is reported like any other exception.
        what = pickle.dumps((factory, args))
        self._process = _context.Process(target=_serve, args=(there, saying, what), daemon=True)
        try:
            with contextlib.nullcontext() if _in_main(factory, *args) else _hidden_main():
                _start(self._process)
            there.close()
            saying.close()
            self.result()
        except BaseException:
            if self._process.pid is not None:
                self.__exit__()
            raise

    def call(self, method: str, *args: Any) -> Any:
        """Run the object's `method(*args)` and return its result."""
        self.start(method, *args)
        return self.result()

    def start(self, method: str, *args: Any) -> None:
        """Begin `method(*args)` and return at once; `result` waits for it."""
        try:
            self._here.send((method, args))
        except (BrokenPipeError, ConnectionResetError):
            self._died()

    def result(self) -> Any:
        """Wait for the method that was started last, and return its result."""
        try:
            value, error = receive(self._here)
        except (EOFError, ConnectionResetError):
            self._died()
        if isinstance(error, UserError):
            raise ChildError(str(error), self.label) from error
        if isinstance(error, str):
            raise ChildError(f"{self.label}: {error}", self.label)
        if error is not None:
            raise error
        return value

    def _died(self) -> NoReturn:
        self._process.join()
        code = self._process.exitcode
        why = ": most often a lack of memory" if code == -signal.SIGKILL else self._last_line()
        raise ChildError(f"{self.label}: its process died with exit code {code}{why}", self.label) from None

    def _last_line(self) -> str:
        """What the child's libraries wrote last, such as the message of an exception in C++ that nobody caught."""
        self._said.seek(max(0, self._said.seek(0, os.SEEK_END) - _KEPT_BYTES))
        said = self._said.read().decode(errors="replace")
        lines = [line for line in map(str.strip, _COLOUR.sub("", said).splitlines()) if line]
        return f": {lines[-1]}" if lines else ""

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        # Not SIGTERM, which a child ignores if it was started while this process did: a library may have swallowed the
        # exception of a Ctrl-C, after which signals are ignored.
        self._process.kill()
        self._process.join()
        self._here.close()
        self._said.close()


def _in_main(*values: object) -> bool:
    """Whether one of `values` is a function or class of the program that runs, which a child has to import to call it."""
    return any(getattr(value, "__module__", None) == "__main__" for value in values)


@contextlib.contextmanager
def _hidden_main() -> Iterator[None]:
    """Keep a child from importing the main module of this process again.

    That import would run a user's script a second time, unless all of it stood under `if __name__ == "__main__":`.
    """
    module = sys.modules["__main__"]
    hidden: dict[str, Any] = {name: vars(module)[name] for name in ("__spec__", "__file__") if name in vars(module)}
    vars(module).pop("__file__", None)
    module.__spec__ = None
    try:
        yield
    finally:
        vars(module).update(hidden)


def _start(process: BaseProcess) -> None:
    """Start `process` with SIGINT blocked in it; a signal to this process is answered when the child has started.

    Otherwise a Ctrl-C while the child imports its modules, before `_serve`, would print the child's own traceback. So
    would one that kept this process from telling the child what to do: the child would find nothing to read.
    """
    raise_again()
    if not hasattr(signal, "pthread_sigmask"):
        process.start()
        return
    resource_tracker.ensure_running()  # otherwise the first start of a child would start it, and it unblocks SIGINT
    with _answered_later():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _answered_later() -> Iterator[None]:
    """Call the handlers of signals that come in the block after it.

    Blocking a signal in this thread would not do: another thread takes it, and Python calls its handler in the main
    thread all the same.
    """
    came: list[tuple[int, Any]] = []
    handlers: dict[int, Callable[[int, Any], Any]] = {}
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        handlers = {number: handler for number, handler in found.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number, frame in came:
        handlers[number](number, frame)


class _Call:
    """A function as an object with one method, `run`, which is shown to be at work while it takes long."""

    def __init__(self, function: Callable[..., Any], label: str) -> None:
        self._function, self._label = function, label

    def run(self, *args: Any) -> Any:
        with working(self._label):
            return self._function(*args)


def isolated(function: Callable[..., Any], *args: Any, label: str | None = None) -> Any:
    """Run `function(*args)` in a process of its own and return its result.

    `label` says in messages what it does (default: the function's name). Raises UserError as `Remote` does.
    """
    label = label or function.__name__.strip("_")
    with Remote(_Call, function, label, label=label) as remote:
        return remote.call("run", *args)


def _end_with_parent() -> None:
    """Exit when the parent is gone.

    A parent that is killed with SIGKILL cannot clean up, so each child watches it and exits by itself.
    """
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


def _serve(there: Connection, saying: Connection, what: bytes) -> None:
    # A Ctrl-C reaches the whole process group. The parent handles it, and ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if not os.environ.get(TRACEBACK):
        _divert(saying)
    served: list[Any] = []

    def make() -> None:
        factory, args = pickle.loads(what)
        served.append(factory(*args))

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        send(there, _answer(make))
        while served:
            method, args = there.recv()
            send(there, _answer(lambda: getattr(served[0], method)(*args)))  # noqa: B023 - called at once


def _answer(work: Callable[[], Any]) -> Message:
    """What `Remote.result` reads: the value of `work()` and None; or None and what went wrong."""
    try:
        return pack((work(), None))
    except BaseException as error:  # a panic of a library in Rust is not even an Exception
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        # Any other exception goes as a line, since not every class of exception can be made again in the parent.
        return pack((None, error if _mendable(error) else unexpected(error)))


def _mendable(error: BaseException) -> bool:
    """Whether cuantiza.core.errors has a line of its own for `error`."""
    if isinstance(error, ModuleNotFoundError):
        return (error.name or "").split(".")[0] in EXTRAS
    return isinstance(error, UserError) or (isinstance(error, OSError) and error.errno in MENDS)


def _divert(saying: Connection) -> None:
    """Lead what libraries write to standard error into `saying`; Python's own output stays where it was.

    ONNX Runtime, PyTorch and the tokenizers' Rust print there what their exceptions say too.
    """
    sys.stderr.flush()
    kept = os.dup(_FD)
    os.dup2(saying.fileno(), _FD)
    saying.close()
    sys.stderr = os.fdopen(kept, "w", buffering=1, encoding=sys.stderr.encoding, errors=sys.stderr.errors)
