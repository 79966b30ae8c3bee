"""How ranks find one another and how long they wait, and settings that a run makes unless the environment has them."""

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
# The watchdog, which explains, comes first; a collective's own timeout, which does not, is the second line.
AFTER_WATCHDOG = timedelta(seconds=30)
CONNECT_SECONDS = 3.0
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
_ELSEWHERE = ("192.0.2.1", 9)  # an address of no host (RFC 5737): the default route leads there

# What the environment holds goes before these (docs/cluster.md has a line on each).
DEFAULTS = {
    # A collective that failed or timed out ends the process, without waiting for a GPU that no longer answers.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    # The last collectives of every rank are kept and written when one times out: which rank did not come, to which.
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "NCCL_DEBUG": "WARN",
}


class NotJoined(UserError):
    """The ranks did not find one another, which the next start may."""

    exit_code = 1


Address = tuple[socket.AddressFamily, Any]
"""As `socket.getaddrinfo` has it."""


def set_defaults() -> None:
    """Put `DEFAULTS` into the environment, except where it has values. Call before the process group is made."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)


def join(backend: str, *, several_hosts: bool) -> None:
    """Create the process group. Collective.

    Raises:
        NotJoined: a port is taken, or the processes cannot reach one another.
    """
    set_defaults()
    if several_hosts:
        name_interface()
    try:
        dist.init_process_group(backend, timeout=START_TIMEOUT)
    except RuntimeError as error:
        if (reason := _why_not_joined(str(error))) is None:
            raise
        raise NotJoined(f"{reason} ({first_line(error)})") from error


def name_interface() -> None:
    """Have gloo listen on the interface that leads to rank 0, where this host's own name does not lead to any.

    Gloo listens at the address that the name resolves to, and at the loopback address where it does not: nobody reaches
    that from another host, and ranks wait for one another until a timeout. What GLOO_SOCKET_IFNAME says stays.
    """
    if GLOO_INTERFACE in os.environ or _resolves_to_this_host(os.uname().nodename):
        return
    interface = _interface_to_rank0()
    if interface is not None:
        os.environ[GLOO_INTERFACE] = interface


def _resolves_to_this_host(name: str) -> bool:
    """Whether a name leads to an address of this host that others can reach."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    for family, kind, _, _, address in found:
        if ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
            return False  # gloo may take it, as the first that it can listen at
        with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
            probe.bind(address)
            return True
    return False


def _interface_to_rank0() -> str | None:
    """Return the interface through which packets to rank 0's host leave; None where there is no way."""
    address = rank0_address()
    if address is None:
        return None
    family, target = address
    try:
        own = _own_address(family, target)
        several_hosts = os.environ.get("WORLD_SIZE") != os.environ.get("LOCAL_WORLD_SIZE")
        if ipaddress.ip_address(own.partition("%")[0]).is_loopback and several_hosts:  # rank 0's host, to itself
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
    """What a person can do about an error of torch's store or of gloo; None where this is not known."""
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
    """From now on no collective waits much longer than `hang_timeout` seconds. After the first step, on every rank."""
    from torch.distributed.distributed_c10d import _set_pg_timeout, _world

    # torch has no public way yet; torchtitan goes this one too. ZeRO and the request flags have groups of their own.
    for group in list(_world.pg_map):
        _set_pg_timeout(timedelta(seconds=hang_timeout) + AFTER_WATCHDOG, group)


def rank0_address() -> Address | None:
    """Resolve MASTER_ADDR and MASTER_PORT, where torch's store is; None where they are not set or not known.

    Call it while the network works: a resolver may wait long for one that does not.
    """
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
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
    """What SLURM calls this host, else what it calls itself."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename
