"""Run our functions in a process of their own: it returns its memory to the system, and its death is one clear line.

For programs in other interpreters there is cuantiza/core/machine/child.py.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

from cuantiza.core.errors import UserError
from cuantiza.core.machine.progress import working

_context = multiprocessing.get_context("spawn")


class Remote:
    """An object in a child process, made there by `factory(*args)`; `call` runs its methods.

    The child ends with the `with` block, and also when this process dies. Raises UserError if the child raises one, or
    if the child is killed (by the kernel, when memory runs out).
    """

    def __init__(self, factory: Callable[..., Any], *args: Any, label: str | None = None) -> None:
        self._label = label or f"{factory.__name__}({', '.join(map(str, args))})"
        self._here, there = _context.Pipe()
        self._process = _context.Process(target=_serve, args=(there, factory, args), daemon=True)
        try:
            with contextlib.nullcontext() if _in_main(factory, *args) else _hidden_main():
                _start(self._process)
            there.close()
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
            value, error = self._here.recv()
        except (EOFError, ConnectionResetError):
            self._died()
        if error is not None:
            raise error
        return value

    def _died(self) -> NoReturn:
        self._process.join()
        code = self._process.exitcode
        why = ": most often a lack of memory" if code == -signal.SIGKILL else ""
        raise UserError(f"{self._label}: its process died with exit code {code}{why}") from None

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()
        self._here.close()


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


def _serve(there: Connection, factory: Callable[..., Any], args: tuple[Any, ...]) -> None:
    # A Ctrl-C reaches the whole process group. The parent handles it, and ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            served = factory(*args)
            there.send((None, None))
            while True:
                method, arguments = there.recv()
                there.send((getattr(served, method)(*arguments), None))
        except (
            UserError,
            OSError,
            ModuleNotFoundError,
        ) as error:  # the parent raises it, and cuantiza.core.errors prints it as one line
            there.send((None, error))
