"""The loaders of training and evaluation. Each is a chain of generators that runs ahead of the consumer.

    plan -> read -> replace bad samples -> draw    `pipeline.jobs.JobStream.run`; with a GPU, in the feed process
    -> decode -> augment -> batch                  `_batches` of `TrainLoader` and `EvalLoader`

The state of a loader is the position after the last *delivered* batch. Batches that were only prefetched do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from pipeline.augment.pixels import BatchAugment, normalize
from pipeline.augment.recipe import AugmentRecipe
from pipeline.augment.workers import Workers
from pipeline.background import BackgroundLoader
from pipeline.batch import Batch, TargetOptions, timed_event
from pipeline.batch_shape import BatchShape
from pipeline.decode.job import Normalization
from pipeline.jobs import CROP_PCT, EvalJobs, PreparedBatch, TrainJobs, eval_geometry
from pipeline.loaders.epochs import EpochLoader
from pipeline.options import DaliOptions, LoaderOptions
from pipeline.phases.train_phase import TrainPhase, check_phases
from pipeline.plan import NO_SAMPLE, EvalPlan, Position, TrainPlan
from pipeline.storage.memory_cache.shared_pixels import SharedPixels
from pipeline.synthetic import synthetic_batches
from shards.errors import UserError
from shards.format.dataset import ShardSet
from shards.memory import GIB

DecodedBatch = tuple[Tensor, PreparedBatch]
"""Images on the device, and the job that they were decoded for."""

__all__ = ["Batch", "DaliOptions", "EvalLoader", "LoaderOptions", "TrainLoader", "eval_geometry"]


class TrainLoader(EpochLoader):
    """The micro-batches of one rank. A `for` loop delivers one epoch, and the next loop the following epoch.

    `pipeline.train_loader` creates a loader with fewer arguments. `next(loader)` and `stream` continue across epochs.

    The samples, crops and augmentations are functions of the plan and the recipe. They do not depend on the world size,
    the micro-batch size or `options`. Samples are read, decoded and augmented ahead of time, in background threads
    (with a GPU also in a feed process) that start at the first `next`. Use the loader as a context manager, or call
    `close`.

    Args:
        dataset: the shard set, from `pipeline.storage.remote.shard_set.open_set`.
        plan: the order of the samples.
        shape: the rows of each global batch that this rank delivers, and its micro-batch size.
        augment: the augmentation recipe; `augment.size` is the side of the images in pixels.
        epochs: number of epochs of the training, counted from its start (not from `start`). None: unlimited.
        device: device of the delivered tensors: cpu, cuda or cuda:N. With a CUDA device, DALI decodes on the GPU. None:
            the GPU of this process if there is one, else the CPU.
        dtype: floating-point dtype of the images.
        start: first position to deliver. None: the start of training.
        split: split of the set.
        options: performance options and the handling of bad samples. None: the defaults of `LoaderOptions`.
        kernels: augment with this project's Triton kernels where they are available, else with PyTorch.
        label_smoothing: label smoothing of `Batch.targets`, 0 to 1.
        num_classes: number of classes of `Batch.targets` if they are mixed or smoothed. None: that of the set.
        phases: image size, augmentation and micro-batch size by step, for progressive resizing (`phases_of`). Batches
            change between steps, without a pause. Empty: `shape` and `augment` at all steps.
        memory_cache: use the cache of another loader with the same set, seed and options, which is closed after this
            one. None: open one, if `options` asks for it.

    Raises:
        UserError: there is no such device, or `label_smoothing` or `num_classes` is out of range.
        ShardSetError: from `next`: a sample is damaged, and `options.bad_samples` allows no replacement.
        DecodeError: from `next`: a batch could not be decoded.
        UserError: the decoder that `options.loader` names is not installed, or the set cannot be read.

    Example:
        >>> from pipeline import BatchShape, TrainLoader, TrainPlan, augment_recipe, open_set
        >>> dataset = open_set("/data/imagenet-shards")
        >>> recipe = augment_recipe("fat", size=224)
        >>> plan = TrainPlan(dataset.shard_samples("train"), global_batch=1024, seed=0, pairs=recipe.mixes)
        >>> shape = BatchShape(global_batch=1024, world=8, rank=0, micro_batch=64, pairs=recipe.mixes)
        >>> with TrainLoader(dataset, plan, shape, recipe, epochs=300, device="cuda") as loader:
        ...     for epoch in range(300):
        ...         for batch in loader:
        ...             batch.images.shape, batch.targets.shape  # [64, 3, 224, 224], [64, 1000]
    """

    def __init__(
        self,
        dataset: ShardSet,
        plan: TrainPlan,
        shape: BatchShape,
        augment: AugmentRecipe,
        *,
        epochs: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        start: Position | None = None,
        split: str = "train",
        options: LoaderOptions | None = None,
        kernels: bool = True,
        label_smoothing: float = 0.0,
        num_classes: int | None = None,
        phases: Sequence[TrainPhase] = (),
        memory_cache: SharedPixels | None = None,
    ) -> None:
        phases = tuple(phases) or (TrainPhase(first_step=0, augment=augment, shape=shape),)
        check_phases(phases, shape, augment)
        classes = len(dataset.manifest.classes)
        if num_classes is not None and num_classes < classes:
            raise UserError(f"num_classes {num_classes}: the data set has {classes} classes; use at least {classes}")
        if not 0 <= label_smoothing <= 1:
            raise UserError(f"label_smoothing {label_smoothing}: expected a number from 0 to 1")
        super().__init__(
            dataset,
            split,
            plan,
            phases,
            epochs=epochs,
            start=Position(0, 0) if start is None else start,
            device=device,
            dtype=dtype,
            options=options or LoaderOptions(),
            memory_cache=memory_cache,
        )
        self._kernels = kernels
        self._targets = TargetOptions(num_classes=num_classes or classes, label_smoothing=label_smoothing)

    @property
    def num_classes(self) -> int:
        """Number of classes of the targets: `num_classes` if it was given, else that of the set."""
        return self._targets.num_classes

    @property
    def resolved(self) -> dict[str, str]:
        resolved, settings = super().resolved, self._settings
        if self._loader == "dali" and settings.gpu_cache:
            from pipeline.decode.decoded_cache import describe_capacity

            index, size = self._dataset.index(self._split), int(settings.gpu_cache * GIB)
            shown = describe_capacity(size, index["height"], index["width"], world=self.world)
            return resolved | {"cache of decoded images": shown}
        return resolved

    def _jobs(self) -> TrainJobs:
        return TrainJobs(plan=self._plan, phases=self._phases, epochs=self._epochs, start=self._next)

    def _batches(self) -> Iterator[Batch]:
        if self._loader == "synthetic":
            classes, mixed = len(self._dataset.manifest.classes), self._phases[0].augment.mixes
            yield from synthetic_batches(
                self._jobs().requests(),
                size=lambda request: self._phase(request.position).augment.size,
                classes=classes,
                device=self._device,
                dtype=self._dtype,
                mixed=mixed,
                target_options=self._targets,
            )
            return
        # On a CPU, normalizing in the decoder is free, because the pixels are still in the CPU's cache. It is possible
        # only if nothing else follows the decoder.
        recipes = [phase.augment for phase in self._phases]
        by_decoder = self._device.type == "cpu" and not any(each.policy or each.erase or each.mixes for each in recipes)
        normalization = Normalization(recipes[0].mean, recipes[0].std) if by_decoder else None
        rows = max(phase.shape.micro_rows for phase in self._phases)
        with (
            self._prepare(self._jobs()) as prepared,
            # Close explicitly: the traceback of an error in a later stage would keep these generators alive.
            closing(self._decode(prepared, rows=rows, normalization=normalization)) as decoded,
            Workers(self._settings.decode_threads) as workers,
        ):
            augment = self._to_channels_first if by_decoder else self._augmenter(workers)
            augmented = self.stage_trace.map("augment", augment, decoded)
            yield from self.stage_trace.map("transfer", self._batch, augmented)

    def _to_channels_first(self, decoded: DecodedBatch) -> DecodedBatch:
        pixels, batch = decoded
        return self._channels_first(pixels), batch

    def _augmenter(self, workers: Workers) -> Callable[[DecodedBatch], DecodedBatch]:
        """Return a function that applies RandAugment, normalization, random erasing and mixing on the device."""
        augment = {  # the size is the only field that an augmentation of decoded pixels takes from its recipe
            phase.augment.size: BatchAugment(
                phase.augment, self._device, self._dtype, kernels=self._kernels, workers=workers
            )
            for phase in self._phases
        }

        def augmented(decoded: DecodedBatch) -> DecodedBatch:
            pixels, batch = decoded
            assert batch.params is not None
            return augment[batch.job.size](pixels, batch.params, batch.mixing), batch

        return augmented

    def _batch(self, augmented: DecodedBatch) -> Batch:
        images, batch = augmented
        request, encoded, mixing = batch.request, batch.job.encoded, batch.mixing
        return Batch(
            images=images,
            labels=self._labels(encoded),
            ids=encoded.ids,
            planned=request.ids,
            mask=torch.ones(len(request.ids), dtype=torch.bool, device=self._device),
            lam=None if mixing is None else self._to_device(mixing.lam),
            target_options=self._targets,
            position=request.position,
            micro=request.micro,
            ready=timed_event(self._device),
        )


class EvalLoader(BackgroundLoader):
    """Iterable over the batches of one rank of an evaluation. All ranks together deliver each sample exactly once.

    Each call of `iter` starts a new evaluation. The images are resized (bicubic) so that the short side has
    `size / crop_pct` pixels, and the center `size` x `size` pixels are cropped. A bad sample that may be skipped
    (`options`) is not replaced: its row is excluded by the batch's mask.

    Args:
        dataset: the shard set, from `pipeline.storage.remote.shard_set.open_set`.
        plan: the samples of this rank.
        size: side of the images in pixels.
        mean, std: normalization of the red, green and blue channels, for values in 0 to 1.
        device: device of the delivered tensors: cpu, cuda or cuda:N. With a CUDA device, DALI decodes on the GPU. None:
            the GPU of this process if there is one, else the CPU.
        dtype: floating-point dtype of the images.
        split: split of the set.
        crop_pct: the crop's side as a fraction of the resized short side (timm's `crop_pct`), above 0, at most 1.
        options: performance options and the handling of bad samples. None: the defaults of `LoaderOptions`.

    Raises:
        ShardSetError: from `next`: a sample is damaged, and `options.bad_samples` does not allow skipping it.
        DecodeError: from `next`: a batch could not be decoded.
        UserError: the decoder that `options.loader` names is not installed, or the set cannot be read.
    """

    def __init__(
        self,
        dataset: ShardSet,
        plan: EvalPlan,
        *,
        size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        device: torch.device | str | None = None,
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
        """Start an evaluation, or resume the evaluation whose state was just loaded."""
        if self._prefetcher is not None or self._delivered:
            self.close()
            self._start_at(0)
        return self

    def __len__(self) -> int:
        """Return the number of batches of this evaluation."""
        return self._plan.steps

    def __next__(self) -> Batch:
        batch = super().__next__()
        self._delivered += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        """Return how many samples of the split were delivered over all ranks, and how many it has.

        Returns:
            `{"samples": int, "of": int}`.
        """
        return {"samples": self._plan.samples_done(self._delivered), "of": self._plan.samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume an interrupted evaluation, at any world size. Prefetched batches are discarded.

        Raises:
            UserError: the state is that of a split with another number of samples, or of another loader.
        """
        if state.keys() != {"samples", "of"} or state["of"] != self._plan.samples:
            raise UserError(
                f"the state {state} is not one of an evaluation of this split, which has {self._plan.samples} samples"
            )
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
        if self._loader == "synthetic":
            classes = len(self._dataset.manifest.classes)
            yield from synthetic_batches(
                self._jobs().planned(),
                size=lambda _: self._size,
                classes=classes,
                device=self._device,
                dtype=self._dtype,
            )
            return
        by_decoder = self._device.type == "cpu"
        normalization = Normalization(self._mean, self._std) if by_decoder else None
        with (
            self._prepare(self._jobs()) as prepared,
            closing(
                self._decode(prepared, rows=self._plan.batch, evaluation=True, normalization=normalization)
            ) as decoded,
        ):
            for_device = self._channels_first if by_decoder else self._normalize
            normalized = self.stage_trace.map("augment", lambda each: (for_device(each[0]), each[1]), decoded)
            yield from self.stage_trace.map("transfer", self._batch, normalized)

    def _normalize(self, pixels: Tensor) -> Tensor:
        return normalize(pixels, self._mean, self._std, self._dtype)

    def _batch(self, normalized: DecodedBatch) -> Batch:
        images, batch = normalized
        position, encoded = batch.request.position, batch.job.encoded
        planned = self._plan.ids(position.step)
        # An evaluation has no replacement samples: the row of a bad sample is masked out.
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
