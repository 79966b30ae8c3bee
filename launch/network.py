"""How long ranks wait for one another, and the knobs of NCCL and its kin that a run sets where nobody has set them."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import psutil  # comes with accelerate

# Until the first step is done, ranks wait for compilation, cold file systems and each other's imports.
START_TIMEOUT = timedelta(minutes=30)
# The watchdog, which explains, comes first; a collective's own timeout, which does not, is the second line.
AFTER_WATCHDOG = timedelta(seconds=30)

# What the environment holds goes before these (docs/cluster.md has a line on each).
DEFAULTS = {
    # A collective that failed or timed out ends the process, without waiting for a GPU that no longer answers.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    # The last collectives of every rank are kept and written when one times out: which rank did not come, to which.
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "NCCL_DEBUG": "WARN",
}


def set_defaults() -> None:
    """Put `DEFAULTS` into the environment, except where it has values. Call before the process group is made."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)


def shorten_timeouts(stall_timeout: float) -> None:
    """From now on no collective waits much longer than `stall_timeout` seconds. After the first step, on every rank."""
    from torch.distributed.distributed_c10d import _set_pg_timeout, _world

    # torch has no public way yet; torchtitan goes this one too. ZeRO and the request flags have groups of their own.
    for group in list(_world.pg_map):
        _set_pg_timeout(timedelta(seconds=stall_timeout) + AFTER_WATCHDOG, group)


def own_address() -> str:
    """The address at which other hosts of this run reach this one.

    That of the interface named by GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME; else the one that leads to MASTER_ADDR.
    """
    interfaces = psutil.net_if_addrs()
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        # NCCL's forms are '=eth0,ib0' (exactly), '^lo' (all but), 'eth' (begins with).
        for name in os.environ.get(variable, "").lstrip("=").split(","):
            for address in interfaces.get(name, []):
                if address.family == socket.AF_INET:
                    return address.address
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(master, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # of datagrams: nothing is sent
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"


def host_name() -> str:
    """What SLURM calls this host, else what it calls itself."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename
