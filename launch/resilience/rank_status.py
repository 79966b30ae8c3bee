"""State of each rank when training hangs: describe which ranks are at fault, and choose the hosts to leave out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_RANKS_IN_MESSAGE = 16


@dataclass(frozen=True)
class RankStatus:
    """State of a rank as its heartbeats show it (launch/resilience/heartbeat.py)."""

    rank: int
    host: str
    pid: int | None = None
    """Process id; None = no heartbeat could be read."""
    step: int | None = None
    """Optimizer steps done at its last heartbeat; None = no heartbeat could be read."""
    idle_seconds: float = 0.0
    """Seconds without progress at its last heartbeat."""
    silent_seconds: float = 0.0
    """Seconds without a new heartbeat; 0 = one appeared, the rank has ended, or it was not watched for long enough."""
    disconnected: bool = False
    """Whether the rank is alive, but its host cannot connect to the host of rank 0."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}" + ("" if self.pid is None else f" (process {self.pid})")


def describe_failure(ranks: Sequence[RankStatus], own: int, step: int) -> str:
    """Describe in one line which ranks are silent, disconnected, behind or ahead.

    Args:
        own: rank of the caller.
        step: steps that it has done.
    """
    silent, disconnected, behind, ahead = [], [], [], []
    for status in ranks:
        if status.disconnected:
            disconnected.append(str(status))
        if status.silent_seconds:
            last = "no heartbeat at all" if status.step is None else f"last at step {status.step}"
            silent.append(f"{status}, {last}")
        elif status.rank == own or status.step is None:
            continue
        elif status.step < step:
            behind.append(f"{status}, at step {status.step} for {status.idle_seconds:.0f} s")
        elif status.step > step:
            ahead.append(f"{status}, at step {status.step}")
    seconds = max(status.silent_seconds for status in ranks)
    parts = [
        f"no heartbeat for {seconds:.0f} s from: {_shortened(silent)}" if silent else "",
        f"no connection to the host of rank 0 from: {_shortened(disconnected)}" if disconnected else "",
        f"behind: {_shortened(behind)}" if behind else "",
        f"ahead: {_shortened(ahead)}" if ahead else "",
    ]
    return "; ".join(filter(None, parts)) or (
        f"all other ranks are alive and at step {step} too: a collective, the network or a file system hangs"
    )


def _shortened(names: Sequence[str]) -> str:
    more = len(names) - MAX_RANKS_IN_MESSAGE
    return "; ".join(names[:MAX_RANKS_IN_MESSAGE]) + (f" and {more} more" if more > 0 else "")


def failing_hosts(ranks: Sequence[RankStatus]) -> list[str]:
    """Return the hosts that the next start should leave out.

    Hosts without a live rank, if they are at most half of the other hosts; otherwise this host may be at fault.
    Without any, hosts that do not reach the host of rank 0, if they are the minority; the host of rank 0, if no other
    host of several reaches it.
    """
    hosts = {status.host for status in ranks}
    silent = hosts - {status.host for status in ranks if not status.silent_seconds}
    if silent:
        return sorted(silent) if 2 * len(silent) <= len(hosts) - 1 else []
    disconnected = {status.host for status in ranks if status.disconnected}
    others = hosts - {ranks[0].host}
    if 2 * len(disconnected) <= len(others):
        return sorted(disconnected)
    return [ranks[0].host] if disconnected == others and len(others) > 1 else []
