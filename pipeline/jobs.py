"""Prepare batches for decoding: from the plan to a `DecodeJob` with its augmentation parameters.

This module does not import torch, so that it can run in the feed process (`pipeline.feed_process`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.augment.params import MixParams, SampleParams, draw, mix_params_of_steps
from pipeline.decode.job import DecodeJob
from pipeline.options import LoaderOptions
from pipeline.phases.train_phase import TrainPhase, phase_at
from pipeline.plan import NO_SAMPLE, EvalPlan, Ids, Position, ShardRequest, TrainPlan
from pipeline.stage_trace import StageTrace
from pipeline.storage.bad_samples import BadSamples
from pipeline.storage.buffer_pool import BufferPool
from pipeline.storage.memory_cache.shared_pixels import StoredFlags
from pipeline.storage.placement import open_storage
from pipeline.storage.reader import Encoded, SampleReader
from shards.format.dataset import ShardSet
from shards.format.manifest_fields import MAX_SAMPLES

# Crop size / resized size in evaluation (timm's `crop_pct`): 224 pixels are cropped from 256.
CROP_PCT = 0.875
# Ratio of the longer to the shorter side above which an image is cropped before it is resized for evaluation.
MAX_ASPECT = 8
# Source pixels that the bicubic filter reads on each side of its center; multiplied by the scale when downsampling.
CUBIC_SUPPORT = 2
# Number of steps whose mixing parameters are drawn together, which needs a sixteenth of the NumPy calls.
MIX_STEPS = 16


@dataclass(frozen=True)
class BatchRequest:
    """The samples of one batch of a rank: a micro-batch in training."""

    ids: Ids
    """int64 [n]: sample ids of the plan."""
    position: Position
    """Position in the plan, see `Batch.position`."""
    micro: int = 0
    """Number of the micro-batch within the rank's step, from 0."""
    repeats: Ids | None = None
    """int64 [n]: which draw of its sample in the epoch a row is (`TrainPlan.ids_and_repeats`); None: the first."""


@dataclass(frozen=True)
class PreparedBatch:
    """A batch that is ready to be decoded and augmented."""

    job: DecodeJob
    request: BatchRequest
    params: SampleParams | None = None
    """Augmentation parameters of each sample; None in evaluation."""
    mixing: MixParams | None = None
    """Mixing parameters of each row. None: no row is mixed."""


class Jobs(ABC):
    """The batches of one loader, in order. Instances can be pickled."""

    @abstractmethod
    def requests(self) -> Iterator[BatchRequest]:
        """Yield the batches in order. Every row has a sample, padding rows included."""

    @abstractmethod
    def shard_requests(self) -> Iterator[ShardRequest]:
        """Yield the shards that these batches are read from."""

    @abstractmethod
    def step(self, position: Position) -> int:
        """Return the step of a position, counted like the steps of `shard_requests`."""

    @abstractmethod
    def prepare(self, encoded: Encoded, request: BatchRequest) -> PreparedBatch:
        """Draw all random parameters of a batch that has been read."""


@dataclass(kw_only=True)
class TrainJobs(Jobs):
    """The micro-batches of one rank, from `start` to the end of the last epoch."""

    plan: TrainPlan
    phases: tuple[TrainPhase, ...]
    epochs: int
    start: Position
    _mix_block: tuple[int, int] = field(default=(-1, -1), init=False, repr=False)
    _mixes: dict[int, list[MixParams]] = field(default_factory=dict, init=False, repr=False)

    def requests(self) -> Iterator[BatchRequest]:
        first = self.plan.steps_before(self.start)
        for step in range(first, self.epochs * self.plan.steps_per_epoch):
            position, shape = self.plan.at(step), phase_at(self.phases, step).shape
            for micro in range(shape.accumulation):
                ids, repeats = self.plan.ids_and_repeats(position, shape.rows(micro))
                yield BatchRequest(ids, position, micro, repeats)

    def shard_requests(self) -> Iterator[ShardRequest]:
        shape = self.phases[0].shape  # the rows of the rank are the same in all phases
        rows = range(shape.rank * shape.rank_rows, (shape.rank + 1) * shape.rank_rows)
        return self.plan.shard_requests(self.start, rows, epochs=self.epochs)

    def step(self, position: Position) -> int:
        return self.plan.steps_before(position)

    def prepare(self, encoded: Encoded, request: BatchRequest) -> PreparedBatch:
        # A sample that is drawn several times in an epoch gets another augmentation each time.
        repeats = 0 if request.repeats is None else request.repeats * MAX_SAMPLES
        phase = phase_at(self.phases, self.step(request.position))
        params = draw(
            phase.augment,
            seed=self.plan.seed,
            epoch=request.position.epoch,
            ids=encoded.ids + repeats,
            heights=encoded.rows["height"],
            widths=encoded.rows["width"],
        )
        job = DecodeJob(encoded=encoded, window=params.windows, size=phase.augment.size, flip=params.flips)
        return PreparedBatch(job, request, params, self._mixing(request, phase))

    def _mixing(self, request: BatchRequest, phase: TrainPhase) -> MixParams | None:
        if not phase.augment.mixes:
            return None
        block, within = divmod(self.step(request.position), MIX_STEPS)
        if (block, phase.first_step) != self._mix_block:  # a block of steps may span several phases
            self._mix_block, self._mixes = (block, phase.first_step), {}
        if request.micro not in self._mixes:
            lanes = self.plan.lane_of(phase.shape.rows(request.micro))
            steps = range(block * MIX_STEPS, (block + 1) * MIX_STEPS)
            mixes = mix_params_of_steps(phase.augment, seed=self.plan.seed, steps=steps, lanes=lanes)
            self._mixes[request.micro] = mixes
        return self._mixes[request.micro][within]


@dataclass(kw_only=True)
class EvalJobs(Jobs):
    """The batches of one rank of an evaluation: the center of images whose short side is resized to size / crop_pct."""

    plan: EvalPlan
    shard_samples: NDArray[np.int64]
    """Number of samples of each shard of the split, int64 [shards]."""
    size: int
    crop_pct: float

    def planned(self) -> Iterator[BatchRequest]:
        """Yield the batches of the plan, with `NO_SAMPLE` in padding rows."""
        for step in range(self.plan.steps):
            yield BatchRequest(self.plan.ids(step), Position(0, step))

    def requests(self) -> Iterator[BatchRequest]:
        return (BatchRequest(_fill_padding(request.ids), request.position) for request in self.planned())

    def shard_requests(self) -> Iterator[ShardRequest]:
        return self.plan.shard_requests(self.shard_samples)

    def step(self, position: Position) -> int:
        return position.step

    def prepare(self, encoded: Encoded, request: BatchRequest) -> PreparedBatch:
        heights, widths = encoded.rows["height"].astype(np.int32), encoded.rows["width"].astype(np.int32)
        window, region = eval_windows(heights, widths, self.size, self.crop_pct)
        return PreparedBatch(DecodeJob(encoded=encoded, window=window, size=self.size, region=region), request)


@dataclass(frozen=True, kw_only=True)
class JobStream:
    """Produces the prepared batches of a loader, in this process or in the feed process. Instances can be pickled."""

    dataset: ShardSet
    split: str
    jobs: Jobs
    options: LoaderOptions
    beton: bool = False
    """Whether to read the split's .beton file, if it has one, even if it also has tar shards."""
    memory_cache: str | None = None
    """Path of the memory cache (`SharedPixels.path`), whose samples are not read. None: no cache."""

    def reader(self, buffers: BufferPool, trace: StageTrace | None = None) -> SampleReader:
        """Return a reader of the split that stores the encoded images in `buffers`."""
        samples = self.dataset.split(self.split).samples
        stored = None if self.memory_cache is None else StoredFlags(self.memory_cache, samples)
        return open_reader(
            self.dataset, self.split, self.options, buffers=buffers, beton=self.beton, trace=trace, stored=stored
        )

    def run(self, reader: SampleReader, bad: BadSamples, trace: StageTrace | None = None) -> Iterator[PreparedBatch]:
        """Run the first half of a loader: plan -> read -> replace bad samples -> draw.

        Reading runs `options.read_ahead` batches ahead.

        Raises:
            ShardSetError: a sample is damaged, and the budget of `bad` is used up.
        """
        planned = self.jobs.requests()
        read = self._read(planned, reader)
        replaced = ((bad.replace_bad_samples(e, reader, epoch=r.position.epoch), r) for e, r in read)
        return (trace or StageTrace()).map("draw", lambda each: self.jobs.prepare(*each), replaced)

    def _read(self, planned: Iterator[BatchRequest], reader: SampleReader) -> Iterator[tuple[Encoded, BatchRequest]]:
        reader.prefetch(self.jobs.shard_requests())
        work = ((request.ids, request) for request in planned)
        for encoded, request in reader.read_ahead(work, self.options.settings.read_ahead):
            reader.advance(self.jobs.step(request.position))
            yield encoded, request


def open_reader(
    dataset: ShardSet,
    split: str,
    options: LoaderOptions,
    *,
    buffers: BufferPool | None = None,
    beton: bool = False,
    trace: StageTrace | None = None,
    stored: StoredFlags | None = None,
) -> SampleReader:
    """Return a reader of a split, configured by loader options."""
    storage = open_storage(dataset, split, beton=beton)
    threads = options.settings.read_threads
    return SampleReader(
        storage, threads=threads, check=options.check_hashes, buffers=buffers, trace=trace, stored=stored
    )


def eval_geometry(
    heights: NDArray[np.int32], widths: NDArray[np.int32], size: int, crop_pct: float = CROP_PCT
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Compute the resized sizes (height, width) and center-crop corners (y, x) of an evaluation, each int32 [n, 2].

    They are rounded like in torchvision's `Resize` and `CenterCrop`.

    Args:
        heights, widths: sizes of the source images in pixels, [n].
        size: side of the crop in pixels.
        crop_pct: `size` as a fraction of the resized short side.
    """
    short = int(size / crop_pct)
    sides = np.stack([heights, widths], axis=1).astype(np.int64)
    resize = short * sides // sides.min(axis=1, keepdims=True)
    anchor = np.rint((resize - size) / 2).astype(np.int32)
    return resize.astype(np.int32), anchor


def eval_windows(
    heights: NDArray[np.int32], widths: NDArray[np.int32], size: int, crop_pct: float = CROP_PCT
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Compute the `DecodeJob` windows (int32 [n, 4]) and regions (float64 [n, 4]) of `eval_geometry`.

    The window is the whole image. If one side is more than `MAX_ASPECT` times the other, it is only the part that the
    filter reads for the center crop, because resizing all of, for example, 65,500 x 2 pixels would take 6 GB of memory.
    """
    sides = np.stack([heights, widths], axis=1).astype(np.float64)
    resize, anchor = eval_geometry(heights, widths, size, crop_pct)
    scale = sides / resize
    start, extent = anchor * scale, size * scale
    reach = CUBIC_SUPPORT * np.maximum(scale, 1) + 1  # plus 1, because bounds are rounded
    extreme = sides > MAX_ASPECT * sides.min(axis=1, keepdims=True)
    low = np.where(extreme, np.floor(start - reach).clip(0), 0)
    high = np.where(extreme, np.minimum(np.ceil(start + extent + reach), sides), sides)
    return np.hstack([low, high - low]).astype(np.int32), np.hstack([start - low, extent])


def _fill_padding(ids: Ids) -> Ids:
    """Repeat a sample of the batch in padding rows, so that every batch has its full shape; a mask hides those rows."""
    return np.where(ids == NO_SAMPLE, max(int(ids.max()), 0), ids)
