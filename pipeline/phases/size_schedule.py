"""The size schedule of progressive resizing: the side of training images as a function of the optimizer step."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from shards.errors import UserError
from shards.ranges import MAX_BATCH

GRID = 32
"""Sizes are multiples of this number of pixels, the factor by which FAT downsamples images."""
MAX_SIZE = 8192
MAX_POINTS = 100
EXAMPLE = "0:128,65:192,85:224"
_POINT = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(e?):(\d{1,5})", re.ASCII)
_MICRO_BATCH = re.compile(r"(\d{1,5}):(\d{1,7})", re.ASCII)


@dataclass(frozen=True)
class SizePoint:
    """A point of a size schedule: at this position, images have this size."""

    position: Fraction
    """Percentage of the training, 0 to 100, or number of epochs."""
    epochs: bool
    """Whether the position is a number of epochs."""
    size: int
    """Side of the images in pixels."""

    def __str__(self) -> str:
        # All digits: a run must not resume with a schedule that differs in the last ones. A point has at most 18.
        position = Decimal(self.position.numerator) / Decimal(self.position.denominator)
        return f"{position:f}{'e' if self.epochs else ''}:{self.size}"


@dataclass(frozen=True)
class SizeSchedule:
    """Points between which the size is interpolated linearly, then rounded to the nearest multiple of 32.

    Before the first point, images have the first size, and after the last point the last. A value halfway between two
    multiples is rounded up. Two points at the same position are a jump: from this position on, the second one holds.
    """

    points: tuple[SizePoint, ...]

    @classmethod
    def parse(cls, text: str) -> SizeSchedule:
        """Parse POSITION:SIZE[,POSITION:SIZE...], for instance `0:128,65:192,85:224`, `0e:128,16e:192`.

        Args:
            text: a position is a percentage of the training, or a number of epochs followed by `e`.

        Raises:
            UserError: a point is invalid, or the points are not in ascending order; the message names it.
        """
        points: list[SizePoint] = []
        for part in text.split(","):
            match = _POINT.fullmatch(part.strip())
            if match is None:
                raise UserError(
                    f"size schedule {_short(text)}: {_short(part)} is not a point; expected POSITION:SIZE, separated "
                    f"by commas, such as {EXAMPLE}; a position is a percentage of the training, or 16e for 16 epochs"
                )
            point = SizePoint(Fraction(match[1]), bool(match[2]), int(match[3]))
            if point.size % GRID or not GRID <= point.size <= MAX_SIZE:
                raise UserError(
                    f"size schedule {_short(text)}: the size of {point} is not a multiple of {GRID} from {GRID} to "
                    f"{MAX_SIZE}; the nearest is {min(max(round_to_grid(Fraction(point.size)), GRID), MAX_SIZE)}"
                )
            if not point.epochs and point.position > 100:
                raise UserError(
                    f"size schedule {_short(text)}: the position of {point} is a percentage of the training, at most "
                    f"100; for a number of epochs write {float(point.position):g}e:{point.size}"
                )
            if points and points[-1].epochs == point.epochs and points[-1].position > point.position:
                raise UserError(_not_ascending(text, points[-1], point))
            points.append(point)
        if len(points) > MAX_POINTS:
            raise UserError(f"size schedule {_short(text)}: {len(points)} points; expected at most {MAX_POINTS}")
        return cls(tuple(points))

    def __str__(self) -> str:
        return ",".join(map(str, self.points))

    @property
    def smallest(self) -> int:
        """Smallest size of the points, in pixels."""
        return min(point.size for point in self.points)

    @property
    def largest(self) -> int:
        """Largest size of the points, in pixels."""
        return max(point.size for point in self.points)

    @property
    def last(self) -> int:
        """Size of the last point, in pixels."""
        return self.points[-1].size

    def check_epochs(self, epochs: int | None) -> None:
        """Check that every point is within a training of this many epochs (None: without end), in ascending order.

        Raises:
            UserError: the message names the point.
        """
        self._positions(None if epochs is None else Fraction(epochs), Fraction(1))

    def sizes(self, total_steps: int | None, steps_per_epoch: int) -> list[tuple[int, int]]:
        """Return each size with its first step, in ascending order of the steps, which begin with 0.

        The result depends on nothing but the arguments, so all ranks and starts of a training agree on it.

        Args:
            total_steps: optimizer steps of all epochs. None: a training without end.
            steps_per_epoch: optimizer steps per epoch.

        Raises:
            UserError: a point is beyond the last epoch, or is a percentage of a training without end.
        """
        positions = self._positions(None if total_steps is None else Fraction(total_steps), Fraction(steps_per_epoch))
        sizes = [(0, self._size_at(0, positions))]
        for step in self._candidates(positions):
            size = self._size_at(step, positions)
            if size != sizes[-1][1] and (total_steps is None or step < total_steps):
                sizes.append((step, size))
        return sizes

    def strength(self, size: int, least: float) -> float:
        """Return the strength of the regularization at a size: `least` at the smallest, rising linearly to 1."""
        span = self.largest - self.smallest
        return 1.0 if not span else 1 - (1 - least) * (self.largest - size) / span  # exactly 1 at the largest

    def _positions(self, total: Fraction | None, epoch: Fraction) -> list[Fraction]:
        """Return the position of each point in the unit of `total` and `epoch`."""
        positions: list[Fraction] = []
        for number, point in enumerate(self.points):
            if not point.epochs and total is None:
                raise UserError(
                    f"size schedule {self}: {point} is a percentage of the training, whose number of epochs is not "
                    f"given; give it, or write positions in epochs, such as 16e:{point.size}"
                )
            position = point.position * epoch if point.epochs or total is None else point.position * total / 100
            if total is not None and position > total:
                raise UserError(
                    f"size schedule {self}: {point} is beyond the last of the {float(total / epoch):g} epochs"
                )
            if positions and positions[-1] > position:
                raise UserError(_not_ascending(str(self), self.points[number - 1], point))
            positions.append(position)
        return positions

    def _candidates(self, positions: list[Fraction]) -> list[int]:
        """Return the steps, from 1 on, at which the size may change: at points, and where it is rounded differently."""
        steps = {math.ceil(position) for position in positions}
        sizes = [point.size for point in self.points]
        for (start, first), (end, last) in zip(
            zip(positions, sizes, strict=True), zip(positions[1:], sizes[1:], strict=True), strict=False
        ):
            for border in range(min(first, last) + GRID // 2, max(first, last), GRID):
                step = start + (end - start) * Fraction(border - first, last - first)
                steps |= {math.ceil(step), math.floor(step) + 1}
        return sorted(step for step in steps if step > 0)

    def _size_at(self, step: int, positions: list[Fraction]) -> int:
        after = bisect_right(positions, step)
        if after == 0:
            return self.points[0].size
        if after == len(positions):
            return self.last
        start, end = positions[after - 1], positions[after]
        first, last = self.points[after - 1].size, self.points[after].size
        return round_to_grid(first + (last - first) * (step - start) / (end - start))


def round_to_grid(size: Fraction) -> int:
    """Round to the nearest multiple of 32; halfway between two, to the larger one."""
    return math.floor(size / GRID + Fraction(1, 2)) * GRID


def parse_micro_batches(text: str, schedule: SizeSchedule) -> Mapping[int, int]:
    """Parse SIZE:IMAGES[,SIZE:IMAGES...], for instance `128:256,192:128`, into the images per forward pass by size.

    Raises:
        UserError: an entry is invalid, or its size is not one that the schedule may have; the message names it.
    """
    micro_batches: dict[int, int] = {}
    for part in text.split(","):
        match = _MICRO_BATCH.fullmatch(part.strip())
        size, images = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= images <= MAX_BATCH:
            raise UserError(
                f"micro-batch schedule {_short(text)}: {_short(part)} is not an entry; expected SIZE:IMAGES, separated "
                "by commas, such as 128:256,192:128"
            )
        if size % GRID or not schedule.smallest <= size <= schedule.largest:
            raise UserError(
                f"micro-batch schedule {_short(text)}: images never have {size} pixels; expected multiples of {GRID} "
                f"from {schedule.smallest} to {schedule.largest}, as in the size schedule"
            )
        if size in micro_batches:
            raise UserError(f"micro-batch schedule {_short(text)}: the size {size} occurs twice")
        micro_batches[size] = images
    return micro_batches


def _not_ascending(text: str, before: SizePoint, point: SizePoint) -> str:
    return f"size schedule {_short(text)}: {point} is before {before}; write the points in ascending order"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}...")
