"""The data side of a run: shard set, augmentation, plan and loaders, as functions of recipe, seed and world."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

import fat
from launch.config.errors import RecipeError
from launch.config.recipe import Recipe
from launch.engine.input_shapes import InputShape
from launch.machine.world import World
from launch.run.progress import Progress
from pipeline.augment.recipe import AugmentRecipe
from pipeline.batch import Batch
from pipeline.batch_shape import BatchShape, check_enough_samples
from pipeline.loader import EvalLoader, LoaderOptions, TrainLoader
from pipeline.phases.train_phase import TrainPhase, phase_at, phases_of
from pipeline.plan import EvalPlan, TrainPlan
from pipeline.storage.memory_cache.shared_pixels import SharedPixels
from shards.format.dataset import ShardSet

# Larger batches need more memory and do not make evaluation faster.
MAX_EVAL_BATCH = 256
# With fewer rows per micro-batch, launching kernels takes longer than running them, for every variant.
MIN_ROWS_PER_GPU = 32
# Linear scaling of AdamW's learning rate, with 20 epochs of warm-up, is known to work up to about this batch size.
LARGE_BATCH = 4096


@dataclass(frozen=True)
class Feed:
    """Shard set, augmentation and plan of a run, and this rank's part of every batch."""

    recipe: Recipe
    world: World
    dataset: ShardSet
    augment: AugmentRecipe
    shape: BatchShape
    plan: TrainPlan

    @classmethod
    def of(cls, recipe: Recipe, world: World) -> Feed:
        """Open the shard set and compute the plan.

        Raises:
            UserError: the set does not exist or is damaged, or batch sizes, lanes and world size do not fit together.
        """
        data = recipe.data
        augment = data.augmentation()
        dataset = data.open(local_ranks=world.local_size, seed=recipe.run.seed)
        layout: dict[str, Any] = {"world": world.size, "micro_batch": data.micro_batch, "pairs": augment.mixes}
        # This check comes first, because the global batch that its error message suggests also passes the later checks.
        check_enough_samples(dataset.split("train").samples, data.global_batch, lanes=data.lanes, **layout)
        shape = BatchShape(global_batch=data.global_batch, rank=world.rank, **layout)
        plan = TrainPlan(
            dataset.shard_samples("train"),
            global_batch=data.global_batch,
            seed=recipe.run.seed,
            lanes=data.lanes,
            shuffle_block_size=data.shuffle_block_size,
            pairs=augment.mixes,
            class_balance=data.class_balance,
            labels=dataset.index("train")["label"] if data.class_balance else None,
        )
        classes = len(dataset.manifest.classes)
        if recipe.model.classes is not None and recipe.model.classes < classes:
            raise RecipeError(
                f"--classes {recipe.model.classes}: the data set has {classes} classes; use at least {classes}"
            )
        recipe.optim.rates(plan.global_batch)  # raises an error for contradictory rates
        if recipe.run.target_top1 is not None and "val" not in dataset.manifest.splits:
            raise RecipeError(
                f"--target-top1: {dataset.path} has no validation split, so no accuracy is measured; omit the option, "
                "or create a validation split with 'pipeline shard --val-fraction 0.1'"
            )
        for split in dataset.manifest.splits:
            dataset.check_sizes(split)  # the loaders check this too, but only after files were written
        feed = cls(recipe, world, dataset, augment, shape, plan)
        _ = feed.phases  # raises an error if the size schedule does not fit the epochs, or a micro-batch the rank
        return feed

    @cached_property
    def phases(self) -> tuple[TrainPhase, ...]:
        """Image size, augmentation and micro-batch by step; a single phase without a size schedule."""
        data = self.recipe.data
        return phases_of(
            data.sizes,
            augment=self.augment,
            shape=self.shape,
            total_steps=self.total_steps,
            steps_per_epoch=self.plan.steps_per_epoch,
            min_strength=data.min_strength,
            micro_batches=data.micro_batches,
        )

    def phase_at(self, step: int) -> TrainPhase:
        """Return the phase of an optimizer step."""
        return phase_at(self.phases, step)

    @property
    def input_shapes(self) -> tuple[InputShape, ...]:
        """Shapes of this rank's training batches, in order of use."""
        return tuple(
            InputShape(phase.shape.micro_rows, phase.augment.size, phase.shape.accumulation, phase.strength)
            for phase in self.phases
        )

    @property
    def classes(self) -> int:
        """Number of outputs of the model: that of the recipe, else the number of classes in the data set."""
        return self.recipe.model.classes or len(self.dataset.manifest.classes)

    @property
    def class_list(self) -> fat.ClassList:
        """Classes of the data set. The model may have more outputs."""
        entries = self.dataset.manifest.classes
        return fat.ClassList.of([entry.folder for entry in entries], [entry.name for entry in entries])

    def advice(self) -> list[str]:
        """Return facts about the selected samples, warnings about inefficient or untested sizes, an unshuffled set, and
        notes of the set's conversion."""
        lines = self._sampling()
        rows, minimum = min(phase.shape.micro_rows for phase in self.phases), MIN_ROWS_PER_GPU
        if self.world.device.type == "cuda" and rows < minimum:
            lines.append(
                f"warning: {rows} images per GPU and forward pass are too few to keep a GPU busy; {minimum} or more "
                f"are enough; use fewer GPUs than {self.world.size}, or a larger --global-batch (docs/optimization.md)"
            )
        if self.plan.global_batch > LARGE_BATCH:
            lines.append(
                f"warning: --global-batch {self.plan.global_batch} is much larger than the 1024 for which the default "
                "learning rates and warm-up were chosen; see docs/optimization.md for large batches"
            )
        if self.phases[-1].augment.size != self.recipe.data.size:
            lines.append(
                f"warning: --size-schedule {self.recipe.data.size_schedule}: no step has images of --size "
                f"{self.recipe.data.size}; the last ones have {self.phases[-1].augment.size} pixels"
            )
        optim = self.recipe.optim
        if optim.resolved_schedule == "cosine-from-start" and optim.warmup > 2 * optim.max_warmup:
            remaining = 0.5 * (1 + math.cos(math.pi * optim.warmup / optim.epochs))
            lines.append(
                f"warning: --warmup-epochs {optim.warmup:g} of --epochs {optim.epochs}: the cosine spans all epochs, "
                f"so the learning rate drops to {remaining:.0%} of --lr after warm-up; use at most "
                f"{optim.max_warmup:g}, or --schedule cosine"
            )
        manifest = self.dataset.manifest
        lines += [f"warning: {self.dataset.path}: {warning}" for warning in manifest.made.get("warnings", [])]
        if "val" not in manifest.splits:
            lines.append(
                f"warning: {self.dataset.path} has no validation split: nothing is evaluated, and no checkpoint is "
                "marked as best; 'pipeline shard --val-fraction 0.1' creates a validation split"
            )
        if not manifest.shuffled:
            run = manifest.made.get("class_run", {}).get("train", 1.0)
            lines.append(
                f"warning: {self.dataset.path} was not shuffled by 'pipeline shard': on average {run:.1f} consecutive "
                f"samples have the same class (about 1 in a shuffled set), and training only mixes {self.plan.lanes} "
                f"lanes and shuffles blocks of {self.plan.shuffle_block_size}; if this number is large, convert the "
                "source again"
            )
        return lines

    def _sampling(self) -> list[str]:
        """Return which part of the set is used, and how often images are drawn with class balance."""
        lines, dataset = [], self.dataset
        if dataset.restricted:
            complete = dataset.complete_manifest
            removed = sorted(complete.splits.keys() - dataset.manifest.splits)
            without = f"; without images of these classes: split {', '.join(removed)}" if removed else ""
            lines.append(
                f"selected {len(dataset.manifest.classes):,} of {len(complete.classes):,} classes and "
                f"{self.plan.samples:,} of {complete.splits['train'].samples:,} training images{without}"
            )
        if self.plan.balance is not None:
            low, high = self.plan.balance.draws_per_sample
            lines.append(
                f"class balance {self.recipe.data.class_balance:g}: an epoch has {self.plan.samples:,} draws; an image "
                f"is drawn {low:.3g} times per epoch in the largest class, {high:.3g} times in the smallest"
            )
        return lines

    @property
    def last_step(self) -> int:
        """Optimizer step at which the run ends at the latest, counted from the start of training."""
        stop = self.recipe.run.stop_after
        return self.total_steps if stop is None else min(self.total_steps, stop)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all epochs."""
        return self.recipe.optim.epochs * self.plan.steps_per_epoch

    def finished(self, progress: Progress) -> bool:
        """Return whether a run with this progress does no further steps: all are done, or the target is reached."""
        return progress.step >= self.last_step or progress.reached(self.recipe.run.target_top1)

    def train_loader(
        self, *, step: int, dtype: torch.dtype, epochs: int | None = None, memory_cache: SharedPixels | None = None
    ) -> TrainLoader:
        """Return a loader of this rank's micro-batches from optimizer step `step` to the end of training.

        Args:
            epochs: number of epochs after which the loader ends instead, counted from the start of training.
            memory_cache: see `TrainLoader`.
        """
        return TrainLoader(
            self.dataset,
            self.plan,
            self.shape,
            self.augment,
            epochs=epochs or self.recipe.optim.epochs,
            start=self.plan.at(step),
            device=self.world.device,
            dtype=dtype,
            options=self.loader_options,
            kernels=fat.kernels.mode() != "off",
            phases=self.phases,
            memory_cache=memory_cache,
        )

    @contextmanager
    def recalibration_batches(
        self, *, dtype: torch.dtype, memory_cache: SharedPixels | None
    ) -> Iterator[Iterator[Batch]]:
        """Open this rank's part of the global batches of --recalibrate-bn.

        They follow the last epoch, with the image size and the augmentation of the last phase.

        Args:
            memory_cache: that of the training loader, because a node may not have the memory for another one.
        """
        steps, epochs = self.recipe.model.recalibrate_bn, self.recipe.optim.epochs
        end = epochs + math.ceil(steps / self.plan.steps_per_epoch)
        # Nor may a GPU have the memory for another cache. The images are still decoded whole, as with the cache.
        dali = replace(self.loader_options.dali, decode=self.loader_options.settings.decode, gpu_cache=None)
        feed = self.with_loader(dali=dali)
        with feed.train_loader(step=self.total_steps, dtype=dtype, epochs=end, memory_cache=memory_cache) as loader:
            yield itertools.islice(loader.stream(), steps * self.phases[-1].shape.accumulation)

    @property
    def loader_options(self) -> LoaderOptions:
        """Loader options of the recipe. By default a rank has as many decode threads as cores."""
        options = self.recipe.data.loader
        return options if options.decode_threads else replace(options, decode_threads=self.world.cores)

    def with_recipe(self, recipe: Recipe) -> Feed:
        """Return a copy with `recipe`, which may differ only in options that do not affect the plan."""
        return replace(self, recipe=recipe)

    def with_loader(self, **changes: Any) -> Feed:
        """Return a copy with changed fields of `LoaderOptions`."""
        data = self.recipe.data
        data = replace(data, loader=replace(data.loader, **changes))
        return self.with_recipe(replace(self.recipe, data=data))

    @property
    def eval_rows(self) -> int:
        """Images per evaluation batch of this rank. The last batch may have fewer."""
        return self.recipe.data.eval_batch or min(MAX_EVAL_BATCH, self.shape.rank_rows)

    def eval_loader(self, *, dtype: torch.dtype) -> AbstractContextManager[EvalLoader | None]:
        """Return a loader of this rank's part of the validation split, which the caller closes.

        None if the set has no validation split.
        """
        if "val" not in self.dataset.manifest.splits:
            return nullcontext()
        samples = self.dataset.split("val").samples
        return EvalLoader(
            self.dataset,
            EvalPlan(samples, batch=self.eval_rows, world=self.world.size, rank=self.world.rank),
            size=self.recipe.data.evaluation_size,
            crop_pct=self.recipe.data.crop_pct,
            mean=self.augment.mean,
            std=self.augment.std,
            device=self.world.device,
            dtype=dtype,
            options=self.loader_options,
        )
