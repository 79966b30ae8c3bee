"""Loaders: plan -> reader -> decoder -> augmentation -> batches on the device, all ahead of the consumer.

A loader's state is the position of the last batch *delivered*; what it has prefetched beyond that does not count.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.augment.params import SampleParams, draw, mix_params
from pipeline.augment.pixels import BatchAugment, mix, normalise
from pipeline.augment.recipe import AugmentRecipe
from pipeline.dali import DaliDecoder, DaliOptions, DecodeJob
from pipeline.plan import NO_SAMPLE, BatchShape, EvalPlan, Ids, Position, TrainPlan
from pipeline.prefetch import Prefetcher
from pipeline.reader import READ_THREADS, Encoded, SampleReader
from shards.dataset import ShardSet

# timm's crop_pct of the recipe: 224 is cut from 256, and other sizes keep the ratio.
EVAL_CROP = 0.875


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """How a loader works; none of it changes what it delivers."""

    read_threads: int = READ_THREADS
    """Threads that read shards; more hide the latency of slow file systems."""
    read_ahead: int = 4
    """Batches whose bytes are read before the decoder asks for them."""
    ready: int = 2
    """Finished batches that wait on the device."""
    check_hashes: bool = True
    """Compare each sample's bytes with the hash in the index."""
    dali: DaliOptions = field(default_factory=DaliOptions)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch on the device."""

    images: torch.Tensor
    """float [B, 3, size, size], channels-last, normalised (and mixed, in training)."""
    labels: torch.Tensor
    """int64 [B]."""
    ids: Ids
    """int64 [B] on the host; `NO_SAMPLE` where `mask` is False."""
    mask: torch.Tensor
    """bool [B]: False for rows that only fill up the last batches of an evaluation."""
    lam: torch.Tensor | None = None
    """float32 [B]: weight of a row's own label, the rest is its partner's (row i ^ 1); None = nothing was mixed."""
    position: Position
    """In training, the global batch that this micro-batch belongs to; in evaluation, (0, step)."""
    micro: int = 0
    """Number of this micro-batch within its rank's step."""
    ready: torch.cuda.Event | None = field(default=None, compare=False)


def decode_threads(local_world: int | None = None) -> int:
    """This rank's share of the cores that the process may use."""
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if local_world is None else local_world
    return max(1, len(os.sched_getaffinity(0)) // local_world)


class _Loader:
    """What training and evaluation share: a stream of batches made in a thread, on a stream of its own."""

    def __init__(
        self, dataset: ShardSet, split: str, device: torch.device, dtype: torch.dtype, options: LoaderOptions
    ) -> None:
        self._dataset, self._split = dataset, split
        self._device, self._dtype, self._options = device, dtype, options
        self._prefetcher: Prefetcher[Batch] | None = None
        dataset.check_sizes(split)

    def __next__(self) -> Batch:
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(self._stream(), depth=self._options.ready, name=f"{self._split}-loader")
        batch = next(self._prefetcher)
        if batch.ready is not None:
            consumer = torch.cuda.current_stream(self._device)
            consumer.wait_event(batch.ready)
            for tensor in (batch.images, batch.labels, batch.mask, batch.lam):
                if tensor is not None:
                    tensor.record_stream(consumer)
        return batch

    def close(self) -> None:
        """Stop the threads and give back memory and file descriptors. Idempotent."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stream(self) -> Iterator[Batch]:
        """Runs in the loader's thread."""
        reader = SampleReader(
            self._dataset, self._split, threads=self._options.read_threads, check=self._options.check_hashes
        )
        if self._device.type != "cuda":
            with reader:
                yield from self._batches(reader)
            return
        torch.cuda.set_device(self._device)
        with reader, torch.cuda.stream(torch.cuda.Stream(self._device)):
            yield from self._batches(reader)

    def _batches(self, reader: SampleReader) -> Iterator[Batch]:
        raise AssertionError("a loader says how its batches are made")

    def _decoder(self, size: int, batch: int, evaluation: bool) -> DaliDecoder:
        threads = self._options.dali.threads or decode_threads()
        return DaliDecoder(
            size=size,
            batch=batch,
            device=self._device,
            threads=threads,
            evaluation=evaluation,
            options=self._options.dali,
        )

    def _to_device(self, array: NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor

    def _event(self) -> torch.cuda.Event | None:
        return torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None


class TrainLoader(_Loader):
    """Micro-batches of one rank in training order, from `start` to the end of the last epoch.

    Args:
        plan: the order of everything.
        shape: which rows of each global batch are this rank's.
        augment: the augmentation recipe.
        epochs: epochs to deliver, counted from the start of training.
        start: the first position to deliver.
        device, dtype: of the images.
    """

    def __init__(
        self,
        dataset: ShardSet,
        plan: TrainPlan,
        shape: BatchShape,
        augment: AugmentRecipe,
        *,
        epochs: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        start: Position | None = None,
        split: str = "train",
        options: LoaderOptions | None = None,
    ) -> None:
        super().__init__(dataset, split, device, dtype, options or LoaderOptions())
        self._plan, self._shape, self._augment, self._epochs = plan, shape, augment, epochs
        self._next = Position(0, 0) if start is None else start

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __len__(self) -> int:
        """Micro-batches of a whole epoch."""
        return self._plan.steps_per_epoch * self._shape.accumulation

    def __next__(self) -> Batch:
        batch = super().__next__()
        if batch.micro == self._shape.accumulation - 1:
            self._next = self._plan.after(batch.position)
        return batch

    def state_dict(self) -> dict[str, int]:
        """The position behind the last whole step delivered."""
        return {"epoch": self._next.epoch, "step": self._next.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a saved position; what was prefetched is thrown away."""
        self.close()
        self._next = Position(state["epoch"], state["step"])

    def _work(self) -> Iterator[tuple[Ids, tuple[Position, int]]]:
        first = self._plan.steps_before(self._next)
        for step in range(first, self._epochs * self._plan.steps_per_epoch):
            position = self._plan.at(step)
            for micro in range(self._shape.accumulation):
                yield self._plan.ids(position, self._shape.rows(micro)), (position, micro)

    def _batches(self, reader: SampleReader) -> Iterator[Batch]:
        augment = BatchAugment(self._augment, self._device, self._dtype)
        decoder = self._decoder(self._augment.size, self._shape.micro_rows, evaluation=False)
        jobs = (
            self._job(encoded, *place) for encoded, place in reader.read_ahead(self._work(), self._options.read_ahead)
        )
        for pixels, job, (params, position, micro) in decoder.decode(jobs):
            images, lam = augment(pixels, params), None
            if self._augment.mixes:
                lanes = self._plan.lane_of(self._shape.rows(micro))
                step = self._plan.steps_before(position)
                mixing = mix_params(self._augment, seed=self._plan.seed, step=step, lanes=lanes)
                images, lam = mix(images, mixing), self._to_device(mixing.lam)
            yield Batch(
                images=images,
                labels=self._to_device(job.encoded.rows["label"].astype(np.int64)),
                ids=job.encoded.ids,
                mask=torch.ones(len(job.encoded.ids), dtype=torch.bool, device=self._device),
                lam=lam,
                position=position,
                micro=micro,
                ready=self._event(),
            )

    def _job(
        self, encoded: Encoded, position: Position, micro: int
    ) -> tuple[DecodeJob, tuple[SampleParams, Position, int]]:
        params = draw(
            self._augment,
            seed=self._plan.seed,
            epoch=position.epoch,
            ids=encoded.ids,
            heights=encoded.rows["height"],
            widths=encoded.rows["width"],
        )
        return DecodeJob(encoded=encoded, window=params.windows, flip=params.flips), (params, position, micro)


class EvalLoader(_Loader):
    """The batches of one rank of one evaluation; each sample of the split exactly once over all ranks.

    Every pass over the loader (`iter`) is one evaluation. Short side to size / 0.875, then a centre crop, bicubic.

    Args:
        plan: which samples are this rank's.
        size: side of the images in pixels.
        mean, std: of the normalisation, per channel on the 0..1 scale.
    """

    def __init__(
        self,
        dataset: ShardSet,
        plan: EvalPlan,
        *,
        size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        split: str = "val",
        options: LoaderOptions | None = None,
    ) -> None:
        super().__init__(dataset, split, device, dtype, options or LoaderOptions())
        self._plan, self._size, self._mean, self._std = plan, size, mean, std

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        return self

    def __len__(self) -> int:
        return self._plan.steps

    def _batches(self, reader: SampleReader) -> Iterator[Batch]:
        decoder = self._decoder(self._size, self._plan.batch, evaluation=True)
        jobs = (
            (self._job(encoded), extra) for encoded, extra in reader.read_ahead(self._work(), self._options.read_ahead)
        )
        for pixels, job, (step, ids) in decoder.decode(jobs):
            yield Batch(
                images=normalise(pixels, self._mean, self._std, self._dtype),
                labels=self._to_device(job.encoded.rows["label"].astype(np.int64)),
                ids=ids,
                mask=self._to_device(ids != NO_SAMPLE),
                position=Position(0, step),
                ready=self._event(),
            )

    def _work(self) -> Iterator[tuple[Ids, tuple[int, Ids]]]:
        for step in range(self._plan.steps):
            ids = self._plan.ids(step)
            # Rows without a sample decode sample 0, so that every batch has one shape; the mask hides them.
            yield np.where(ids == NO_SAMPLE, 0, ids), (step, ids)

    def _job(self, encoded: Encoded) -> DecodeJob:
        heights, widths = encoded.rows["height"].astype(np.int32), encoded.rows["width"].astype(np.int32)
        window = np.stack([np.zeros_like(heights), np.zeros_like(widths), heights, widths], axis=1)
        resize, anchor = eval_geometry(heights, widths, self._size)
        return DecodeJob(encoded=encoded, window=window, resize=resize, anchor=anchor)


def eval_geometry(
    heights: NDArray[np.int32], widths: NDArray[np.int32], size: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Sizes after resizing and corners of the centre crop, each int32 [n, 2], rounded the way torchvision does."""
    short = int(size / EVAL_CROP)
    sides = np.stack([heights, widths], axis=1).astype(np.int64)
    resize = short * sides // sides.min(axis=1, keepdims=True)
    anchor = np.rint((resize - size) / 2).astype(np.int32)
    return resize.astype(np.int32), anchor
