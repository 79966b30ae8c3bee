"""What a run is fed: a function of the shard set, the recipe and the seed."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

import fat
from launch.config.errors import RecipeError
from launch.config.recipe import Recipe
from launch.machine.world import World
from pipeline.augment.recipe import AugmentRecipe
from pipeline.batch_shape import BatchShape, check_enough_samples
from pipeline.loader import EvalLoader, LoaderOptions, TrainLoader
from pipeline.plan import EvalPlan, TrainPlan
from shards.format.dataset import ShardSet

# More rows than this make an evaluation no faster, only larger.
MAX_EVAL_BATCH = 256
# Below this many rows, launching kernels takes longer than running them, whatever the variant.
MIN_ROWS_PER_GPU = 32
# AdamW with linear scaling and 20 epochs of warm-up is known to hold to about here.
LARGE_BATCH = 4096


@dataclass(frozen=True)
class Feed:
    """The data side of a run: set, augmentation, order, and this rank's part of it."""

    recipe: Recipe
    world: World
    dataset: ShardSet
    augment: AugmentRecipe
    shape: BatchShape
    plan: TrainPlan

    @classmethod
    def of(cls, recipe: Recipe, world: World) -> Feed:
        """Open the set and lay the plan.

        Raises:
            UserError: no such set, a damaged one, or sizes that do not fit together.
        """
        data = recipe.data
        augment = data.augmentation()
        dataset = data.open(local_ranks=world.local_size)
        how: dict[str, Any] = {"world": world.size, "micro_batch": data.micro_batch, "pairs": augment.mixes}
        # First, so that the global batch that it names fits everything else too.
        check_enough_samples(dataset.split("train").samples, data.global_batch, lanes=data.lanes, **how)
        shape = BatchShape(global_batch=data.global_batch, rank=world.rank, **how)
        plan = TrainPlan(
            dataset.shard_samples("train"),
            global_batch=data.global_batch,
            seed=recipe.run.seed,
            lanes=data.lanes,
            shuffle_block_size=data.shuffle_block_size,
            pairs=augment.mixes,
        )
        classes = len(dataset.manifest.classes)
        if recipe.model.classes is not None and recipe.model.classes < classes:
            raise RecipeError(f"--classes {recipe.model.classes}: the data set has {classes}; use at least as many")
        for split in dataset.manifest.splits:
            dataset.check_sizes(split)  # loaders do so as well; here it comes before anything is written
        return cls(recipe, world, dataset, augment, shape, plan)

    @property
    def classes(self) -> int:
        """Classes of the model: the recipe's, else the data set's."""
        return self.recipe.model.classes or len(self.dataset.manifest.classes)

    @property
    def class_list(self) -> fat.ClassList:
        """Classes of the data set; the model may have more outputs."""
        entries = self.dataset.manifest.classes
        return fat.ClassList.of([entry.folder for entry in entries], [entry.name for entry in entries])

    def advice(self) -> list[str]:
        """Warnings about sizes that keep no GPU busy or that the recipe was not made for, and doubts about the data."""
        lines = []
        rows, wanted = self.shape.micro_rows, MIN_ROWS_PER_GPU
        if self.world.device.type == "cuda" and rows < wanted:
            lines.append(
                f"warning: {rows} images per GPU and forward pass cannot keep a GPU busy, {wanted} or more can; "
                f"use fewer GPUs than {self.world.size}, or a larger --global-batch (docs/training.md, Large batches)"
            )
        if self.plan.global_batch > LARGE_BATCH:
            lines.append(
                f"warning: a global batch of {self.plan.global_batch} is beyond what the recipe was made for (1024); "
                "see docs/training.md, Large batches, for the learning rate and warm-up"
            )
        optim = self.recipe.optim
        if optim.warmup > 2 * optim.max_warmup:
            share = 0.5 * (1 + math.cos(math.pi * optim.warmup / optim.epochs))
            lines.append(
                f"warning: --warmup-epochs {optim.warmup:g} of --epochs {optim.epochs}: the cosine spans all epochs, "
                f"so the rate falls to {share:.0%} of --lr when warm-up ends; use at most {optim.max_warmup:g}"
            )
        manifest = self.dataset.manifest
        lines += [f"note: {self.dataset.path}: {doubt}" for doubt in manifest.made.get("doubts", [])]
        if "val" not in manifest.splits:
            lines.append(
                f"warning: {self.dataset.path} has no validation split: nothing is evaluated, and there is no best "
                "checkpoint; 'pipeline shard --val-fraction 0.1' makes one"
            )
        if not manifest.shuffled:
            run = manifest.made.get("class_run", {}).get("train", 1.0)
            lines.append(
                f"warning: {self.dataset.path} was not shuffled by 'pipeline shard'; its samples come in runs of "
                f"{run:.1f} of one class on average (shuffled ones of about 1), mixed over {self.plan.lanes} lanes "
                f"and shuffle blocks of {self.plan.shuffle_block_size}; if runs are long, shard the set anew"
            )
        return lines

    @property
    def last_step(self) -> int:
        """Optimiser steps of the run, from the start of training."""
        whole = self.recipe.optim.epochs * self.plan.steps_per_epoch
        stop = self.recipe.run.stop_after
        return whole if stop is None else min(whole, stop)

    def train_loader(self, *, step: int, dtype: torch.dtype) -> TrainLoader:
        """This rank's micro-batches from optimiser step `step` to the end of training."""
        return TrainLoader(
            self.dataset,
            self.plan,
            self.shape,
            self.augment,
            epochs=self.recipe.optim.epochs,
            start=self.plan.at(step),
            device=self.world.device,
            dtype=dtype,
            options=self.loader_options,
            kernels=fat.kernels.mode() != "off",
        )

    @property
    def loader_options(self) -> LoaderOptions:
        """The recipe's, with this rank's share of the cores."""
        options = self.recipe.data.loader
        return options if options.decode_threads else replace(options, decode_threads=self.world.cores)

    def with_recipe(self, recipe: Recipe) -> Feed:
        """The same for a recipe that differs in how the loader works."""
        return replace(self, recipe=recipe)

    def with_loader(self, **changes: Any) -> Feed:
        """The same by a loader that works otherwise; `changes` of `LoaderOptions`."""
        data = self.recipe.data
        data = replace(data, loader=replace(data.loader, **changes))
        return self.with_recipe(replace(self.recipe, data=data))

    @property
    def eval_rows(self) -> int:
        """Images of this rank's batches in an evaluation; the last one may have fewer."""
        return self.recipe.data.eval_batch or min(MAX_EVAL_BATCH, self.shape.rank_rows)

    def eval_loader(self, *, dtype: torch.dtype) -> AbstractContextManager[EvalLoader | None]:
        """This rank's share of the validation split, to be closed; None where the set has none."""
        if "val" not in self.dataset.manifest.splits:
            return nullcontext()
        samples = self.dataset.split("val").samples
        return EvalLoader(
            self.dataset,
            EvalPlan(samples, batch=self.eval_rows, world=self.world.size, rank=self.world.rank),
            size=self.recipe.data.size,
            crop_pct=self.recipe.data.crop_pct,
            mean=self.augment.mean,
            std=self.augment.std,
            device=self.world.device,
            dtype=dtype,
            options=self.loader_options,
        )
