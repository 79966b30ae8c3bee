"""How a global batch is divided among ranks and micro-batches, and the checks of these sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shards.errors import UserError


class PlanError(UserError):
    """Sizes that do not fit together: global batch, world size, micro-batch, lanes, samples."""


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """How a global batch is dealt out to ranks and micro-batches.

    Raises:
        PlanError: the sizes do not divide; the message names the nearest that do.
    """

    global_batch: int
    world: int = 1
    rank: int = 0
    micro_batch: int | None = None
    """Rows per forward pass; None = all rows of the rank at once."""
    pairs: bool = False
    """Mixup or cutmix is on: rows come in pairs (2i, 2i+1) that must not be torn apart."""

    def __post_init__(self) -> None:
        unit = 2 if self.pairs else 1
        if self.global_batch < unit or self.global_batch % unit:
            granule = _granule(self.world, self.micro_batch, self.pairs)
            below = max(self.global_batch // granule, 1) * granule
            raise PlanError(
                f"global batch {self.global_batch}: "
                + ("mixup and cutmix pair rows, so it must be even" if self.pairs else "must be at least 1")
                + f"; the nearest that fits: {below}"
            )
        if not 0 <= self.rank < self.world:
            raise PlanError(f"rank {self.rank} does not exist in a world of {self.world}")
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
        return self.global_batch // self.world

    @property
    def micro_rows(self) -> int:
        return self.rank_rows if self.micro_batch is None else self.micro_batch

    @property
    def accumulation(self) -> int:
        """Micro-batches per step."""
        return self.rank_rows // self.micro_rows

    def rows(self, micro: int) -> range:
        """Rows of the global batch that make up this rank's micro-batch number `micro`."""
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
    """Compare the training split with a global batch; arguments as of `BatchShape` and `TrainPlan`.

    Raises:
        PlanError: fewer samples than one global batch; the message names the largest that fits all of the arguments.
    """
    if samples >= global_batch:
        return
    fact = f"{samples} training images are fewer than one global batch of {global_batch}"
    granule = math.lcm(_granule(world, micro_batch, pairs), (lanes or 1) * (2 if pairs else 1))
    if samples < granule:
        raise PlanError(
            f"{fact}; ranks, micro-batch, pairs and lanes take a multiple of {granule}, so use more images, or fewer "
            "ranks, a smaller --micro-batch or fewer --lanes"
        )
    multiple = f" (a multiple of {granule})" if granule > 1 else ""
    raise PlanError(f"{fact}; use a global batch of at most {samples // granule * granule}{multiple}")


def _granule(world: int, micro_batch: int | None, pairs: bool) -> int:
    """What a global batch must be a multiple of."""
    unit = 2 if pairs else 1
    return world * (micro_batch if micro_batch and micro_batch % unit == 0 else unit)


def divisors(number: int) -> list[int]:
    """All divisors, in order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def nearest(wanted: int, fits: list[int]) -> str:
    """The largest fit below and the smallest above `wanted`, as text."""
    below = [f for f in fits if f < wanted][-1:]
    above = [f for f in fits if f > wanted][:1]
    return " and ".join(str(f) for f in below + above) or "none"
