"""State of each rank when training hangs: describe the ranks at fault, and choose the hosts to exclude."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from shards.schema import Count, Digest, Finite

MAX_RANKS_IN_MESSAGE = 16


@dataclass(frozen=True)
class Beat:
    """Content of RUN/heartbeat/rank-N."""

    start: Digest
    """Random id of this start of the run; files of earlier starts are ignored."""
    time: Finite
    """Time of the heartbeat by the clock of the rank's host, for readers of the file and to distinguish heartbeats."""
    step: Count
    """Optimizer steps done."""
    idle: Annotated[Finite, Field(ge=0)]
    """Seconds since the last progress, by the monotonic clock of the rank's host."""
    host: Annotated[str, Field(max_length=255)]
    pid: Count
    stacks: bool
    """Whether the rank has written its stack traces on request."""
    reaches_rank0: bool | None
    """Whether the rank could connect to the host of rank 0 when it wrote its stack traces; None: not tried."""
    ended: bool
    """Whether this is the last heartbeat: the training loop has ended, or the watchdog is ending the process."""


@dataclass(frozen=True)
class RankStatus:
    """State of one rank, derived from its heartbeats (launch/resilience/heartbeat.py)."""

    rank: int
    host: str
    beat: Beat | None
    """Last heartbeat of the rank; None: no heartbeat could be read."""
    silent_seconds: float = 0.0
    """Seconds without a new heartbeat; 0: one appeared, the rank has ended, or the rank was not watched long enough."""

    @property
    def disconnected(self) -> bool:
        """Whether the rank is alive but cannot connect to the host of rank 0."""
        return not self.silent_seconds and self.beat is not None and self.beat.reaches_rank0 is False

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}" + ("" if self.beat is None else f" (process {self.beat.pid})")


def describe_failure(ranks: Sequence[RankStatus], own: int, step: int) -> str:
    """Describe in one line which ranks are silent, disconnected, behind or ahead.

    Args:
        own: rank of the caller.
        step: optimizer steps that the caller has done.
    """
    silent, disconnected, behind, ahead = [], [], [], []
    for status in ranks:
        if status.disconnected:
            disconnected.append(str(status))
        if status.silent_seconds:
            last = "no heartbeat at all" if status.beat is None else f"last at step {status.beat.step}"
            silent.append(f"{status}, {last}")
        elif status.rank == own or status.beat is None:
            continue
        elif status.beat.step < step:
            behind.append(f"{status}, at step {status.beat.step} for {status.beat.idle:.0f} s")
        elif status.beat.step > step:
            ahead.append(f"{status}, at step {status.beat.step}")
    seconds = max(status.silent_seconds for status in ranks)
    parts = [
        f"no heartbeat for {seconds:.0f} s from: {_shortened(silent)}" if silent else "",
        f"no connection to the host of rank 0 from: {_shortened(disconnected)}" if disconnected else "",
        f"behind: {_shortened(behind)}" if behind else "",
        f"ahead: {_shortened(ahead)}" if ahead else "",
    ]
    return "; ".join(filter(None, parts)) or (
        f"all other ranks are alive and also at step {step}: a collective, the network or a file system hangs"
    )


def _shortened(names: Sequence[str]) -> str:
    more = len(names) - MAX_RANKS_IN_MESSAGE
    return "; ".join(names[:MAX_RANKS_IN_MESSAGE]) + (f" and {more} more" if more > 0 else "")


def failing_hosts(ranks: Sequence[RankStatus]) -> list[str]:
    """Return the hosts that the next start should exclude.

    These are the hosts without a live rank, provided that they are at most half of the hosts other than this one;
    otherwise this host may be the one at fault. If every host has a live rank, they are the hosts that cannot connect
    to the host of rank 0, provided that they are at most half of the hosts other than that one. If there are several
    other hosts and none of them can connect to the host of rank 0, it is the one to exclude.
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
