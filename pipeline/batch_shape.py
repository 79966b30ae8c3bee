"""The division of a global batch into ranks and micro-batches, and the checks of these sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shards.errors import UserError


class PlanError(UserError):
    """The sizes of a plan do not fit together: global batch, world size, micro-batch, lanes or number of samples."""


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """The division of a global batch into ranks and micro-batches.

    Each rank owns a contiguous range of rows of every global batch, and each of its micro-batches a contiguous part of
    that range.

    Raises:
        PlanError: the sizes do not divide each other; the message names the nearest sizes that do.
    """

    global_batch: int
    """Samples per optimizer step, over all ranks."""
    world: int = 1
    """World size: the number of ranks."""
    rank: int = 0
    """Number of this rank, 0 to `world` - 1."""
    micro_batch: int | None = None
    """Rows per forward pass of a rank. None: all rows of the rank."""
    pairs: bool = False
    """Whether rows are mixed in pairs (mixup or CutMix): rows 2i and 2i+1 must be in the same micro-batch."""

    def __post_init__(self) -> None:
        unit = 2 if self.pairs else 1
        if self.global_batch < unit or self.global_batch % unit:
            multiple = _batch_unit(self.world, self.micro_batch, self.pairs)
            below = max(self.global_batch // multiple, 1) * multiple
            rule = "must be even, because mixup and CutMix mix rows in pairs" if self.pairs else "must be at least 1"
            raise PlanError(f"global batch {self.global_batch}: {rule}; the nearest valid size: {below}")
        if not 0 <= self.rank < self.world:
            raise PlanError(f"rank {self.rank} is out of range for a world size of {self.world}")
        if self.global_batch % (self.world * unit):
            micro = self.micro_batch or 1
            fits = [world for world in divisors(self.global_batch // unit) if self.global_batch % (world * micro) == 0]
            raise PlanError(
                f"world size {self.world} does not divide the global batch of {self.global_batch}"
                f"{' into pairs' if self.pairs else ''}; the nearest world sizes that do: {nearest(self.world, fits)}"
            )
        if self.micro_rows < unit or self.rank_rows % self.micro_rows or self.micro_rows % unit:
            fits = [unit * divisor for divisor in divisors(self.rank_rows // unit)]
            raise PlanError(
                f"micro-batch {self.micro_rows} does not divide the {self.rank_rows} rows of a rank"
                f"{' into pairs' if self.pairs else ''}; the nearest that do: {nearest(self.micro_rows, fits)}"
            )

    @property
    def rank_rows(self) -> int:
        """Rows of this rank in every global batch."""
        return self.global_batch // self.world

    @property
    def micro_rows(self) -> int:
        """Rows of a micro-batch."""
        return self.rank_rows if self.micro_batch is None else self.micro_batch

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step (gradient accumulation)."""
        return self.rank_rows // self.micro_rows

    def rows(self, micro: int) -> range:
        """Return the rows of the global batch that form this rank's micro-batch number `micro`, counted from 0."""
        start = self.rank * self.rank_rows + micro * self.micro_rows
        return range(start, start + self.micro_rows)


def check_enough_samples(
    samples: int,
    global_batch: int,
    *,
    world: int = 1,
    micro_batch: int | None = None,
    lanes: int | None = None,
    pairs: bool = False,
) -> None:
    """Raise PlanError if a training split has fewer samples than one global batch.

    A lane is one of L contiguous streams that every batch interleaves, so the number of lanes must divide the batch.

    Args:
        samples: number of samples of the split.
        global_batch, world, micro_batch, lanes, pairs: see `BatchShape` and `TrainPlan`.

    Raises:
        PlanError: the message names the largest global batch that is compatible with all arguments.
    """
    if samples >= global_batch:
        return
    fact = f"{samples} training images are fewer than one global batch of {global_batch}"
    unit = math.lcm(_batch_unit(world, micro_batch, pairs), (lanes or 1) * (2 if pairs else 1))
    if samples < unit:
        raise PlanError(
            f"{fact}; with these ranks, micro-batch, pairs and lanes it must be a multiple of {unit}, so use more "
            "images, fewer ranks, a smaller --micro-batch or fewer --lanes"
        )
    multiple = f" (a multiple of {unit})" if unit > 1 else ""
    raise PlanError(f"{fact}; use a global batch of at most {samples // unit * unit}{multiple}")


def _batch_unit(world: int, micro_batch: int | None, pairs: bool) -> int:
    """Return the number that a global batch must be a multiple of."""
    unit = 2 if pairs else 1
    return world * (micro_batch if micro_batch and micro_batch % unit == 0 else unit)


def divisors(number: int) -> list[int]:
    """Return all divisors of a number, in ascending order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def nearest(wanted: int, fits: list[int]) -> str:
    """Return the largest of `fits` below `wanted` and the smallest above it, as text for a message."""
    below = [f for f in fits if f < wanted][-1:]
    above = [f for f in fits if f > wanted][:1]
    return " and ".join(str(f) for f in below + above) or "none"
