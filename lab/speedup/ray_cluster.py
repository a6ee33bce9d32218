"""Starts a Ray cluster of several nodes on this machine, for tests and measurements; each node is a `ray start`."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from cuantiza.core.errors import UserError

# Ray accepts no less than 75 MiB. The tasks here send little data.
_OBJECT_STORE = 100 * 2**20
_STARTED = "Ray runtime started"
_PATIENCE_S = 300


class Cluster:
    """Ray nodes that run in the environment `venv`. Used as a `with` block, which ends all nodes when it exits.

    Each of `nodes` lists the processors that one node's processes run on. The first node is the head; if its list is
    empty, it offers no processor to tasks.
    """

    def __init__(self, venv: Path, nodes: Iterable[Iterable[int]]) -> None:
        self._ray = venv / "bin" / "ray"
        self._wanted = [sorted(node) for node in nodes]
        self._nodes: list[subprocess.Popen] = []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def __enter__(self) -> Cluster:
        # Ray puts its sockets into this folder, and the path of a socket must be short.
        self._folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        with socket.create_server(("127.0.0.1", 0)) as server:
            self._port = server.getsockname()[1]
        try:
            for number, processors in enumerate(self._wanted):
                self._start(number, processors)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for number in reversed(range(len(self._nodes))):
            self.kill(number)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, number: int, processors: list[int]) -> None:
        where = ["--address", self.address]
        if number == 0:
            where = ["--head", f"--port={self._port}", f"--temp-dir={self._folder}", "--include-dashboard=false"]
        command = [self._ray, "start", *where, f"--num-cpus={len(processors)}", "--num-gpus=0", "--block"]
        command += ["--node-ip-address=127.0.0.1", f"--object-store-memory={_OBJECT_STORE}", "--disable-usage-stats"]
        command += ["--min-worker-port=0", "--max-worker-port=0"]
        log = self._folder / f"node-{number}.log"
        with log.open("w") as out:
            node = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: os.sched_setaffinity(0, processors or os.sched_getaffinity(0)),
                start_new_session=True,
            )
        self._nodes.append(node)
        end = time.monotonic() + _PATIENCE_S
        while _STARTED not in log.read_text(errors="replace"):
            if node.poll() is not None or time.monotonic() > end:
                last = (log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"])[-1]
                raise UserError(f"{self._ray} start: the node did not start ({last}); see {log}")
            time.sleep(0.1)

    def processes(self, number: int) -> dict[int, str]:
        """The command lines of all processes of node `number` by their ids: `ray start`, workers and their children."""
        parents, commands = {}, {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
                commands[int(stat.parent.name)] = (stat.parent / "cmdline").read_text().replace("\0", " ")
            except (OSError, ValueError):
                continue  # the process has ended in the meantime
        found = [self._nodes[number].pid]
        for process in found:
            found += [child for child, parent in parents.items() if parent == process]
        return {process: commands[process] for process in found if process in commands}

    def kill(self, number: int) -> None:
        """End node `number` as suddenly as a power cut: all its processes get SIGKILL."""
        while found := [process for process in self.processes(number) if process != self._nodes[number].pid]:
            for process in found:
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            if not any(map(_runs, found)):
                break
        self._nodes[number].kill()
        self._nodes[number].wait()


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
