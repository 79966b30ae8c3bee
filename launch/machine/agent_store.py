"""The store of torchrun's agents, made safe for restarts.

torchrun gives the processes of every start the same key-value store. After a restart, they would read addresses that
the previous processes have stored, and fail to connect (https://github.com/pytorch/pytorch/issues/135712). The number
of the restart cannot separate the starts, because each agent counts only the failures of its own processes.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

_INTERVAL = 0.05


def outlives_the_ranks(variables: Mapping[str, str] = os.environ) -> bool:
    """Return whether the store belongs to an agent that may start the ranks again."""
    shared = variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return shared and variables.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def store_of_this_start(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """Return the part of a store that only the ranks of this start use. Collective.

    Every rank stores a new random id. Rank 0 publishes the ids of all ranks until each has confirmed that its own is
    among them; then all use rank 0's id as the prefix of their keys. Ids of a previous start are never confirmed.

    Raises:
        RuntimeError: ranks are missing.
    """
    own, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    store.set(f"start/{rank}", own)
    begin = _publish if rank == 0 else _confirm
    while (start := begin(store, own, rank, size)) is None:
        if time.monotonic() > end:
            key = "start/{}" if rank else f"confirmed/{own}/{{}}"
            joined = 1 + sum(store.check([key.format(other)]) for other in range(size) if other != rank)
            raise RuntimeError(f"timed out after {timeout.total_seconds():.0f} s: {joined}/{size} clients joined")
        time.sleep(_INTERVAL)
    return dist.PrefixStore(f"start-{start}", store)


def _publish(store: dist.Store, own: str, _rank: int, size: int) -> str | None:
    others = range(1, size)
    if not store.check([f"start/{rank}" for rank in others]):
        return None
    store.set("starts", ",".join([own, *(store.get(f"start/{rank}").decode() for rank in others)]))
    if not store.check([f"confirmed/{own}/{rank}" for rank in others]):
        return None
    store.set(f"complete/{own}", "")
    return own


def _confirm(store: dist.Store, own: str, rank: int, size: int) -> str | None:
    if not store.check(["starts"]):
        return None
    starts = store.get("starts").decode().split(",")
    if len(starts) != size or starts[rank] != own:
        return None
    store.set(f"confirmed/{starts[0]}/{rank}", "")
    return starts[0] if store.check([f"complete/{starts[0]}"]) else None
