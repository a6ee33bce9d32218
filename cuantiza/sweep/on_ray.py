"""Runs tasks on a Ray cluster. This is the only file that uses Ray.

Ray's own retries are switched off. If a process or machine dies, this file gives the task to another one, so that it
can count the tries and print them. A task that must be alone requests all processors of a node. Ray starts it only when
no other task of the sweep runs there, and starts no other until it ends.
"""

from __future__ import annotations

import os
import platform
import signal
import socket
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from cuantiza.core.errors import UserError
from cuantiza.core.machine.progress import report as say
from cuantiza.sweep.executor import Done, Task, perform

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # send no usage statistics; Ray reads this at import
# This will be Ray's default in later releases. Setting it now avoids a warning at every start.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

# A task is tried at most TRIES times if processes that run it die. PATIENCE_S is how long to wait for a node.
TRIES, PATIENCE_S = 4, 300
_CONNECT_S = 10
# Tasks at the cluster per task that can run at once. The extra ones wait there, so no processor waits for this process.
_AHEAD = 2
# cuantiza.core.machine.process uses these words if the kernel killed a child. That is the machine's fault, not the
# task's, so the task is tried again.
_CHILD_DIED = "its process died"


@ray.remote(max_retries=0)
def _perform(task: Task) -> tuple[Any, str | None, float, str]:
    # A spawned child first runs the main module's file, which here is Ray's worker. That would take half a second, and
    # memory that is counted as the model's. Without `__file__`, the child skips it.
    vars(sys.modules["__main__"]).pop("__file__", None)
    done = perform(task, f"{platform.node()} {ray.get_runtime_context().get_node_id()[:8]}")
    return done.value, done.error, done.seconds, done.where


@ray.remote(max_retries=0, num_cpus=0)
def _sees(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text() == text


@dataclass(frozen=True)
class _Try:
    """A task, the number of earlier tries, and the node that is reserved for it, if it must be alone."""

    task: Task
    before: int = 0
    node: str | None = None


class _Held:
    """Holds back SIGINT and SIGTERM until `deliver`, because an exception inside Ray's own code can make Ray abort."""

    def __enter__(self) -> _Held:
        self._kept: int | None = None
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self._before: dict[int, Callable[[int, FrameType | None], Any]] = {
            number: handler for number, handler in handlers.items() if callable(handler)
        }
        for number in self._before:
            signal.signal(number, self._keep)
        return self

    def _keep(self, number: int, _frame: object) -> None:
        self._kept = number

    def deliver(self) -> None:
        """Call the original handler of the signal that was held back, if there was one."""
        if self._kept is not None:
            number, self._kept = self._kept, None
            self._before[number](number, None)

    def __exit__(self, kind: type | None, *_: object) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._keep:  # unless `deliver` called a handler that set another
                signal.signal(number, handler)
        if kind is None:
            self.deliver()


class OnRay:
    """An executor on those nodes of the cluster at `address` that have at least `threads` processors.

    All nodes must see the folder `work`. Entering the `with` block raises UserError if there is no cluster, or a node
    does not see `work`.
    """

    def __init__(self, address: str, threads: int, work: Path) -> None:
        self._address, self._threads, self._work = address, threads, work
        self._running: dict[ray.ObjectRef, _Try] = {}

    def __enter__(self) -> OnRay:
        with ExitStack() as stack:
            # Ray prints messages about dead workers to standard output, where they would mix with the table.
            stack.enter_context(redirect_stdout(sys.stderr))
            self._connect()
            self._signals = stack.enter_context(_Held())
            stack.callback(ray.shutdown)
            self._check()
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with self._open:
            for ref in self._running:
                ray.cancel(ref, force=True)
            if self._running:
                with suppress(RayError):
                    ray.wait(list(self._running), num_returns=len(self._running), timeout=30)

    def _connect(self) -> None:
        host, _, port = self._address.rpartition(":")
        if host:
            # Ray tries for minutes before it gives up, so first check whether anything listens at the address.
            try:
                socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
            except (OSError, ValueError) as error:
                raise self._no_cluster(error) from None
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            ray.init(address=self._address, log_to_driver=False, logging_level="ERROR")
        except Exception as error:  # Ray raises errors of several types here, including built-in ones
            raise self._no_cluster(error) from None
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _no_cluster(self, error: Exception) -> UserError:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return UserError(
            f"RAY={self._address}: there is no cluster ({line}); start one with this environment's `ray start --head`, "
            "and give host:port or auto"
        )

    def run(self, tasks: Sequence[Task]) -> Iterator[Done]:
        waiting = deque(_Try(task) for task in tasks)
        seen = time.monotonic()
        while waiting or self._running:
            self._signals.deliver()
            nodes = self._nodes()
            if nodes:
                seen = time.monotonic()
            elif time.monotonic() - seen > PATIENCE_S:
                raise UserError(
                    f"RAY={self._address}: has had no node with {self._threads} processors for {PATIENCE_S} s; "
                    "start one and run the command again: finished measurements are kept"
                )
            self._launch(waiting, nodes)
            for ref in self._ended():
                attempt = self._running.pop(ref)
                done, died = self._result(ref, attempt)
                if died and attempt.before + 1 < TRIES:
                    say(f"again     {attempt.task.kind} {attempt.task.label}: {died}")
                    waiting.appendleft(replace(attempt, before=attempt.before + 1, node=None))
                else:
                    yield done

    def _nodes(self) -> dict[str, float]:
        """The number of processors of each node that is alive and has enough of them, by the node's id."""
        found = {node["NodeID"]: node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]}
        return {node: cpus for node, cpus in found.items() if cpus >= self._threads}

    def _check(self) -> None:
        nodes = self._nodes()
        if not nodes:
            raise UserError(f"RAY={self._address}: has no node with {self._threads} processors; give fewer --threads")
        probe, text = self._work / f".tmp-{uuid.uuid4().hex}", uuid.uuid4().hex
        probe.write_text(text)
        try:
            for node in nodes:
                there = NodeAffinitySchedulingStrategy(node, soft=False)
                if not ray.get(_sees.options(scheduling_strategy=there).remote(probe, text)):
                    raise UserError(
                        f"--work {self._work}: node {node[:8]} of the cluster does not see it; put it on a disk that "
                        "all machines share under the same path"
                    )
        except RayTaskError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(
                f"RAY={self._address}: a node cannot run this code ({reason}); give every machine this folder under "
                "the same path, and the environment of setup/ray.txt"
            ) from None
        finally:
            probe.unlink()

    def _launch(self, waiting: deque[_Try], nodes: dict[str, float]) -> None:
        """Give the cluster tasks from `waiting`, as many as its processors can use."""
        taken = {attempt.node for attempt in self._running.values()}
        free = [node for node in nodes if node not in taken]
        room = _AHEAD * sum(int(cpus // self._threads) for cpus in nodes.values()) - len(self._running)
        while waiting and (free if waiting[0].task.alone else room > 0):
            attempt = waiting.popleft()
            if attempt.task.alone:
                node = free.pop(0)
                attempt = replace(attempt, node=node)
                options = {
                    "num_cpus": nodes[node],
                    "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
                }
            else:
                room -= 1
                options = {"num_cpus": self._threads, "scheduling_strategy": "SPREAD"}
            self._running[_perform.options(**options).remote(attempt.task)] = attempt

    def _ended(self) -> list[ray.ObjectRef]:
        """The tasks that have ended. Waits at most a second, so that `run` also notices new and lost nodes."""
        if not self._running:
            time.sleep(1)
            return []
        return ray.wait(list(self._running), num_returns=1, timeout=1)[0]

    def _result(self, ref: ray.ObjectRef, attempt: _Try) -> tuple[Done, str | None]:
        """Return (how a try ended, what died if that ended it, else None)."""
        try:
            value, error, seconds, where = ray.get(ref)
        except RayTaskError as problem:
            raise problem.cause or problem from None
        except RayError as problem:  # the worker, the node, or the store of its result died
            died = type(problem).__name__
            return Done(attempt.task, None, f"{died}, {TRIES} times", 0.0, ""), died
        return Done(attempt.task, value, error, seconds, where), error if error and _CHILD_DIED in error else None
