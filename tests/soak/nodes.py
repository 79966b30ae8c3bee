"""Simulated nodes: a network namespace each, with a fork server, a wall clock and its own /dev/shm."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue

from tests.soak.clock import Clock, build_library
from tests.support.hosts import Host, some_hosts
from tests.support.launching import ROOT, environment

READY_SECONDS = 180.0
ANSWER_SECONDS = 60.0
SILENCE_SECONDS = 30.0


class Node:
    """A node on which ranks are started.

    Args:
        host: its network namespace.
        folder: folder for its clock and the log of its fork server.
        library: library that shifts the clock.
    """

    def __init__(self, host: Host, folder: Path, library: Path) -> None:
        self.host, self.name = host, host.name.partition("-")[0]
        self.clock = Clock(folder / f"{self.name}.clock")
        variables = environment(folder, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", SLURMD_NODENAME=self.name)
        command = [sys.executable, "-m", "tests.soak.fork_server"]
        # Not `ip netns exec`, which hides file systems that are mounted later.
        prefix = [*("nsenter", f"--net=/run/netns/{host.name}"), *("unshare", "--mount", "--propagation", "slave")]
        with (folder / f"{self.name}.log").open("ab") as log:
            self._server = subprocess.Popen(
                [*prefix, "sh", "-c", 'mount -t tmpfs shm /dev/shm && exec "$@"', "sh", *command],
                cwd=ROOT, env=variables | self.clock.environment(library), stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
            )  # fmt: skip
        host.started.append(self._server)
        self.local = Path(f"/proc/{self._server.pid}/root/dev/shm")
        """Its /dev/shm: memory of processes, and node-local storage for local checkpoints."""
        self._pids: Queue[int] = Queue()
        self._ready = threading.Event()
        self._statuses: dict[int, int] = {}
        threading.Thread(target=self._read, daemon=True).start()

    def wait_until_ready(self) -> None:
        assert self._ready.wait(READY_SECONDS), f"the fork server of {self.name} does not answer"

    def start(self, arguments: list[str], variables: dict[str, str], log: Path) -> int:
        """Start a rank, and return its process id."""
        assert self._server.stdin is not None
        start = {"arguments": arguments, "environment": variables, "log": str(log)}
        self._server.stdin.write(json.dumps(start) + "\n")
        self._server.stdin.flush()
        try:
            return self._pids.get(timeout=ANSWER_SECONDS)
        except Empty:
            raise AssertionError(f"the fork server of {self.name} does not answer") from None

    def status(self, pid: int) -> int | None:
        """Return the exit status of a rank (negative: a signal); None: it is running."""
        return self._statuses.get(pid)

    def processes(self) -> list[int]:
        """Return all processes of the node, without its fork server."""
        return [pid for pid in self.host.processes() if pid != self._server.pid]

    def kill(self) -> None:
        """Kill all processes of the node with SIGKILL, without its fork server."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wipe(self) -> None:
        """Remove everything from the node-local storage."""
        for path in self.local.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def restore(self) -> None:
        """End all processes, and restore what failures change: the link, the clock and the node-local storage."""
        with contextlib.ExitStack() as stack:  # callbacks are called in reverse order, also after an error of another
            stack.callback(self.wipe)
            stack.callback(self.clock.set, 0.0)
            stack.callback(self.host.unlimit_rate)
            stack.callback(self.host.plug_in)
            stack.callback(wait_for_silence, [self], SILENCE_SECONDS)
            stack.callback(self.kill)

    def _read(self) -> None:
        assert self._server.stdout is not None
        for line in self._server.stdout:
            answer = json.loads(line)
            if "ready" in answer:
                self._ready.set()
            elif "status" in answer:
                self._statuses[answer["pid"]] = answer["status"]
            else:
                self._pids.put(answer["pid"])


@contextlib.contextmanager
def some_nodes(count: int, folder: Path) -> Iterator[list[Node]]:
    """Create nodes host1, host2, ...; remove them and everything that runs on them afterwards.

    Args:
        folder: folder for clocks and logs. File systems that are mounted in it later are visible on all nodes.
    """
    library = build_library(folder)
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True, timeout=60)
    try:
        subprocess.run(["mount", "--make-shared", str(folder)], check=True, timeout=60)
        with some_hosts(count) as hosts:
            nodes = [Node(host, folder, library) for host in hosts]
            for node in nodes:
                node.wait_until_ready()
            yield nodes
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=60)


def wait_for_silence(nodes: list[Node], seconds: float) -> list[int]:
    """Wait until nothing runs on the nodes; return the processes that remain after `seconds`."""
    end = time.monotonic() + seconds
    while remaining := [pid for node in nodes for pid in node.processes()]:
        if time.monotonic() > end:
            return remaining
        time.sleep(0.1)
    return []
