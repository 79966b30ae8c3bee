"""Differences of the hosts' clocks, from messages between their ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from launch.doctor.measurements.channel import Channel

ROUNDS = 10


class ClockOffset(NamedTuple):
    """Seconds by which a clock is ahead of that of rank 0, and the largest error of this estimate."""

    offset: float
    error: float


def measure_clocks(channel: Channel, *, clock: Callable[[], int] = time.time_ns) -> list[ClockOffset]:
    """Return the offset of every rank's clock. Collective.

    Args:
        clock: returns this host's time in nanoseconds.
    """
    if channel.world.size == 1:
        return [ClockOffset(0.0, 0.0)]
    sent, received = [], []
    for _ in range(ROUNDS):
        sent.append(clock())
        channel.gather_number(sent[-1])
        received.append(clock())
    times = channel.gather((sent, received))
    return clock_offsets([sent for sent, _ in times], [received for _, received in times])


def clock_offsets(sent: Sequence[Sequence[int]], received: Sequence[Sequence[int]]) -> list[ClockOffset]:
    """Estimate the offsets of clocks, as NTP does, but from an all-gather that all ranks take part in.

    When a rank has received everything, rank 0 has sent, and vice versa. In each round this bounds the offset between
    `sent - rank 0's received` and `received - rank 0's sent`. The tightest bounds, those of the shortest delays, give
    the estimate: their midpoint.

    Args:
        sent: nanoseconds of each rank's clock before each round, [ranks][rounds].
        received: nanoseconds of each rank's clock after each round.
    """
    offsets = []
    for own_sent, own_received in zip(sent, received, strict=True):
        low = max(own - reference for own, reference in zip(own_sent, received[0], strict=True))
        high = min(own - reference for own, reference in zip(own_received, sent[0], strict=True))
        offsets.append(ClockOffset((low + high) / 2e9, abs(high - low) / 2e9))
    return [ClockOffset(0.0, 0.0), *offsets[1:]]
