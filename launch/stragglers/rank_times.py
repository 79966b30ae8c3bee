"""Collect what a rank contributes to the comparison of all ranks, and compare them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple

from launch.machine.affinity import pci_address
from launch.machine.world import World
from launch.stragglers.collective_wait import CollectiveWait
from launch.stragglers.detection import (
    NAMES,
    THRESHOLD,
    WINDOW_SECONDS,
    RankInterval,
    Slowest,
    StragglerDetector,
    from_numbers,
)
from launch.stragglers.gpu_speed import GpuSpeed
from launch.stragglers.local_causes import LocalObserver

SAMPLES_IN_WINDOW = 12  # of the kernel's counters


class RankTimes:
    """The times of this rank's intervals, and the comparison with those of other ranks. Needs no collective of its own.

    Args:
        hosts: host of each rank.
        waits: measures the collectives of this rank's steps.
        window: seconds over which ranks are compared.
    """

    def __init__(
        self, world: World, hosts: Sequence[str], waits: CollectiveWait, *, window: float = WINDOW_SECONDS
    ) -> None:
        self._rank, self._size, self._waits = world.rank, world.size, waits
        self._detector = StragglerDetector(hosts, incomplete=waits.incomplete, window=window)
        gpu = pci_address(world.device, domain_digits=8) if world.device.type == "cuda" else ""
        self._observer = LocalObserver(gpu, sample_seconds=window / SAMPLES_IN_WINDOW)
        self._speed = GpuSpeed(world.device)

    @property
    def numbers(self) -> int:
        """Number of values that all ranks exchange together."""
        return self._size * len(NAMES)

    @property
    def slowest(self) -> Slowest | None:
        """The slowest rank of the last minute; None: not measured yet."""
        return self._detector.slowest

    def close(self) -> None:
        self._observer.close()

    def restart(self) -> None:
        """Begin a new interval."""
        self._waits.restart()

    def end_step(self) -> None:
        """Measure the speed of the GPU if that is due. Call this between steps; it does not wait for the device."""
        self._speed.measure()

    def exchanged(self, seconds: float, data: float) -> list[float]:
        """Return the values that this rank adds to those of all ranks, which are 0 for the other ranks.

        Args:
            seconds: duration of the interval.
            data: seconds of waiting for data.
        """
        local = self._observer.take()
        interval = RankInterval(
            seconds=seconds,
            data=min(data, seconds),
            communication=min(self._waits.seconds(), seconds),
            idle=min(self._waits.idle_seconds(), seconds),
            **vars(local),
            gpu_milliseconds=self._speed.take(),
        )
        before = [0.0] * (self._rank * len(NAMES))
        after = [0.0] * ((self._size - self._rank - 1) * len(NAMES))
        return [*before, *astuple(interval), *after]

    def compare(self, values: Sequence[float], *, first: bool) -> tuple[RankInterval, list[str]]:
        """Compare the ranks of an interval; return that of this rank, and messages for the log.

        Args:
            values: the sums of `exchanged` over all ranks.
            first: the interval includes the first step, whose preparation differs between ranks; it is not compared.
        """
        ranks = from_numbers(values)
        messages = [] if first else self._detector.add(ranks)
        slowest = self._detector.slowest
        if slowest is not None and slowest.rank == self._rank and slowest.behind > THRESHOLD:
            self._observer.measure_clock()
        return ranks[self._rank], messages
