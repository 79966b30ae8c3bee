"""Create the process group: default settings of NCCL, the network interface, timeouts, and errors with a remedy."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

from shards.errors import UserError, first_line

# Until the first step is done, ranks wait for compilation, cold file systems and each other's imports.
START_TIMEOUT = timedelta(minutes=30)
# A collective's own timeout comes after the watchdog's, because the watchdog reports which ranks are at fault.
AFTER_WATCHDOG = timedelta(seconds=45)
CONNECT_SECONDS = 3.0
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
_ELSEWHERE = ("192.0.2.1", 9)  # reserved for documentation (RFC 5737): packets to it take the default route

# Variables that the environment has already keep their values (docs/cluster.md describes each).
DEFAULTS = {
    # A collective that failed or timed out ends the process, without waiting for a GPU that no longer answers.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    # The last collectives of every rank are kept and written when one times out: which rank did not come, to which.
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "NCCL_DEBUG": "WARN",
}


class RendezvousError(UserError):
    """The ranks could not connect to one another; another start may succeed."""

    exit_code = 1


Address = tuple[socket.AddressFamily, Any]
"""As `socket.getaddrinfo` has it."""


def join(backend: str, rank0: Address | None, *, several_hosts: bool) -> None:
    """Create the process group. Collective.

    Args:
        rank0: from `rank0_address`.

    Raises:
        RendezvousError: a port is taken, or the processes cannot reach one another.
    """
    for name, value in DEFAULTS.items():  # NCCL reads them when the process group is created
        os.environ.setdefault(name, value)
    if several_hosts:
        name_interface(rank0)
    try:
        dist.init_process_group(backend, timeout=START_TIMEOUT)
    except RuntimeError as error:
        if (reason := _why_not_joined(str(error))) is None:
            raise
        raise RendezvousError(f"{reason} ({first_line(error)})") from error


def name_interface(rank0: Address | None) -> None:
    """Make gloo listen on the interface that leads to rank 0 if this host's name does not resolve to one of its own.

    Gloo listens on the address that the host's name resolves to, else on the loopback address, which other hosts cannot
    reach: ranks would wait for one another until a timeout. A value of GLOO_SOCKET_IFNAME is kept.
    """
    if rank0 is None or GLOO_INTERFACE in os.environ or _resolves_to_this_host(os.uname().nodename):
        return
    interface = _interface_to(rank0)
    if interface is not None:
        os.environ[GLOO_INTERFACE] = interface


def _resolves_to_this_host(name: str) -> bool:
    """Whether a name resolves to an address of this host that other hosts can reach."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    for family, kind, _, _, address in found:
        if ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
            return False  # gloo may take it, as the first that it can listen on
        with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
            probe.bind(address)
            return True
    return False


def _interface_to(address: Address) -> str | None:
    """Return the interface through which packets to an address leave; None if there is no route.

    On the host of rank 0 itself, that would be the loopback interface: return the one of the default route instead.
    """
    try:
        own = _own_address(*address)
        if ipaddress.ip_address(own.partition("%")[0]).is_loopback:
            own = _own_address(socket.AF_INET, _ELSEWHERE)
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if own in [entry.address.partition("%")[0] for entry in addresses]:
            return str(name)
    return None


def _own_address(family: int, target: Any) -> str:
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # sends nothing
        return str(probe.getsockname()[0])


def _why_not_joined(text: str) -> str | None:
    """Explain an error of torch's store or of gloo, with a remedy; None if it is not a known one."""
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        port = os.environ.get("MASTER_PORT", "")
        return (
            f"port {port} is in use, perhaps by another run on this machine: start with 'accelerate launch "
            "--main_process_port 0' or 'torchrun --standalone', or set another MASTER_PORT"
        )
    if "gloo" in text.lower():
        named = os.environ.get(GLOO_INTERFACE)
        return (
            f"ranks cannot reach one another from host {host_name()}: set {GLOO_INTERFACE} to the interface that leads "
            f"to the other hosts, now {named or 'not set'} ('ip -br addr' lists them, see docs/cluster.md)"
        )
    return None


def shorten_timeouts(hang_timeout: float) -> None:
    """Limit all collectives to little more than `hang_timeout` seconds. Call it on every rank, after the first step."""
    from torch.distributed.distributed_c10d import _set_pg_timeout, _world

    # torch has no public function for this yet; torchtitan uses this one too. ZeRO and `Preemption` have own groups.
    for group in list(_world.pg_map):
        _set_pg_timeout(timedelta(seconds=hang_timeout) + AFTER_WATCHDOG, group)


def rank0_address(host: str, port: str) -> Address | None:
    """Resolve MASTER_ADDR and MASTER_PORT, where torch's store listens; None if they are empty or cannot be resolved.

    Call it while the network works: without one, a resolver may block for long.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM) if host and port else []
    except (OSError, UnicodeError):  # UnicodeError: no host can have this name
        return None
    return (found[0][0], found[0][4]) if found else None


def is_reachable(address: Address) -> bool:
    """Whether the host at an address answers: accepts a connection, or refuses one. Takes `CONNECT_SECONDS` at most."""
    family, target = address
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.settimeout(CONNECT_SECONDS)
            probe.connect(target)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True


def host_name() -> str:
    """Return SLURM's name of this host, else its own."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename
