"""What is read and drawn for each batch: from the plan to a `DecodeJob` with its augmentation parameters.

Nothing here imports torch: all of it can run in a process of its own (`pipeline.feed_process`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.augment.params import MixParams, SampleParams, draw, mix_params_of_steps
from pipeline.augment.recipe import AugmentRecipe
from pipeline.batch_shape import BatchShape
from pipeline.decode.job import DecodeJob
from pipeline.options import LoaderOptions
from pipeline.plan import NO_SAMPLE, EvalPlan, Ids, Position, ShardRequest, TrainPlan
from pipeline.storage.bad_samples import BadSamples
from pipeline.storage.buffer_pool import BufferPool
from pipeline.storage.placement import open_storage
from pipeline.storage.reader import Encoded, SampleReader
from shards.format.dataset import ShardSet

# The recipe's, by timm's name: 224 is cut from 256, and other sizes keep the ratio.
CROP_PCT = 0.875
# The longer side over the shorter one above which an image is cut before it is resized for evaluation.
MAX_ASPECT = 8
# Source pixels on either side of its centre that the bicubic filter reads, times the scale where it shrinks.
CUBIC_SUPPORT = 2
# Steps whose mixing is drawn at once: a sixteenth of the numpy calls of drawing it step by step.
MIX_STEPS = 16


@dataclass(frozen=True)
class BatchRequest:
    """What a rank delivers at once."""

    ids: Ids
    """int64 [n], as the plan says."""
    position: Position
    micro: int = 0


@dataclass(frozen=True)
class PreparedBatch:
    """A batch that is ready to be decoded and augmented."""

    job: DecodeJob
    request: BatchRequest
    params: SampleParams | None = None
    """Augmentation of each sample; None in an evaluation."""
    mixing: MixParams | None = None
    """None = nothing is mixed."""


class Jobs(ABC):
    """The batches of one loader, in order. Can be pickled."""

    @abstractmethod
    def requests(self) -> Iterator[BatchRequest]:
        """The batches, every row with a sample."""

    @abstractmethod
    def shard_requests(self) -> Iterator[ShardRequest]:
        """The shards that these batches are read from."""

    @abstractmethod
    def step(self, position: Position) -> int:
        """The step of a position, counted as `shard_requests` counts."""

    @abstractmethod
    def prepare(self, encoded: Encoded, request: BatchRequest) -> PreparedBatch:
        """Draw everything that is random about a batch that has been read."""


@dataclass(kw_only=True)
class TrainJobs(Jobs):
    """A rank's micro-batches from `start` to the end of the last epoch."""

    plan: TrainPlan
    shape: BatchShape
    augment: AugmentRecipe
    epochs: int
    start: Position
    _mix_block: int = field(default=-1, init=False, repr=False)
    _mixes: dict[int, list[MixParams]] = field(default_factory=dict, init=False, repr=False)

    def requests(self) -> Iterator[BatchRequest]:
        first = self.plan.steps_before(self.start)
        for step in range(first, self.epochs * self.plan.steps_per_epoch):
            position = self.plan.at(step)
            for micro in range(self.shape.accumulation):
                yield BatchRequest(self.plan.ids(position, self.shape.rows(micro)), position, micro)

    def shard_requests(self) -> Iterator[ShardRequest]:
        shape = self.shape
        rows = range(shape.rank * shape.rank_rows, (shape.rank + 1) * shape.rank_rows)
        return self.plan.shard_requests(self.start, rows, epochs=self.epochs)

    def step(self, position: Position) -> int:
        return self.plan.steps_before(position)

    def prepare(self, encoded: Encoded, request: BatchRequest) -> PreparedBatch:
        params = draw(
            self.augment,
            seed=self.plan.seed,
            epoch=request.position.epoch,
            ids=encoded.ids,
            heights=encoded.rows["height"],
            widths=encoded.rows["width"],
        )
        job = DecodeJob(encoded=encoded, window=params.windows, flip=params.flips)
        return PreparedBatch(job, request, params, self._mixing(request))

    def _mixing(self, request: BatchRequest) -> MixParams | None:
        if not self.augment.mixes:
            return None
        block, within = divmod(self.plan.steps_before(request.position), MIX_STEPS)
        if block != self._mix_block:
            self._mix_block, self._mixes = block, {}
        if request.micro not in self._mixes:
            lanes = self.plan.lane_of(self.shape.rows(request.micro))
            steps = range(block * MIX_STEPS, (block + 1) * MIX_STEPS)
            mixes = mix_params_of_steps(self.augment, seed=self.plan.seed, steps=steps, lanes=lanes)
            self._mixes[request.micro] = mixes
        return self._mixes[request.micro][within]


@dataclass(kw_only=True)
class EvalJobs(Jobs):
    """A rank's batches of one evaluation: the short side is resized to size / crop_pct, and the centre cut out."""

    plan: EvalPlan
    shard_samples: NDArray[np.int64]
    """int64 [shards] of the split."""
    size: int
    crop_pct: float

    def planned(self) -> Iterator[BatchRequest]:
        """The batches as planned: `NO_SAMPLE` in rows that only fill up a batch."""
        for step in range(self.plan.steps):
            yield BatchRequest(self.plan.ids(step), Position(0, step))

    def requests(self) -> Iterator[BatchRequest]:
        return (BatchRequest(_filled(request.ids), request.position) for request in self.planned())

    def shard_requests(self) -> Iterator[ShardRequest]:
        return self.plan.shard_requests(self.shard_samples)

    def step(self, position: Position) -> int:
        return position.step

    def prepare(self, encoded: Encoded, request: BatchRequest) -> PreparedBatch:
        heights, widths = encoded.rows["height"].astype(np.int32), encoded.rows["width"].astype(np.int32)
        window, region = eval_windows(heights, widths, self.size, self.crop_pct)
        return PreparedBatch(DecodeJob(encoded=encoded, window=window, region=region), request)


@dataclass(frozen=True, kw_only=True)
class JobStream:
    """All that is needed to make the prepared batches of a loader, here or in another process."""

    dataset: ShardSet
    split: str
    jobs: Jobs
    options: LoaderOptions
    beton: bool = False
    """Read the .beton, if there is one, even where there are tars."""

    def reader(self, buffers: BufferPool) -> SampleReader:
        """A reader of the split.

        Args:
            buffers: memory for the encoded images.
        """
        return open_reader(self.dataset, self.split, self.options, buffers=buffers, beton=self.beton)

    def run(self, reader: SampleReader, bad: BadSamples) -> Iterator[PreparedBatch]:
        """The first half of a loader: plan -> read -> replace bad samples -> draw.

        Reads `options.read_ahead` batches before they are asked for.

        Raises:
            ShardSetError: a sample is damaged, and `bad` accepts no more of them.
        """
        planned = self.jobs.requests()
        read = self._read(planned, reader)
        replaced = ((bad.replace_bad_samples(e, reader, epoch=r.position.epoch), r) for e, r in read)
        return (self.jobs.prepare(encoded, request) for encoded, request in replaced)

    def _read(self, planned: Iterator[BatchRequest], reader: SampleReader) -> Iterator[tuple[Encoded, BatchRequest]]:
        reader.prefetch(self.jobs.shard_requests())
        work = ((request.ids, request) for request in planned)
        for encoded, request in reader.read_ahead(work, self.options.settings.read_ahead):
            reader.advance(self.jobs.step(request.position))
            yield encoded, request


def open_reader(
    dataset: ShardSet, split: str, options: LoaderOptions, *, buffers: BufferPool | None = None, beton: bool = False
) -> SampleReader:
    """A reader of a split, as the options say."""
    storage = open_storage(dataset, split, beton=beton)
    threads = options.settings.read_threads
    return SampleReader(storage, threads=threads, check=options.check_hashes, buffers=buffers)


def eval_geometry(
    heights: NDArray[np.int32], widths: NDArray[np.int32], size: int, crop_pct: float = CROP_PCT
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Sizes after resizing and corners of the centre crop, each int32 [n, 2], rounded the way torchvision does."""
    short = int(size / crop_pct)
    sides = np.stack([heights, widths], axis=1).astype(np.int64)
    resize = short * sides // sides.min(axis=1, keepdims=True)
    anchor = np.rint((resize - size) / 2).astype(np.int32)
    return resize.astype(np.int32), anchor


def eval_windows(
    heights: NDArray[np.int32], widths: NDArray[np.int32], size: int, crop_pct: float = CROP_PCT
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Windows and regions of `DecodeJob` for `eval_geometry`: int32 [n, 4] and float64 [n, 4].

    The window is the whole image, or, where one side is more than `MAX_ASPECT` times the other, the part of it that the
    filter reads for the centre crop: resized as a whole, an image of 65,500 x 2 pixels would take 6 GB.
    """
    sides = np.stack([heights, widths], axis=1).astype(np.float64)
    resize, anchor = eval_geometry(heights, widths, size, crop_pct)
    scale = sides / resize
    start, extent = anchor * scale, size * scale
    reach = CUBIC_SUPPORT * np.maximum(scale, 1) + 1  # 1: rounding of the filter's ends
    extreme = sides > MAX_ASPECT * sides.min(axis=1, keepdims=True)
    low = np.where(extreme, np.floor(start - reach).clip(0), 0)
    high = np.where(extreme, np.minimum(np.ceil(start + extent + reach), sides), sides)
    return np.hstack([low, high - low]).astype(np.int32), np.hstack([start - low, extent])


def _filled(ids: Ids) -> Ids:
    """Rows without a sample decode another one of the batch, so that it has its full shape; the mask hides them."""
    return np.where(ids == NO_SAMPLE, max(int(ids.max()), 0), ids)
