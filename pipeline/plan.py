"""The plan: which sample is at which row of which global batch. Pure arithmetic, without files, torch or global state.

A lane is one of L contiguous streams that every batch interleaves. The order of an epoch of N samples, with G samples
per global batch, is computed in three steps, each from hashed keys (`pipeline.rng`):

1. The shards are permuted, and the stream of their samples is rotated by a hashed offset. An epoch omits N mod G
   samples; because of the rotation, these are different samples in every epoch.
2. The stream is divided into L lanes of equal length. Global batch s takes the next G/L samples of each lane, so every
   batch mixes samples from the whole set while each lane reads its shards nearly in order.
3. Within a lane, samples are permuted inside shuffle blocks of `shuffle_block_size` samples.

With class balance (`pipeline.sampling.class_balance`), the stream consists of the draws of the epoch instead of the
samples: N draws, in which a sample may occur several times or not at all. The three steps are the same.

The rows of a global batch are lane-major. Rank r of R ranks owns the rows [r G/R, (r+1) G/R), so the global batch does
not depend on R. Computing the ids at any position costs O(lanes of the rank x shuffle block size), never O(samples)
(with class balance, O(samples) once per epoch).
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
from pipeline.sampling.class_balance import ClassBalance

Ids = NDArray[np.int64]

MAX_LANES = 64
DEFAULT_SHUFFLE_BLOCK_SIZE = 4096
NO_SAMPLE = -1


class Position(NamedTuple):
    """A global batch, named by its epoch and its step within that epoch. Positions compare in training order."""

    epoch: int
    """Epoch, counted from 0."""
    step: int
    """Step within the epoch: the number of earlier global batches of this epoch."""


class ShardRequest(NamedTuple):
    """Shards that are read during a range of steps. Steps are counted from the start of training, over all epochs."""

    first: int
    """First step that reads from the shards."""
    last: int
    """Last step that reads from the shards (inclusive)."""
    shards: list[int]
    """Numbers of the shards, in the order of the manifest."""


def default_lanes(global_batch: int) -> int:
    """Return the default number of lanes of a plan, a function of the global batch alone.

    It is the largest divisor, up to 64, of half the global batch (of the whole batch if it is odd): 1024 -> 64,
    96 -> 48.
    """
    base = global_batch // 2 if global_batch % 2 == 0 else global_batch
    return max((d for d in range(2, min(base, MAX_LANES) + 1) if base % d == 0), default=1)


@dataclass(frozen=True)
class _EpochOrder:
    """The permuted and rotated stream of the draws of one epoch. Arrays of shards are int64 [shards with draws]."""

    shards: Ids  # shard numbers, permuted
    stream_start: Ids  # position of each permuted shard's first draw in the stream before rotation
    first_draw: Ids  # number of the first draw of each permuted shard
    offset: int  # number of draws by which the stream is rotated
    drawn: NDArray[np.uint32] | None  # id of each draw, ascending; None: draw i is sample i


class TrainPlan:
    """The order of all global batches of all epochs, a pure function of its arguments.

    A lane is one of L contiguous streams that every batch interleaves (see the module's docstring).

    Args:
        shard_samples: number of samples of each shard, integers [shards], in the order of the manifest.
        global_batch: samples per global batch, over all ranks.
        seed: seed of the run.
        lanes: number of lanes; must divide `global_batch`. None: `default_lanes(global_batch)`.
        shuffle_block_size: samples per shuffle block. Larger blocks shuffle better, but read the shards less in order.
        pairs: whether rows are mixed in pairs (mixup or CutMix), which requires an even number of rows per lane.
        class_balance: 0: each sample once per epoch. Above 0, up to 1: exponent of `ClassBalance`; 1 draws all classes
            equally often. The number of steps per epoch does not change.
        labels: class number of each sample, integers [samples]; required with `class_balance`.

    Attributes:
        samples: number of samples of the set, and of the draws of an epoch.
        steps_per_epoch: global batches per epoch; the `samples % global_batch` remaining draws are omitted.
        lane_rows: rows of each lane in a global batch.
        lane_samples: draws of each lane in an epoch.
        balance: the draws of each epoch with class balance; None without.

    Raises:
        PlanError: the set has fewer samples than one global batch, or the sizes do not divide each other.

    Example:
        >>> from pipeline.plan import Position, TrainPlan
        >>> plan = TrainPlan([1000, 1000, 500], global_batch=64, seed=0)
        >>> plan.steps_per_epoch
        39
        >>> plan.ids(Position(epoch=0, step=3), range(0, 32)).shape  # the rows of rank 0 of 2
        (32,)
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
        class_balance: float = 0.0,
        labels: NDArray[np.integer] | None = None,
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
        self.balance: ClassBalance | None = None
        if class_balance:
            if labels is None or len(labels) != self.samples or not 0 < class_balance <= 1:
                raise PlanError(
                    f"class balance {class_balance:g}: expected a number from 0 to 1, and the label of each of the "
                    f"{self.samples} samples"
                )
            self.balance = ClassBalance(labels, class_balance, seed=seed)
        self._orders: OrderedDict[int, _EpochOrder] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int, int], Ids] = OrderedDict()

    def ids(self, position: Position, rows: range | None = None) -> Ids:
        """Return the sample ids of the global batch at `position`.

        Args:
            position: epoch >= 0 and 0 <= step < `steps_per_epoch`.
            rows: rows of the global batch, a non-empty range of step 1. None: all rows.

        Returns:
            int64 [len(rows)], each in 0 to `samples` - 1.

        Raises:
            IndexError: the position or the rows are out of range.
        """
        return self.ids_and_repeats(position, rows)[0]

    def ids_and_repeats(self, position: Position, rows: range | None = None) -> tuple[Ids, Ids]:
        """Return the sample ids of the global batch at `position`, and which draw of its sample in the epoch a row is.

        Args and errors are those of `ids`.

        Returns:
            ids, repeats: int64 [len(rows)] each. Without class balance, `repeats` is 0; with it, the draws of a sample
            are numbered from 0, in no particular order, so (id, repeat) occurs at most once in an epoch.
        """
        numbers = self._draw_numbers(position, rows)
        if self.balance is None:
            return numbers, np.zeros_like(numbers)
        drawn = self._order(position.epoch).drawn
        assert drawn is not None
        ids = drawn[numbers]
        return ids.astype(np.int64), numbers - np.searchsorted(drawn, ids)

    def _draw_numbers(self, position: Position, rows: range | None) -> Ids:
        if not (position.epoch >= 0 and 0 <= position.step < self.steps_per_epoch):
            raise IndexError(f"{position} is out of range for a plan of {self.steps_per_epoch} steps per epoch")
        rows = range(self.global_batch) if rows is None else rows
        if rows.step != 1 or not 0 <= rows.start < rows.stop <= self.global_batch:
            raise IndexError(f"rows {rows} are out of range for a global batch of {self.global_batch}")
        parts = []
        for lane in self._lanes(rows):
            start, stop = max(rows.start, lane * self.lane_rows), min(rows.stop, (lane + 1) * self.lane_rows)
            shift = (position.step - lane) * self.lane_rows  # position in the lane minus row number in the batch
            parts.append(self._lane_draws(position.epoch, lane, start + shift, stop + shift))
        return np.concatenate(parts)

    def lane_of(self, rows: range) -> Ids:
        """Return the lane of each row of a global batch, int64 [len(rows)]."""
        return np.arange(rows.start, rows.stop) // self.lane_rows

    def after(self, position: Position) -> Position:
        """Return the position of the next global batch."""
        return self.at(self.steps_before(position) + 1)

    def at(self, step: int) -> Position:
        """Return the position of a step that is counted from the start of training, over all epochs."""
        return Position(*divmod(step, self.steps_per_epoch))

    def steps_before(self, position: Position) -> int:
        """Return the number of global batches before `position`, counted from the start of training."""
        return position.epoch * self.steps_per_epoch + position.step

    def shard_requests(self, position: Position, rows: range, *, epochs: int) -> Iterator[ShardRequest]:
        """Yield the shards that the rows of the coming batches are read from.

        There is one request per shuffle block and lane, ordered by block, then by lane.

        Args:
            position: first global batch.
            rows: rows of each global batch that this rank reads.
            epochs: number of epochs of the training, counted from its start; the requests end with the last of them.
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
                    # A block may span the end of the unrotated stream and continue at its start.
                    wraps = ends[1] < ends[0]
                    spanned = [*range(low, len(order.shards)), *range(high + 1)] if wraps else range(low, high + 1)
                    shards = order.shards[np.unique(spanned)].tolist()
                    yield ShardRequest(before + start // self.lane_rows, before + (stop - 1) // self.lane_rows, shards)
            first_block = 0

    def _lanes(self, rows: range) -> range:
        """Return the lanes that these rows of a global batch belong to."""
        return range(rows.start // self.lane_rows, (rows.stop - 1) // self.lane_rows + 1)

    def _lane_draws(self, epoch: int, lane: int, start: int, stop: int) -> Ids:
        """Return the numbers of the draws at positions [start, stop) of a lane."""
        size = self.shuffle_block_size
        blocks = range(start // size, (stop - 1) // size + 1)
        return np.concatenate(
            [
                self._block(epoch, lane, number)[max(start - number * size, 0) : stop - number * size]
                for number in blocks
            ]
        )

    def _block(self, epoch: int, lane: int, number: int) -> Ids:
        """Return the permuted draw numbers of one shuffle block of a lane. The most recent blocks are cached."""
        key = (epoch, lane, number)
        found = self._blocks.get(key)
        if found is not None:
            self._blocks.move_to_end(key)
            return found
        start = number * self.shuffle_block_size
        offsets = np.arange(start, min(start + self.shuffle_block_size, self.lane_samples))
        order = np.argsort(bits(Stream.SHUFFLE_BLOCK_ORDER, self.seed, epoch, lane, offsets), kind="stable")
        block = self._resolve(self._order(epoch), lane * self.lane_samples + offsets[order])
        self._blocks[key] = block
        # Cache two blocks per lane, because a step may span two blocks and the reader runs ahead of the consumer.
        if len(self._blocks) > 2 * self.lanes:
            self._blocks.popitem(last=False)
        return block

    def _order(self, epoch: int) -> _EpochOrder:
        found = self._orders.get(epoch)
        if found is not None:
            return found
        counts, first_draw, drawn = self._counts, self._first_id, None
        if self.balance is not None:
            drawn = self.balance.draws(epoch)
            # In the dtype of `drawn`, because `searchsorted` would otherwise convert all of `drawn`.
            first_draw = np.searchsorted(drawn, self._first_id.astype(drawn.dtype))
            counts = np.diff(first_draw, append=self.samples)
        shards = np.arange(len(counts))
        permutation = np.argsort(bits(Stream.SHARD_ORDER, self.seed, epoch, shards), kind="stable")
        permutation = permutation[counts[permutation] > 0]
        counts = counts[permutation]
        order = _EpochOrder(
            shards=permutation,
            stream_start=np.cumsum(counts) - counts,
            first_draw=first_draw[permutation],
            offset=int(bits(Stream.ROTATION, self.seed, epoch)) % self.samples,
            drawn=drawn,
        )
        self._orders[epoch] = order
        if len(self._orders) > 2:  # keep the orders of the current and the prefetched epoch
            self._orders.popitem(last=False)
        return order

    def _resolve(self, order: _EpochOrder, stream: Ids) -> Ids:
        """Return the numbers of the draws at these positions of the rotated stream."""
        unrotated = (stream + order.offset) % self.samples
        shard = np.searchsorted(order.stream_start, unrotated, side="right") - 1
        return order.first_draw[shard] + unrotated - order.stream_start[shard]


class EvalPlan:
    """The batches of one evaluation: samples in the order of the shards, each exactly once at any world size.

    Each step takes the next `batch * world` samples (the last step may take fewer) and divides them evenly among the
    ranks, so all ranks run the same number of steps. The samples evaluated after any step are therefore a prefix of the
    split, and an interrupted evaluation can be resumed with a different number of ranks. Rows without a sample contain
    `NO_SAMPLE`.

    Args:
        samples: number of samples of the split; their ids are 0, 1, 2, ...
        batch: rows per rank and step.
        world: world size.
        rank: this rank, 0 to `world` - 1.
        start: number of samples that were evaluated before this plan starts.

    Attributes:
        steps: number of steps.

    Raises:
        PlanError: the split is empty, or an argument is out of range.
    """

    def __init__(self, samples: int, *, batch: int, world: int = 1, rank: int = 0, start: int = 0) -> None:
        if samples < 1:
            raise PlanError("the split to evaluate has no samples")
        if batch < 1 or not 0 <= rank < world or not 0 <= start <= samples:
            raise PlanError(
                f"evaluation of {samples} samples with batch {batch}, rank {rank}, world size {world}, start {start}: "
                "expected batch >= 1, 0 <= rank < world size and 0 <= start <= samples"
            )
        self.samples, self.batch, self.world, self.rank, self.start = samples, batch, world, rank, start
        self.steps = -((samples - start) // -(batch * world))

    def samples_done(self, steps: int) -> int:
        """Return how many samples of the split have been evaluated after this many steps."""
        return min(self.start + steps * self.batch * self.world, self.samples)

    def ids(self, step: int) -> Ids:
        """Return the sample ids of this rank's batch at a step, int64 [batch], padded with `NO_SAMPLE`.

        Raises:
            IndexError: the step is out of range.
        """
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} is out of range for an evaluation of {self.steps} steps")
        first = self.samples_done(step)
        dealt = self.samples_done(step + 1) - first
        ids = first + self.rank * dealt // self.world + np.arange(self.batch)
        ids[ids >= first + (self.rank + 1) * dealt // self.world] = NO_SAMPLE
        return ids

    def shard_requests(self, shard_samples: NDArray[np.integer] | list[int]) -> Iterator[ShardRequest]:
        """Yield the shards that the samples of the steps are read from, one request per shard.

        Args:
            shard_samples: number of samples of each shard of the split, integers [shards].
        """
        ends = np.cumsum(shard_samples).tolist()
        per_step = self.batch * self.world
        for shard, (start, stop) in enumerate(pairwise([0, *ends])):
            if stop > max(start, self.start):
                first = (max(start, self.start) - self.start) // per_step
                yield ShardRequest(first, (stop - 1 - self.start) // per_step, [shard])
