"""Creation of the process group: NCCL defaults, the network interface, timeouts, and errors with a remedy."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

from launch.machine.agent_store import outlives_the_ranks, store_of_this_start
from shards.errors import UserError, first_line

# Until the first step is done, ranks wait for compilation, cold file systems and the imports of other ranks.
START_TIMEOUT = timedelta(minutes=30)
# Collectives time out this much later than the watchdog, because the watchdog reports which ranks are at fault.
AFTER_WATCHDOG = timedelta(seconds=45)
CONNECT_SECONDS = 3.0
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
_REMOTE = ("192.0.2.1", 9)  # address reserved for documentation (RFC 5737): packets to it use the default route

# Defaults of environment variables; values that are already set are kept (docs/slurm.md describes each).
DEFAULTS = {
    # A collective that fails or times out ends the process without waiting for a GPU that no longer responds.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    # Record the last collectives of every rank and write them when one times out: this shows which rank is missing.
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "NCCL_DEBUG": "WARN",
}


class RendezvousError(UserError):
    """The ranks could not connect to each other; another start may succeed."""

    exit_code = 1


Address = tuple[socket.AddressFamily, Any]
"""Family and socket address, as returned by `socket.getaddrinfo`."""


def join(backend: str, rank0: Address | None, *, several_hosts: bool, timeout: timedelta = START_TIMEOUT) -> None:
    """Create the process group. Collective.

    Args:
        rank0: address of rank 0 from `rank0_address`.
        several_hosts: whether the ranks run on more than one host.
        timeout: how long to wait for the other ranks, now and in collectives.

    Raises:
        RendezvousError: the port is in use, ranks are missing, or the ranks cannot reach each other.
    """
    for name, value in DEFAULTS.items():  # NCCL reads these variables when the process group is created
        os.environ.setdefault(name, value)
    if several_hosts:
        select_interface(rank0)
    try:
        if outlives_the_ranks():
            store, rank, size = next(dist.rendezvous("env://"))
            store = store_of_this_start(store, rank, size, timeout)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout)
    except RuntimeError as error:
        if (reason := _why_not_joined(str(error))) is None:
            raise
        raise RendezvousError(f"{reason} ({first_line(error)})") from error


def select_interface(rank0: Address | None) -> None:
    """Make gloo listen on the interface that leads to rank 0, unless this host's name resolves to a usable address.

    By default gloo listens on the address to which the host's name resolves, else on the loopback address, which other
    hosts cannot reach: ranks would wait for each other until a timeout. A user's GLOO_SOCKET_IFNAME is kept.
    """
    if rank0 is None or GLOO_INTERFACE in os.environ or _resolves_to_this_host(os.uname().nodename):
        return
    interface = _interface_to(rank0)
    if interface is not None:
        os.environ[GLOO_INTERFACE] = interface


def _resolves_to_this_host(name: str) -> bool:
    """Return whether a name resolves to an address of this host that other hosts can reach."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    for family, kind, _, _, address in found:
        if ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
            return False  # gloo listens on the first usable address, which may be this one
        with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
            probe.bind(address)
            return True
    return False


def _interface_to(address: Address) -> str | None:
    """Return the interface on the route to an address; None if there is no route.

    On the host of rank 0 this would be the loopback interface, so that of the default route is returned instead.
    """
    try:
        own = _own_address(*address)
        if ipaddress.ip_address(own.partition("%")[0]).is_loopback:
            own = _own_address(socket.AF_INET, _REMOTE)
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if own in [entry.address.partition("%")[0] for entry in addresses]:
            return str(name)
    return None


def _own_address(family: int, target: Any) -> str:
    """Return this host's source address for packets to `target`."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # connecting a UDP socket sends no packet
        return str(probe.getsockname()[0])


def _why_not_joined(text: str) -> str | None:
    """Explain a known error of torch's store or gloo, with a remedy; return None for other errors."""
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        port = os.environ.get("MASTER_PORT", "")
        return (
            f"port {port} is in use, perhaps by another run on this machine; start with 'accelerate launch "
            "--main_process_port 0' or 'torchrun --standalone', or set another MASTER_PORT"
        )
    if joined := re.search(r"(\d+)/(\d+) clients joined", text):
        return f"only {joined[1]} of {joined[2]} ranks have connected; look for the error of a rank that is missing"
    if "gloo" in text.lower():
        current = os.environ.get(GLOO_INTERFACE)
        return (
            f"host {host_name()} cannot connect to the other ranks; set {GLOO_INTERFACE} (currently "
            f"{current or 'not set'}) to the network interface that leads to the other hosts; 'ip -br addr' lists the "
            "interfaces, see docs/slurm.md"
        )
    return None


def shorten_timeouts(hang_timeout: float) -> None:
    """Set the timeout of all collectives to `hang_timeout` plus a margin. Call it on all ranks after the first step."""
    from torch.distributed.distributed_c10d import _set_pg_timeout, _world

    # torch has no public function for this; torchtitan uses the private one too. ZeRO and `Preemption` add groups.
    for group in list(_world.pg_map):
        _set_pg_timeout(timedelta(seconds=hang_timeout) + AFTER_WATCHDOG, group)


def rank0_address(host: str, port: str) -> Address | None:
    """Resolve MASTER_ADDR and MASTER_PORT, where torch's store listens; None if empty or not resolvable.

    Call this while the network works: after a failure, name resolution may block for a long time.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM) if host and port else []
    except (OSError, UnicodeError):  # UnicodeError: not a valid host name
        return None
    return (found[0][0], found[0][4]) if found else None


def is_reachable(address: Address) -> bool:
    """Return whether a host accepts or refuses a connection, within `CONNECT_SECONDS`; either shows that it is up."""
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
    """Return SLURM's name for this host, else its host name."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename
