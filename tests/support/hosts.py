"""Simulated hosts with separate addresses and links: network namespaces connected by a bridge."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.support.launching import ROOT


def ip(*args: str, check: bool = True) -> str:
    """Run `ip ARGS`, and return its output."""
    return subprocess.run(["ip", *args], capture_output=True, text=True, check=check, timeout=20).stdout


# Names are unique, because a namespace and its link may exist for a while after they were deleted.
_uses = itertools.count()


class Host:
    """A network namespace with one interface, eth0."""

    def __init__(self, name: str, address: str, link: str, bridge: str) -> None:
        self.name, self.address = name, address
        self._link, self._bridge = link, bridge
        """Interface of the bridge that leads to the host, and the bridge."""
        self.started: list[subprocess.Popen[str]] = []

    def start(
        self, command: Sequence[str | Path], *, cwd: Path, env: dict[str, str], log: Path
    ) -> subprocess.Popen[str]:
        """Run a command on this host."""
        with log.open("a", encoding="utf-8") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *map(str, command)],
                cwd=cwd, env=env, stdout=file, stderr=file, text=True, start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def unplug(self) -> None:
        ip("link", "set", self._link, "down")

    def plug_in(self) -> None:
        ip("link", "set", self._link, "up")

    @contextlib.contextmanager
    def delayed(self, seconds: float) -> Iterator[None]:
        """Delay every packet to and from this host by `seconds`."""
        inner, near, far = (f"{kind}{self._link[1:]}" for kind in "bnf")  # the bridge of the link, and two TAPs
        command = [sys.executable, "-m", "tests.support.delayed_link", near, far, str(seconds)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
                ip("link", "add", inner, "type", "bridge")
                for link, bridge in ((near, inner), (self._link, inner), (far, self._bridge)):
                    ip("link", "set", link, "master", bridge, "up")
                ip("link", "set", inner, "up")
                yield
            finally:
                ip("link", "set", self._link, "master", self._bridge, check=False)
                ip("link", "del", inner, check=False)
                process.kill()

    def limit_rate(self, rate: str) -> None:
        """Limit the rate of packets that this host sends, such as "10mbit"."""
        self._tc("qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", rate, "burst", "64kb", "latency", "1s")

    def unlimit_rate(self) -> None:
        """End `limit_rate`."""
        self._tc("qdisc", "del", "dev", "eth0", "root", check=False)

    def _tc(self, *args: str, check: bool = True) -> None:
        command = ["ip", "netns", "exec", self.name, "tc", *args]
        subprocess.run(command, check=check, capture_output=not check, timeout=20)

    def power_off(self) -> None:
        """Kill all processes, without packets to other hosts."""
        self.unplug()
        self.kill()

    def kill(self) -> None:
        """Kill all processes of this host with SIGKILL."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self) -> list[int]:
        """Return the process ids on this host."""
        return [int(pid) for pid in ip("netns", "pids", self.name, check=False).split()]


class ThisMachine:
    """This machine in the place of a host, for faults that a network namespace cannot have.

    `ip netns exec` hides the control groups, for example.
    """

    address = "127.0.0.1"

    def start(
        self, command: Sequence[str | Path], *, cwd: Path, env: dict[str, str], log: Path
    ) -> subprocess.Popen[str]:
        """Run a command on this machine."""
        with log.open("a", encoding="utf-8") as file:
            return subprocess.Popen(
                list(map(str, command)), cwd=cwd, env=env, stdout=file, stderr=file, text=True, start_new_session=True
            )


@contextlib.contextmanager
def some_hosts(count: int = 2) -> Iterator[list[Host]]:
    """Create hosts 10.77.N.1, .2, ... on a new bridge; delete them and kill their processes afterwards."""
    mark = f"{os.getpid() % 100000}-{next(_uses)}"
    net = f"10.77.{os.getpid() % 250}"
    bridge, hosts = f"br{mark}", []
    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("link", "set", bridge, "up")
        for number in range(1, count + 1):
            name, link = f"host{number}-{mark}", f"v{number}-{mark}"
            ip("netns", "add", name)
            host = Host(name, f"{net}.{number}", link, bridge)
            hosts.append(host)
            ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", link, "master", bridge, "up")
            for args in (("addr", "add", f"{host.address}/24", "dev", "eth0"), ("link", "set", "eth0", "up"),
                         ("link", "set", "lo", "up")):  # fmt: skip
                ip("-n", name, *args)
        yield hosts
    finally:
        for host in hosts:
            host.kill()
            for process in host.started:
                process.wait()
            ip("netns", "del", host.name, check=False)
        ip("link", "del", bridge, check=False)
