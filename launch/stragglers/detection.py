"""Find the rank that holds the others back, from the times of all ranks, and name the cause.

The time of an interval is the same for all ranks. A rank's own work is this time without its waits in collectives. The
slowest rank is the one whose own work takes longest, in comparison with the median of the other ranks.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from launch.stragglers.causes import Cause, find_cause
from launch.stragglers.local_causes import LocalCauses

WINDOW_SECONDS = 60.0
THRESHOLD = 0.2  # of additional own work, above which a rank holds the others back
END_THRESHOLD = 0.1  # below which it no longer does
# A rank whose delay costs less than this fraction of the step time is not reported: it may be 20 % slower in a step
# that consists almost only of communication.
LEAST_COST = 0.05
BUCKETS = 4  # parts of the window, in all of which a rank must be slow: a single slow interval is no reason to warn
NAMED = 8  # ranks that a message lists
SMALL_WORLD = 8  # ranks up to which a rank itself is excluded from the median


@dataclass(frozen=True, kw_only=True)
class RankInterval(LocalCauses):
    """What a rank measured in an interval. All ranks exchange these numbers, in the order of `NAMES`."""

    seconds: float
    """Duration of the interval on this rank."""
    data: float
    """Seconds of waiting for data."""
    communication: float
    """Seconds in collectives, without those that were hidden by computation."""
    idle: float = 0.0
    """Seconds that the device was idle before steps."""
    gpu_milliseconds: float = 0.0
    """Time of a fixed amount of work on the GPU (`GpuSpeed`); 0: not measured."""


NAMES = tuple(field.name for field in fields(RankInterval))
_TIMES = ("seconds", "data", "communication", "idle")
_LATEST = ("clock", "max_clock", "gpu_milliseconds")
Column = NDArray[np.float64]


@dataclass(frozen=True)
class Slowest:
    """The slowest rank of the last minute."""

    rank: int
    host: str
    behind: float
    """By what fraction its own work takes longer than that of the median of the other ranks."""
    cost: float
    """Fraction of the step time that would be saved if it were as fast as the others."""
    cause: Cause | None
    """Why it holds the others back; None: it does not, or not yet for a minute."""


class _Sums:
    """Sums over intervals: a column of ranks for every name of `RankInterval`. Rates are multiplied by the seconds."""

    def __init__(self, columns: dict[str, Column]) -> None:
        self.columns = columns

    @classmethod
    def of(cls, ranks: Sequence[RankInterval]) -> _Sums:
        table = {name: np.array([getattr(rank, name) for rank in ranks], dtype=np.float64) for name in NAMES}
        for name in NAMES:
            if name not in (*_TIMES, *_LATEST):
                table[name] = table[name] * table["seconds"]
        return cls(table)

    def __add__(self, later: _Sums) -> _Sums:
        return _Sums(
            {name: later.columns[name] + (0 if name in _LATEST else self.columns[name]) for name in self.columns}
        )

    @property
    def seconds(self) -> float:
        return float(self.columns["seconds"].max())

    def means(self) -> dict[str, Column]:
        """Return fractions of the time and other means."""
        seconds = np.maximum(self.columns["seconds"], 1e-9)
        return {name: column if name in _LATEST else column / seconds for name, column in self.columns.items()}


class StragglerDetector:
    """Finds the slowest rank over the last minute, and says when a rank begins and ends to hold the others back.

    Args:
        hosts: host of each rank.
        incomplete: see `CollectiveWait`. The own work of a rank is then estimated.
        window: seconds over which ranks are compared.
    """

    def __init__(self, hosts: Sequence[str], *, incomplete: bool = False, window: float = WINDOW_SECONDS) -> None:
        self._hosts, self._incomplete, self._window = tuple(hosts), incomplete, window
        self._buckets: collections.deque[_Sums] = collections.deque()
        self._open: _Sums | None = None
        self.slowest: Slowest | None = None
        """The slowest rank of the last minute; None: not measured yet."""
        self.stragglers: frozenset[int] = frozenset()
        """Ranks that hold the others back."""

    def add(self, ranks: Sequence[RankInterval]) -> list[str]:
        """Add an interval, as measured by each rank; return messages for the log."""
        interval = _Sums.of(ranks)
        self._open = interval if self._open is None else self._open + interval
        complete = self._open.seconds >= self._window / BUCKETS and self._close_bucket()
        sums = _sum([*self._buckets, *([] if self._open is None else [self._open])])
        messages = self._compare(sums) if complete else []
        self.slowest = self._describe(sums, int(own_work(sums.means(), incomplete=self._incomplete).argmax()))
        return messages

    def _close_bucket(self) -> bool:
        """Begin a new part of the window, drop parts that are too old, and return whether the window is complete."""
        assert self._open is not None
        self._buckets.append(self._open)
        self._open = None
        total = sum(bucket.seconds for bucket in self._buckets)
        while len(self._buckets) > 2 and total - self._buckets[0].seconds >= self._window:
            total -= self._buckets.popleft().seconds
        return total >= self._window and len(self._buckets) >= 2

    def _compare(self, sums: _Sums) -> list[str]:
        """Return messages about the ranks that begin and end to hold the others back."""
        behind, cost = self._delays(sums)
        slow = (behind > THRESHOLD) & (cost > LEAST_COST)
        for bucket in self._buckets:
            slow &= self._delays(bucket)[0] > THRESHOLD
        new = frozenset(np.flatnonzero(slow).tolist()) - self.stragglers
        recovered = (behind < END_THRESHOLD) | (cost < LEAST_COST / 2)
        ended = [rank for rank in sorted(self.stragglers) if recovered[rank]]
        self.stragglers = (self.stragglers | new) - frozenset(ended)
        messages = []
        if new:
            worst = max(new, key=lambda rank: float(behind[rank]))
            messages.append(self._warning(self._describe(sums, worst), sorted(new - {worst})))
        if ended:
            messages.append(f"{self._names(ended)}: no longer behind the other ranks")
        return messages

    def _warning(self, slowest: Slowest, others: Sequence[int]) -> str:
        cause, also = slowest.cause, f"; also behind: {self._names(others)}" if others else ""
        assert cause is not None
        return (
            f"warning: rank {slowest.rank} on {slowest.host} holds the other ranks back: its own work takes "
            f"{slowest.behind:.0%} longer than theirs, so steps take {slowest.cost / (1 - slowest.cost):.0%} longer; "
            f"cause: {cause.name}: {cause.fact}{also}; {cause.remedy}; before the next start, measure the hosts with "
            f"'pipeline doctor', or exclude this one (SLURM: --exclude={slowest.host})"
        )

    def _names(self, ranks: Sequence[int]) -> str:
        names = [f"rank {rank} on {self._hosts[rank]}" for rank in ranks[:NAMED]]
        return ", ".join(names) + (f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else "")

    def _delays(self, sums: _Sums) -> tuple[Column, Column]:
        """Return for each rank by what fraction its own work is longer than that of others, and what that costs."""
        own = own_work(sums.means(), incomplete=self._incomplete)
        others = medians_of_others(own)
        return own / others - 1, np.clip(own - others, 0, 0.99)

    def _describe(self, sums: _Sums, rank: int) -> Slowest:
        behind, cost = (float(column[rank]) for column in self._delays(sums))
        cause = find_cause(sums.means(), rank, cost) if rank in self.stragglers else None
        return Slowest(rank, self._hosts[rank], behind, cost, cause)


def own_work(means: dict[str, Column], *, incomplete: bool) -> Column:
    """Return the own work of each rank as a fraction of the time.

    If some collectives were not measured, waits in them look like computation. The rank that seems to compute least is
    then the one that waits least, so that its computation is that of every rank, except for a different speed of GPUs.
    """
    if incomplete:
        waiting = np.maximum(means["data"], means["idle"])
        probe = means["gpu_milliseconds"]
        slowness = probe / np.median(probe) if probe.all() else np.ones_like(probe)
        rest = np.maximum(1 - means["communication"] - waiting, 0)
        own = waiting + (rest / slowness).min() * slowness
    else:
        own = 1 - means["communication"]
    return np.asarray(np.maximum(own, 0.01))  # a rank cannot train without work


def medians_of_others(column: Column) -> Column:
    """Return for each rank the median over the other ranks; over all ranks if there are many.

    It is the lower median, so that all ranks of one of two hosts can be slow.
    """
    if len(column) > SMALL_WORLD:
        return np.full_like(column, np.sort(column)[(len(column) - 1) // 2])
    return np.array([np.median(np.delete(column, rank)) for rank in range(len(column))])


def _sum(sums: Iterable[_Sums]) -> _Sums:
    first, *rest = sums
    for later in rest:
        first = first + later
    return first


def from_numbers(numbers: Sequence[float]) -> list[RankInterval]:
    """Return the intervals of all ranks from the numbers that they have exchanged."""
    count = len(NAMES)
    parts = (numbers[start : start + count] for start in range(0, len(numbers), count))
    return [RankInterval(**dict(zip(NAMES, part, strict=True))) for part in parts]
