"""Observe from within a rank's process why it may be slow: stopped, throttled, no free core, page faults, slow GPU.

A thread samples counters of the kernel. It never waits for the device or for other ranks.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from shards.cores import control_groups, cpu_counters

# Mean time between wake-ups of the thread, each of which costs up to 0.1 ms of CPU time. The times vary from half to
# one and a half of it, because a process that is stopped in regular pulses must not be stopped only while the thread
# would sleep anyway.
TICK_SECONDS = 0.1
GOLDEN_RATIO = 0.618034  # whose multiples modulo 1 are evenly distributed
SAMPLE_SECONDS = 5.0  # between readings of the counters, which take about 1 ms for 100 threads
# A thread that wakes up later than this was stopped, or could not run for another reason. The scheduler and the
# interpreter's lock (5 ms) alone delay it less.
LATE_SECONDS = 0.02
CLOCK_SECONDS = 60.0  # between calls of nvidia-smi, which are made only on a rank that is slow
CLOCK_TIMEOUT = 20.0
CLOSE_SECONDS = 2.0
K = TypeVar("K")
OWN_TASKS = "/proc/self/task"
SCHEDSTAT_BYTES = 128


@dataclass(frozen=True)
class LocalCauses:
    """What slowed a rank down, as fractions of the time, 0 to 1, unless stated otherwise."""

    stopped: float = 0.0
    """The process did not run although it could have: it was stopped, or a thread blocked Python's interpreter."""
    waiting_for_core: float = 0.0
    """The thread for which this is longest was ready to run, but its cores were busy."""
    throttled: float = 0.0
    """The CPU quota of a control group was exhausted."""
    page_faults: float = 0.0
    """Pages per second that were read from disk because memory is short."""
    clock: float = 0.0
    """Clock of the GPU in MHz; 0: not measured."""
    max_clock: float = 0.0
    """Highest clock of the GPU in MHz; 0: not measured."""


@dataclass(frozen=True)
class _Totals:
    """Seconds and pages since the start of the process or of the observer."""

    time: float
    stopped: float = 0.0
    waiting: float = 0.0
    throttled: float = 0.0
    faults: int = 0


class LocalObserver:
    """Thread that samples the counters of its own process and host.

    Args:
        gpu: identifier of the rank's GPU for `nvidia-smi --id`; empty: there is none.
        sample_seconds: time between readings of the counters.
    """

    def __init__(self, gpu: str = "", *, sample_seconds: float = SAMPLE_SECONDS) -> None:
        self._gpu, self._sample_seconds = gpu, sample_seconds
        self._stopped = 0.0
        self._clocks = 0.0, 0.0
        self._wants_clock = False
        self._clock_at = -CLOCK_SECONDS
        self._ended = False
        self._delays, self._uses = dict(delays()), dict(quota_uses())
        self._first = self._last = _Totals(time.monotonic(), faults=_page_faults())
        self._causes = LocalCauses()
        self._thread = threading.Thread(target=self._run, name="straggler-observer", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, but do not wait for nvidia-smi, which may be blocked in the driver."""
        self._ended = True
        self._thread.join(CLOSE_SECONDS)

    def take(self) -> LocalCauses:
        """Return the causes since the last call, as far as they have been sampled; the last ones if they have not."""
        first, last = self._first, self._last
        seconds = last.time - first.time
        if seconds > 0:
            self._first = last
            self._causes = LocalCauses(
                stopped=min(1.0, (last.stopped - first.stopped) / seconds),
                waiting_for_core=min(1.0, (last.waiting - first.waiting) / seconds),
                throttled=min(1.0, (last.throttled - first.throttled) / seconds),
                page_faults=(last.faults - first.faults) / seconds,
                clock=self._clocks[0],
                max_clock=self._clocks[1],
            )
        return self._causes

    def measure_clock(self) -> None:
        """Let the thread read the GPU's clock, at most once a minute. Call this on a slow rank only."""
        self._wants_clock = bool(self._gpu)

    def _run(self) -> None:
        with _OwnDelay() as own_delay:
            delay, now = own_delay.seconds(), time.monotonic()
            sample_at = now + self._sample_seconds
            for number in itertools.count():
                if self._ended:
                    return
                before, before_delay = now, delay
                tick = TICK_SECONDS * (0.5 + number * GOLDEN_RATIO % 1)
                time.sleep(tick)
                now, delay = time.monotonic(), own_delay.seconds()
                # Without the time that this thread waited for a core, which `waiting_for_core` contains.
                late = now - before - tick - (delay - before_delay)
                if late > LATE_SECONDS:
                    # A stop begins while the thread sleeps, on average in the middle, so it is longer than the delay.
                    self._stopped += late + min(late, tick / 2)
                if now < sample_at:
                    continue
                self._sample()
                if self._wants_clock and now - self._clock_at >= CLOCK_SECONDS:
                    self._clock_at, self._wants_clock = now, False
                    self._clocks = gpu_clocks(self._gpu)
                now, delay = time.monotonic(), own_delay.seconds()
                sample_at = now + self._sample_seconds

    def _sample(self) -> None:
        """Add what the counters have increased by. A thread or a control group may be new since the last sample."""
        before, self._delays, self._uses = (self._delays, self._uses), dict(delays()), dict(quota_uses())
        now = time.monotonic()
        throttled = (
            use.throttled_since(before[1][folder], now - self._last.time)
            for folder, use in self._uses.items()
            if folder in before[1]
        )
        self._last = _Totals(
            time=now,
            stopped=self._stopped,
            waiting=self._last.waiting + _largest_increase(before[0], self._delays),
            throttled=self._last.throttled + max(throttled, default=0.0),
            faults=_page_faults(),
        )


def gpu_clocks(gpu: str, run: Callable[..., str] = subprocess.check_output) -> tuple[float, float]:
    """Return the clock and the highest clock of a GPU in MHz; (0, 0) if they are unknown."""
    query = ["nvidia-smi", f"--id={gpu}", "--query-gpu=clocks.sm,clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        answer = run(query, text=True, timeout=CLOCK_TIMEOUT, stderr=subprocess.DEVNULL)
        clock, highest = (float(value) for value in answer.strip().split(","))
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0.0, 0.0
    return clock, highest


def _largest_increase(first: dict[K, float], last: dict[K, float]) -> float:
    """Return the largest increase of a counter that exists at both times."""
    return max((value - first[key] for key, value in last.items() if key in first), default=0.0)


def _page_faults() -> int:
    """Return how many pages of this process have been read from disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def delays() -> Iterator[tuple[str, float]]:
    """Yield the seconds for which each thread of this process was ready to run but had no core.

    Source: /proc/PID/schedstat, in the kernel's Documentation/scheduler/sched-stats.rst.
    """
    try:
        tasks = os.listdir(OWN_TASKS)
    except OSError:
        return
    for task in tasks:
        with contextlib.suppress(OSError, ValueError, IndexError):  # the thread has ended, or the kernel has no counter
            file = os.open(f"{OWN_TASKS}/{task}/schedstat", os.O_RDONLY)
            try:
                yield task, _delay_in(os.read(file, SCHEDSTAT_BYTES))
            finally:
                os.close(file)


class _OwnDelay:
    """The seconds for which the thread that created this object was ready to run but had no core; 0 if unknown."""

    def __enter__(self) -> _OwnDelay:
        try:
            self._file = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        except OSError:
            self._file = -1
        return self

    def __exit__(self, *_: object) -> None:
        if self._file >= 0:
            os.close(self._file)

    def seconds(self) -> float:
        try:
            return _delay_in(os.pread(self._file, SCHEDSTAT_BYTES, 0))
        except (OSError, ValueError, IndexError):
            return 0.0


def _delay_in(schedstat: bytes) -> float:
    return int(schedstat.split()[1]) / 1e9


class QuotaUse(NamedTuple):
    """Seconds since a control group exists, each the sum over all CPUs."""

    throttled: float
    """CPUs were not available to the group because its quota was exhausted."""
    used: float
    """CPU time of the group's processes; of this process only if the group has no such counter."""

    def throttled_since(self, earlier: QuotaUse, seconds: float) -> float:
        """Return the wall time for which a thread of the group was throttled, in an interval of `seconds`.

        The kernel adds up the times of all CPUs on which threads of the group wait. If they use some CPUs for a part of
        the interval, and wait on the same CPUs for the rest of it, the rest is throttled / (used + throttled).
        """
        throttled, used = self.throttled - earlier.throttled, self.used - earlier.used
        if throttled <= 0:
            return 0.0
        return min(throttled, seconds * throttled / (max(0.0, used) + throttled))


def quota_uses() -> Iterator[tuple[Path, QuotaUse]]:
    """Yield the use of each control group of this process.

    cpu.stat has `throttled_usec` and `usage_usec` (microseconds) in version 2 of control groups, `throttled_time`
    (nanoseconds) in version 1. Source: the kernel's Documentation/admin-guide/cgroup-v2.rst, scheduler/sched-bwc.rst
    and kernel/sched/fair.c (throttled_time).
    """
    for folder in control_groups():
        with contextlib.suppress(OSError, ValueError):
            found = cpu_counters(folder)
            used = found["usage_usec"] / 1e6 if "usage_usec" in found else time.process_time()
            if "throttled_usec" in found:
                yield folder, QuotaUse(found["throttled_usec"] / 1e6, used)
            elif "throttled_time" in found:
                yield folder, QuotaUse(found["throttled_time"] / 1e9, used)
