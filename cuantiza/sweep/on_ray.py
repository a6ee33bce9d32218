"""The cluster: the only file that knows Ray.

A task is a Ray task without retries of Ray's own: what was lost with a process or a machine is given to another one from
here, where it is counted and told. A task that has to be alone takes all processors of a node, which Ray gives it only
when nothing else of ours runs there, and gives nothing more while it lasts.
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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cuantiza.core.errors import UserError
from cuantiza.core.machine.progress import report as say
from cuantiza.sweep.executor import Done, Task, perform

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anyone; before the import that reads it
# Ray's own default from its next releases on, announced by a warning at every start.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

# How often a task is given to another process after one that died under it, and how long to wait for a machine.
TRIES, PATIENCE_S = 4, 300
_CONNECT_S = 10
# Tasks that wait at the cluster for each that runs: enough that no processor waits for this one.
_AHEAD = 2
# cuantiza.core.machine.process says so of a child that the kernel killed: the machine's fault, not the task's.
_CHILD_DIED = "its process died"


@ray.remote(max_retries=0)
def _perform(task: Task) -> tuple[Any, str | None, float, str]:
    # A child that is spawned runs the main module's file first, which here is Ray's: half a second, and memory that
    # would be counted as the model's.
    vars(sys.modules["__main__"]).pop("__file__", None)
    done = perform(task, f"{platform.node()} {ray.get_runtime_context().get_node_id()[:8]}")
    return done.value, done.error, done.seconds, done.where


@ray.remote(max_retries=0, num_cpus=0)
def _sees(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text() == text


@dataclass(frozen=True)
class _Try:
    """A task, how often it was tried before, and the node that it has to itself, if any."""

    task: Task
    before: int = 0
    node: str | None = None


class _Held:
    """SIGINT and SIGTERM, kept until `deliver`: an exception in the midst of Ray's own code can make it abort."""

    def __enter__(self) -> _Held:
        self._kept: int | None = None
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self._before = {number: handler for number, handler in handlers.items() if callable(handler)}
        for number in self._before:
            signal.signal(number, self._keep)
        return self

    def _keep(self, number: int, _frame: object) -> None:
        self._kept = number

    def deliver(self) -> None:
        """Do what was to be done at the signal that came, if one did."""
        if self._kept is not None:
            number, self._kept = self._kept, None
            self._before[number](number, None)

    def __exit__(self, kind: type | None, *_: object) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._keep:  # and not what `deliver` has set
                signal.signal(number, handler)
        if kind is None:
            self.deliver()


class OnRay:
    """The nodes of the cluster at `address` that have at least `threads` processors; `work` is on all of them.

    Raises UserError where there is no cluster, or a node does not see `work`.
    """

    def __init__(self, address: str, threads: int, work: Path) -> None:
        self._address, self._threads, self._work = address, threads, work
        self._running: dict[ray.ObjectRef, _Try] = {}

    def __enter__(self) -> OnRay:
        with ExitStack() as stack:
            # What Ray says of workers that died would stand before the table.
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
            # Ray itself asks for minutes before it gives up.
            try:
                socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
            except (OSError, ValueError) as error:
                raise self._no_cluster(error) from None
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            ray.init(address=self._address, log_to_driver=False, logging_level="ERROR")
        except Exception as error:  # of several kinds, Python's own among them
            raise self._no_cluster(error) from None
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _no_cluster(self, error: Exception) -> UserError:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return UserError(
            f"RAY={self._address}: there is no cluster to be had ({line}); start one with `ray start --head` of this "
            "environment, and give host:port or auto"
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
                    "start one and run the command again: what was measured is kept"
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
        """Processors of every node that is alive and has enough of them, by its id."""
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
                        f"--work {self._work}: node {node[:8]} of the cluster does not see it; it has to be on a disk that "
                        "all machines share, under the same path"
                    )
        except RayTaskError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(
                f"RAY={self._address}: a node cannot run this code ({reason}); every machine needs this folder under the "
                "same path, and the environment of setup/ray.txt"
            ) from None
        finally:
            probe.unlink()

    def _launch(self, waiting: deque[_Try], nodes: dict[str, float]) -> None:
        """Give the cluster as much of `waiting` as it has use for."""
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
        """What has ended, within a second: nodes come and go meanwhile."""
        if not self._running:
            time.sleep(1)
            return []
        return ray.wait(list(self._running), num_returns=1, timeout=1)[0]

    def _result(self, ref: ray.ObjectRef, attempt: _Try) -> tuple[Done, str | None]:
        """How a try ended, and what died where that was the reason."""
        try:
            value, error, seconds, where = ray.get(ref)
        except RayTaskError as problem:
            raise problem.cause or problem from None
        except RayError as problem:  # its process, its node, or what held its result
            died = type(problem).__name__
            return Done(attempt.task, None, f"{died}, {TRIES} times", 0.0, ""), died
        return Done(attempt.task, value, error, seconds, where), error if error and _CHILD_DIED in error else None
