"""Time that a rank computes for a batch, as a function of the batch size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import NormalDist

from launch.bench.verdict import HOST_BOUND


@dataclass(frozen=True)
class StepTimes:
    """Seconds of forward pass, backward pass and update of one rank, without communication and input."""

    points: tuple[tuple[int, float], ...]
    """Measured (images, seconds), in ascending order of images; at least one."""
    launch: float = 0.0
    """Seconds that the host takes to launch the kernels of a step, at any batch size; 0: unknown, as on CPUs."""

    @classmethod
    def of(cls, points: Iterable[tuple[int, float]], *, launch: float = 0.0) -> StepTimes:
        """Sort the points; of several with the same batch size, keep the fastest."""
        fastest: dict[int, float] = {}
        for images, seconds in points:
            fastest[images] = min(seconds, fastest.get(images, seconds))
        return cls(tuple(sorted(fastest.items())), launch)

    def seconds(self, images: float) -> float:
        """Return the time of the device for a batch: linear between the measured points.

        Outside of them it continues the line through the nearest two, at least in proportion to the batch size below
        the smallest point. With one point it is in proportion to the batch size.
        """
        if len(self.points) == 1:
            measured, seconds = self.points[0]
            return seconds * images / measured
        low, high = next((pair for pair in pairwise(self.points) if images <= pair[1][0]), self.points[-2:])
        slope = max(0.0, (high[1] - low[1]) / (high[0] - low[0]))
        seconds = low[1] + slope * (images - low[0])
        if images < self.points[0][0]:
            return max(seconds, self.points[0][1] * images / self.points[0][0])
        return seconds

    def launch_bound(self, images: int) -> bool:
        """Return whether the time for a batch is that of launching it, not that of computing it.

        With only one point this is not known: the host also takes as long as the device if it waits because the queue
        of launched kernels is full.
        """
        return len(self.points) > 1 and self.launch >= HOST_BOUND * self.seconds(images)

    def at_size(self, size: int, measured_size: int) -> StepTimes:
        """Return the times for another image size: those of the device are in proportion to the number of pixels."""
        factor = (size / measured_size) ** 2
        return replace(self, points=tuple((images, seconds * factor) for images, seconds in self.points))


def slowest_of(ranks: int, jitter: float) -> float:
    """Return the expected computing time of the slowest rank, relative to the mean of all.

    The times are assumed to be independent and normal with the standard deviation `jitter`. The expected maximum of n
    standard normal values is approximated by the quantile (n - 0.375) / (n + 0.25) (Blom 1958), within 5 %.
    """
    return 1 + jitter * NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))
