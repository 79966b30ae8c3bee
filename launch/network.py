"""How long ranks wait for one another, and NCCL settings that a run makes unless the environment has them."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

# Until the first step is done, ranks wait for compilation, cold file systems and each other's imports.
START_TIMEOUT = timedelta(minutes=30)
# The watchdog, which explains, comes first; a collective's own timeout, which does not, is the second line.
AFTER_WATCHDOG = timedelta(seconds=30)
CONNECT_SECONDS = 3.0

# What the environment holds goes before these (docs/cluster.md has a line on each).
DEFAULTS = {
    # A collective that failed or timed out ends the process, without waiting for a GPU that no longer answers.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    # The last collectives of every rank are kept and written when one times out: which rank did not come, to which.
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "NCCL_DEBUG": "WARN",
}

Address = tuple[socket.AddressFamily, Any]
"""As `socket.getaddrinfo` has it."""


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
