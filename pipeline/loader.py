"""Loaders: chains of generators in the order of the data, all run ahead of the consumer.

    plan -> read -> replace bad samples -> draw    `pipeline.jobs.JobStream.run`; in a process of its own on GPUs
    -> decode -> augment -> batch                  `_batches` of `TrainLoader` and `EvalLoader`

A loader's state is the position of the last batch *delivered*; what it has prefetched beyond that does not count.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from pipeline.augment.pixels import BatchAugment, mix, normalise
from pipeline.augment.recipe import AugmentRecipe
from pipeline.background import BackgroundLoader
from pipeline.batch import Batch, timed_event
from pipeline.batch_shape import BatchShape
from pipeline.decode.job import Normalisation
from pipeline.jobs import CROP_PCT, EvalJobs, PreparedBatch, TrainJobs, eval_geometry
from pipeline.options import DaliOptions, LoaderOptions
from pipeline.plan import NO_SAMPLE, EvalPlan, Position, TrainPlan
from pipeline.synthetic import synthetic_batches
from shards.format.dataset import ShardSet

__all__ = ["Batch", "DaliOptions", "EvalLoader", "LoaderOptions", "TrainLoader", "eval_geometry"]


class TrainLoader(BackgroundLoader):
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
        kernels: bool = True,
    ) -> None:
        super().__init__(
            dataset,
            split,
            device=device,
            dtype=dtype,
            options=options or LoaderOptions(),
            seed=plan.seed,
            rank=shape.rank,
            world=shape.world,
        )
        self._kernels = kernels
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

    def _jobs(self) -> TrainJobs:
        return TrainJobs(
            plan=self._plan, shape=self._shape, augment=self._augment, epochs=self._epochs, start=self._next
        )

    def _batches(self) -> Iterator[Batch]:
        if self._loader == "synthetic":
            classes, mixed = len(self._dataset.manifest.classes), self._augment.mixes
            yield from synthetic_batches(
                self._jobs().requests(),
                size=self._augment.size,
                classes=classes,
                device=self._device,
                dtype=self._dtype,
                mixed=mixed,
            )
            return
        size, rows = self._augment.size, self._shape.micro_rows
        # On a CPU a decoder that has the pixels in its cache normalises them at no cost, if nothing comes in between.
        by_decoder = self._device.type == "cpu" and self._augment.policy is None and not self._augment.erase
        normalisation = Normalisation(self._augment.mean, self._augment.std) if by_decoder else None
        with (
            self._prepare(self._jobs()) as prepared,
            # Closed here: an error of a later stage keeps the generators alive that it came through.
            closing(self._decode(prepared, size=size, rows=rows, normalisation=normalisation)) as decoded,
        ):
            augmented = self._mix(decoded) if by_decoder else self._augmented(decoded)
            yield from (self._batch(images, batch) for images, batch in augmented)

    def _mix(self, decoded: Iterator[tuple[Tensor, PreparedBatch]]) -> Iterator[tuple[Tensor, PreparedBatch]]:
        """Mixup and CutMix of images that the decoder has normalised: all augmentation that is left."""
        for pixels, batch in decoded:
            images = self._channels_first(pixels)
            yield images if batch.mixing is None else mix(images, batch.mixing), batch

    def _augmented(self, decoded: Iterator[tuple[Tensor, PreparedBatch]]) -> Iterator[tuple[Tensor, PreparedBatch]]:
        """RandAugment, normalisation, erasing and mixing on the device."""
        augment = BatchAugment(self._augment, self._device, self._dtype, kernels=self._kernels)
        for pixels, batch in decoded:
            assert batch.params is not None
            yield augment(pixels, batch.params, batch.mixing), batch

    def _batch(self, images: Tensor, batch: PreparedBatch) -> Batch:
        request, encoded, mixing = batch.request, batch.job.encoded, batch.mixing
        return Batch(
            images=images,
            labels=self._labels(encoded),
            ids=encoded.ids,
            planned=request.ids,
            mask=torch.ones(len(request.ids), dtype=torch.bool, device=self._device),
            lam=None if mixing is None else self._to_device(mixing.lam),
            position=request.position,
            micro=request.micro,
            ready=timed_event(self._device),
        )


class EvalLoader(BackgroundLoader):
    """The batches of one rank of one evaluation; each sample of the split exactly once over all ranks.

    Every pass over the loader (`iter`) is one evaluation. Short side to size / crop_pct, then a centre crop, bicubic.

    Args:
        plan: which samples are this rank's.
        size: side of the images in pixels.
        mean, std: of the normalisation, per channel on the 0..1 scale.
        crop_pct: share of the short side that is looked at.
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
        crop_pct: float = CROP_PCT,
        options: LoaderOptions | None = None,
    ) -> None:
        super().__init__(
            dataset,
            split,
            device=device,
            dtype=dtype,
            options=options or LoaderOptions(),
            seed=0,
            rank=plan.rank,
            world=plan.world,
        )
        self._plan, self._size, self._mean, self._std = plan, size, mean, std
        self._crop_pct, self._delivered = crop_pct, 0

    def __iter__(self) -> Iterator[Batch]:
        """Start an evaluation, or go on with the one whose state was just loaded."""
        if self._prefetcher is not None:
            self.close()
            self._start_at(0)
        return self

    def __len__(self) -> int:
        """Batches of this evaluation."""
        return self._plan.steps

    def __next__(self) -> Batch:
        batch = super().__next__()
        self._delivered += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        """How many samples of the split all ranks together have been given."""
        return {"samples": self._plan.samples_done(self._delivered)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on with an evaluation that was broken off, at whatever world size; what was prefetched is thrown away."""
        self.close()
        self._start_at(state["samples"])

    def _start_at(self, samples: int) -> None:
        plan = self._plan
        self._plan = EvalPlan(plan.samples, batch=plan.batch, world=plan.world, rank=plan.rank, start=samples)
        self._delivered = 0

    def _jobs(self) -> EvalJobs:
        shard_samples = self._dataset.shard_samples(self._split)
        return EvalJobs(plan=self._plan, shard_samples=shard_samples, size=self._size, crop_pct=self._crop_pct)

    def _batches(self) -> Iterator[Batch]:
        size, rows = self._size, self._plan.batch
        if self._loader == "synthetic":
            classes = len(self._dataset.manifest.classes)
            yield from synthetic_batches(
                self._jobs().planned(), size=size, classes=classes, device=self._device, dtype=self._dtype
            )
            return
        by_decoder = self._device.type == "cpu"
        normalisation = Normalisation(self._mean, self._std) if by_decoder else None
        with (
            self._prepare(self._jobs()) as prepared,
            closing(
                self._decode(prepared, size=size, rows=rows, evaluation=True, normalisation=normalisation)
            ) as decoded,
        ):
            normalised = ((self._channels_first(p) if by_decoder else self._normalise(p), b) for p, b in decoded)
            yield from (self._batch(images, batch) for images, batch in normalised)

    def _normalise(self, pixels: Tensor) -> Tensor:
        return normalise(pixels, self._mean, self._std, self._dtype)

    def _batch(self, images: Tensor, batch: PreparedBatch) -> Batch:
        position, encoded = batch.request.position, batch.job.encoded
        planned = self._plan.ids(position.step)
        # No other sample can stand in for a bad one here: its row is left out.
        ids = np.where(planned == encoded.ids, planned, NO_SAMPLE)
        return Batch(
            images=images,
            labels=self._labels(encoded),
            ids=ids,
            planned=planned,
            mask=self._to_device(ids != NO_SAMPLE),
            position=position,
            ready=timed_event(self._device),
        )
