"""The plan: which sample stands at which row of which global batch. Pure arithmetic: no files, no torch, no globals.

An epoch's order is made in three moves, each from hashed keys (`pipeline.rng`):

1. the shards are permuted, and the stream of their samples is rotated by a hashed offset, so that the N mod G samples
   that an epoch leaves out are others every time;
2. the stream is cut into `lanes` equal contiguous segments; global batch s takes the next G/lanes samples (its *share*)
   of each lane, so every batch mixes samples from all over the set while each lane reads its shards nearly in order;
3. inside a lane, samples are permuted within shuffle blocks of `shuffle_block_size` samples.

The rows of a global batch are lane-major and rank r of R owns rows [r G/R, (r+1) G/R): the global batch does
not depend on R. Finding any position costs O(lanes of the rank x block), never O(samples).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.batch_shape import PlanError, check_enough_samples, divisors, nearest
from pipeline.rng import Stream, bits

Ids = NDArray[np.int64]

MAX_LANES = 64
DEFAULT_SHUFFLE_BLOCK_SIZE = 4096
NO_SAMPLE = -1


class Position(NamedTuple):
    """A place in training: `step` global batches of `epoch` lie behind it. Positions compare in training order."""

    epoch: int
    step: int


class ShardRequest(NamedTuple):
    """Shards that are read from one step to another, both included; steps are counted from the start."""

    first: int
    last: int
    shards: list[int]


def default_lanes(global_batch: int) -> int:
    """The largest divisor of half the global batch (of all of it when odd) up to 64: 1024 -> 64, 96 -> 48."""
    base = global_batch // 2 if global_batch % 2 == 0 else global_batch
    return max((d for d in range(2, min(base, MAX_LANES) + 1) if base % d == 0), default=1)


@dataclass(frozen=True)
class _EpochOrder:
    """The permuted, rotated stream of one epoch."""

    shards: Ids  # [shards] permuted
    stream_start: Ids  # [shards] where each permuted shard begins in the unrotated stream
    first_id: Ids  # [shards] id of the first sample of each permuted shard
    offset: int


class TrainPlan:
    """The order of all global batches of all epochs.

    Args:
        shard_samples: samples of each shard, in the order of the manifest.
        global_batch: rows of a global batch (G).
        seed: of the run.
        lanes: parallel contiguous segments; divides G. None = `default_lanes(G)`, a function of G alone.
        shuffle_block_size: samples among which a lane shuffles. Larger mixes better and reads less in order.
        pairs: mixup or cutmix is on: each lane's share must be even.

    Raises:
        PlanError: fewer samples than one global batch, or sizes that do not divide.
    """

    def __init__(
        self,
        shard_samples: NDArray[np.integer] | list[int],
        *,
        global_batch: int,
        seed: int,
        lanes: int | None = None,
        shuffle_block_size: int = DEFAULT_SHUFFLE_BLOCK_SIZE,
        pairs: bool = False,
    ) -> None:
        counts = np.asarray(shard_samples, dtype=np.int64)
        self.samples = int(counts.sum())
        self.global_batch = global_batch
        self.seed = seed
        self.lanes = default_lanes(global_batch) if lanes is None else lanes
        self.shuffle_block_size = shuffle_block_size
        if global_batch < 1 or self.lanes < 1 or shuffle_block_size < 1:
            raise PlanError(
                f"global batch {global_batch}, lanes {self.lanes}, shuffle block size {shuffle_block_size}: all "
                "must be at least 1"
            )
        check_enough_samples(self.samples, global_batch, lanes=lanes, pairs=pairs)
        self.steps_per_epoch = self.samples // global_batch
        unit = 2 if pairs else 1
        if global_batch % (self.lanes * unit):
            fits = divisors(global_batch // unit)
            raise PlanError(
                f"{self.lanes} lanes do not divide the global batch of {global_batch}{' into pairs' if pairs else ''}; "
                f"the nearest that do: {nearest(self.lanes, fits)}"
            )
        self.lane_rows = global_batch // self.lanes
        self.lane_samples = self.steps_per_epoch * self.lane_rows
        self._counts = counts
        self._first_id = np.cumsum(counts) - counts
        self._orders: OrderedDict[int, _EpochOrder] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int, int], Ids] = OrderedDict()

    def ids(self, position: Position, rows: range | None = None) -> Ids:
        """Sample ids of the global batch at `position`, int64 [len(rows)].

        Args:
            position: epoch >= 0, 0 <= step < steps_per_epoch.
            rows: which rows of the global batch (step 1, at least one); None = all of them.

        Raises:
            IndexError: no such step or rows.
        """
        if not (position.epoch >= 0 and 0 <= position.step < self.steps_per_epoch):
            raise IndexError(f"no {position} in a plan of {self.steps_per_epoch} steps per epoch")
        rows = range(self.global_batch) if rows is None else rows
        if rows.step != 1 or not 0 <= rows.start < rows.stop <= self.global_batch:
            raise IndexError(f"no {rows} in a global batch of {self.global_batch}")
        parts = []
        for lane in self._lanes(rows):
            start, stop = max(rows.start, lane * self.lane_rows), min(rows.stop, (lane + 1) * self.lane_rows)
            shift = (position.step - lane) * self.lane_rows  # from rows of the batch to places in the lane
            parts.append(self._lane_ids(position.epoch, lane, start + shift, stop + shift))
        return np.concatenate(parts)

    def lane_of(self, rows: range) -> Ids:
        """The lane of each row, int64 [len(rows)]."""
        return np.arange(rows.start, rows.stop) // self.lane_rows

    def after(self, position: Position) -> Position:
        """The position one global batch later."""
        return self.at(self.steps_before(position) + 1)

    def at(self, step: int) -> Position:
        """The position with `step` global batches behind it, counted from the start of training."""
        return Position(*divmod(step, self.steps_per_epoch))

    def steps_before(self, position: Position) -> int:
        """Global batches before `position`, counted from the start of training."""
        return position.epoch * self.steps_per_epoch + position.step

    def shard_requests(self, position: Position, rows: range, *, epochs: int) -> Iterator[ShardRequest]:
        """The shards that the rows of coming batches come from: block by block, for the lanes one after another.

        Args:
            position: the first batch.
            epochs: to the end of which epoch, counted from the start.
        """
        first_block = position.step * self.lane_rows // self.shuffle_block_size
        for epoch in range(position.epoch, epochs):
            before = epoch * self.steps_per_epoch
            order = self._order(epoch)
            for start in range(first_block * self.shuffle_block_size, self.lane_samples, self.shuffle_block_size):
                stop = min(start + self.shuffle_block_size, self.lane_samples)
                for lane in self._lanes(rows):
                    ends = lane * self.lane_samples + np.array([start, stop - 1])
                    ends = (ends + order.offset) % self.samples
                    low, high = np.searchsorted(order.stream_start, ends, side="right") - 1
                    # The rotated stream goes on at its start.
                    wraps = ends[1] < ends[0]
                    places = [*range(low, len(order.shards)), *range(high + 1)] if wraps else range(low, high + 1)
                    shards = order.shards[np.unique(places)].tolist()
                    yield ShardRequest(before + start // self.lane_rows, before + (stop - 1) // self.lane_rows, shards)
            first_block = 0

    def _lanes(self, rows: range) -> range:
        """The lanes that rows of a global batch come from."""
        return range(rows.start // self.lane_rows, (rows.stop - 1) // self.lane_rows + 1)

    def _lane_ids(self, epoch: int, lane: int, start: int, stop: int) -> Ids:
        """Ids at places [start, stop) of a lane."""
        size = self.shuffle_block_size
        blocks = range(start // size, (stop - 1) // size + 1)
        return np.concatenate(
            [
                self._block(epoch, lane, number)[max(start - number * size, 0) : stop - number * size]
                for number in blocks
            ]
        )

    def _block(self, epoch: int, lane: int, number: int) -> Ids:
        """Permuted ids of one shuffle block of a lane; kept while its lane is likely to come back to it."""
        key = (epoch, lane, number)
        found = self._blocks.get(key)
        if found is not None:
            self._blocks.move_to_end(key)
            return found
        start = number * self.shuffle_block_size
        places = np.arange(start, min(start + self.shuffle_block_size, self.lane_samples))
        order = np.argsort(bits(Stream.SHUFFLE_BLOCK_ORDER, self.seed, epoch, lane, places), kind="stable")
        block = self._resolve(self._order(epoch), lane * self.lane_samples + places[order])
        self._blocks[key] = block
        # Two blocks per lane: a step may straddle a border, and the reader runs ahead of the consumer.
        if len(self._blocks) > 2 * self.lanes:
            self._blocks.popitem(last=False)
        return block

    def _order(self, epoch: int) -> _EpochOrder:
        found = self._orders.get(epoch)
        if found is not None:
            return found
        shards = np.arange(len(self._counts))
        permutation = np.argsort(bits(Stream.SHARD_ORDER, self.seed, epoch, shards), kind="stable")
        counts = self._counts[permutation]
        order = _EpochOrder(
            shards=permutation,
            stream_start=np.cumsum(counts) - counts,
            first_id=self._first_id[permutation],
            offset=int(bits(Stream.ROTATION, self.seed, epoch)) % self.samples,
        )
        self._orders[epoch] = order
        if len(self._orders) > 2:  # this epoch and the one that prefetching has reached
            self._orders.popitem(last=False)
        return order

    def _resolve(self, order: _EpochOrder, stream: Ids) -> Ids:
        """Places in the rotated stream -> sample ids."""
        place = (stream + order.offset) % self.samples
        shard = np.searchsorted(order.stream_start, place, side="right") - 1
        return order.first_id[shard] + place - order.stream_start[shard]


class EvalPlan:
    """Evaluation: samples in the order of the shards, each exactly once at any world size.

    A step takes the next batch x world samples (fewer in the last one) and deals them evenly, so every rank runs the
    same number of steps, and what is done after some of them is the beginning of the split, whoever did it: another
    number of ranks can end an evaluation that was broken off. Rows without a sample carry `NO_SAMPLE`.

    Args:
        samples: of the split (a plain number: the order is 0, 1, 2, ...).
        batch: rows per rank and step.
        start: samples that are done already.
    """

    def __init__(self, samples: int, *, batch: int, world: int = 1, rank: int = 0, start: int = 0) -> None:
        if samples < 1:
            raise PlanError("the split to evaluate has no samples")
        if batch < 1 or not 0 <= rank < world or not 0 <= start <= samples:
            raise PlanError(f"batch {batch}, rank {rank} of {world}, start {start}: no such evaluation")
        self.samples, self.batch, self.world, self.rank, self.start = samples, batch, world, rank, start
        self.steps = -((samples - start) // -(batch * world))

    def samples_done(self, steps: int) -> int:
        """Samples of the split that are done when this many steps are."""
        return min(self.start + steps * self.batch * self.world, self.samples)

    def ids(self, step: int) -> Ids:
        """Sample ids of this rank's batch number `step`, int64 [batch]; `NO_SAMPLE` where it has fewer."""
        if not 0 <= step < self.steps:
            raise IndexError(f"no step {step} in an evaluation of {self.steps} steps")
        first = self.samples_done(step)
        dealt = self.samples_done(step + 1) - first
        ids = first + self.rank * dealt // self.world + np.arange(self.batch)
        ids[ids >= first + (self.rank + 1) * dealt // self.world] = NO_SAMPLE
        return ids

    def shard_requests(self, shard_samples: NDArray[np.integer] | list[int]) -> Iterator[ShardRequest]:
        """The shards that the steps come from, one after another.

        Args:
            shard_samples: samples of each shard of the split.
        """
        ends = np.cumsum(shard_samples).tolist()
        per_step = self.batch * self.world
        for shard, (start, stop) in enumerate(pairwise([0, *ends])):
            if stop > max(start, self.start):
                first = (max(start, self.start) - self.start) // per_step
                yield ShardRequest(first, (stop - 1 - self.start) // per_step, [shard])
