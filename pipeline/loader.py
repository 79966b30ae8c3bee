"""Loaders: plan -> reader -> decoder -> augmentation -> batches on the device, all ahead of the consumer.

A loader's state is the position of the last batch *delivered*; what it has prefetched beyond that does not count.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.augment.params import MixParams, SampleParams, draw, mix_params_of
from pipeline.augment.pixels import BatchAugment, mix, normalise
from pipeline.augment.recipe import AugmentRecipe
from pipeline.background import BackgroundLoader, Portion
from pipeline.batch import Batch
from pipeline.decode import DecodeJob, Normalisation
from pipeline.options import DaliOptions, LoaderOptions
from pipeline.plan import NO_SAMPLE, BatchShape, EvalPlan, Need, Position, TrainPlan
from pipeline.reader import Encoded
from pipeline.synthetic import synthetic_batches
from shards.dataset import ShardSet

__all__ = ["Batch", "DaliOptions", "EvalLoader", "LoaderOptions", "TrainLoader", "eval_geometry"]

# The recipe's, by timm's name: 224 is cut from 256, and other sizes keep the ratio.
CROP_PCT = 0.875
# Steps whose mixing is drawn at once: a sixteenth of the numpy calls of drawing it step by step.
MIX_STEPS = 16


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
    ) -> None:
        super().__init__(dataset, split, device=device, dtype=dtype, options=options or LoaderOptions(), seed=plan.seed)
        self._plan, self._shape, self._augment, self._epochs = plan, shape, augment, epochs
        self._next = Position(0, 0) if start is None else start
        self._mix_block, self._mixes = -1, dict[int, list[MixParams]]()

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

    def _work(self) -> Iterator[Portion]:
        first = self._plan.steps_before(self._next)
        for step in range(first, self._epochs * self._plan.steps_per_epoch):
            position = self._plan.at(step)
            for micro in range(self._shape.accumulation):
                yield Portion(self._plan.ids(position, self._shape.rows(micro)), position, micro)

    def _needs(self) -> Iterator[Need]:
        shape = self._shape
        rows = range(shape.rank * shape.rank_rows, (shape.rank + 1) * shape.rank_rows)
        return self._plan.needs(self._next, rows, epochs=self._epochs)

    def _step(self, position: Position) -> int:
        return self._plan.steps_before(position)

    def _batches(self) -> Iterator[Batch]:
        size, rows = self._augment.size, self._shape.micro_rows
        if self._loader == "synthetic":
            classes, mixed = len(self._dataset.manifest.classes), self._augment.mixes
            yield from synthetic_batches(
                self._work(), size=size, classes=classes, device=self._device, dtype=self._dtype, mixed=mixed
            )
            return
        augment = BatchAugment(self._augment, self._device, self._dtype)
        # On a CPU a decoder that has the pixels in its cache normalises them at no cost, if nothing comes in between.
        by_decoder = self._device.type == "cpu" and self._augment.policy is None and not self._augment.erase
        normalisation = Normalisation(self._augment.mean, self._augment.std) if by_decoder else None
        decoded = self._decoded(self._work(), self._job, size=size, rows=rows, normalisation=normalisation)
        for pixels, job, (portion, params) in decoded:
            mixing = self._mixing(portion)
            if by_decoder:
                images = self._channels_first(pixels)
                images = images if mixing is None else mix(images, mixing)
            else:
                images = augment(pixels, params, mixing)
            yield Batch(
                images=images,
                labels=self._labels(job.encoded),
                ids=job.encoded.ids,
                planned=portion.ids,
                mask=torch.ones(len(portion.ids), dtype=torch.bool, device=self._device),
                lam=None if mixing is None else self._to_device(mixing.lam),
                position=portion.position,
                micro=portion.micro,
                ready=self._event(),
            )

    def _job(self, encoded: Encoded, portion: Portion) -> tuple[DecodeJob, SampleParams]:
        params = draw(
            self._augment,
            seed=self._plan.seed,
            epoch=portion.position.epoch,
            ids=encoded.ids,
            heights=encoded.rows["height"],
            widths=encoded.rows["width"],
        )
        return DecodeJob(encoded=encoded, window=params.windows, flip=params.flips), params

    def _mixing(self, portion: Portion) -> MixParams | None:
        if not self._augment.mixes:
            return None
        block, within = divmod(self._plan.steps_before(portion.position), MIX_STEPS)
        if block != self._mix_block:
            self._mix_block, self._mixes = block, {}
        if portion.micro not in self._mixes:
            lanes = self._plan.lane_of(self._shape.rows(portion.micro))
            steps = range(block * MIX_STEPS, (block + 1) * MIX_STEPS)
            self._mixes[portion.micro] = mix_params_of(self._augment, seed=self._plan.seed, steps=steps, lanes=lanes)
        return self._mixes[portion.micro][within]


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
        super().__init__(dataset, split, device=device, dtype=dtype, options=options or LoaderOptions(), seed=0)
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
        return {"samples": self._plan.done(self._delivered)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on with an evaluation that was broken off, at whatever world size; what was prefetched is thrown away."""
        self.close()
        self._start_at(state["samples"])

    def _start_at(self, samples: int) -> None:
        plan = self._plan
        self._plan = EvalPlan(plan.samples, batch=plan.batch, world=plan.world, rank=plan.rank, start=samples)
        self._delivered = 0

    def _work(self) -> Iterator[Portion]:
        for step in range(self._plan.steps):
            yield Portion(self._plan.ids(step), Position(0, step))

    def _needs(self) -> Iterator[Need]:
        return self._plan.needs(self._dataset.shard_samples(self._split))

    def _step(self, position: Position) -> int:
        return position.step

    def _batches(self) -> Iterator[Batch]:
        size, rows = self._size, self._plan.batch
        if self._loader == "synthetic":
            classes = len(self._dataset.manifest.classes)
            yield from synthetic_batches(
                self._work(), size=size, classes=classes, device=self._device, dtype=self._dtype
            )
            return
        work = (Portion(_filled(portion.ids), portion.position) for portion in self._work())
        by_decoder = self._device.type == "cpu"
        normalisation = Normalisation(self._mean, self._std) if by_decoder else None
        decoded = self._decoded(work, self._job, size=size, rows=rows, evaluation=True, normalisation=normalisation)
        for pixels, job, (portion, _) in decoded:
            planned = self._plan.ids(portion.position.step)
            # No other sample can stand in for a bad one here: its row is left out.
            ids = np.where(planned == job.encoded.ids, planned, NO_SAMPLE)
            yield Batch(
                images=self._channels_first(pixels)
                if by_decoder
                else normalise(pixels, self._mean, self._std, self._dtype),
                labels=self._labels(job.encoded),
                ids=ids,
                planned=planned,
                mask=self._to_device(ids != NO_SAMPLE),
                position=portion.position,
                ready=self._event(),
            )

    def _job(self, encoded: Encoded, portion: Portion) -> tuple[DecodeJob, None]:
        heights, widths = encoded.rows["height"].astype(np.int32), encoded.rows["width"].astype(np.int32)
        window = np.stack([np.zeros_like(heights), np.zeros_like(widths), heights, widths], axis=1)
        resize, anchor = eval_geometry(heights, widths, self._size, self._crop_pct)
        return DecodeJob(encoded=encoded, window=window, resize=resize, anchor=anchor), None


def _filled(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows without a sample decode another one of the batch, so that it has its full shape; the mask hides them."""
    return np.where(ids == NO_SAMPLE, max(int(ids.max()), 0), ids)


def eval_geometry(
    heights: NDArray[np.int32], widths: NDArray[np.int32], size: int, crop_pct: float = CROP_PCT
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Sizes after resizing and corners of the centre crop, each int32 [n, 2], rounded the way torchvision does."""
    short = int(size / crop_pct)
    sides = np.stack([heights, widths], axis=1).astype(np.int64)
    resize = short * sides // sides.min(axis=1, keepdims=True)
    anchor = np.rint((resize - size) / 2).astype(np.int32)
    return resize.astype(np.int32), anchor
