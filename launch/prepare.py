"""Check that recipe, data and processes fit together, before anything is written: for training and for --dry-run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import fat
from launch.config.recipe import Recipe
from launch.engine.build import build_model, load_initial_weights
from launch.engine.execution import Execution
from launch.engine.memory import check_batches_fit
from launch.engine.sync_batchnorm import check_values_per_channel
from launch.feed import Feed
from launch.machine.provenance import device_name
from launch.machine.world import World, broadcast_from_rank0
from launch.run.folder import will_resume
from launch.run.saved_recipe import inherit_options, read_previous_start


@dataclass(frozen=True)
class Setup:
    """What will be trained, on which data."""

    feed: Feed
    """With the recipe, in which options that the command line leaves open may come from an earlier start."""
    model: fat.FAT
    """Initialized, on the CPU."""
    execution: Execution
    resumes: bool
    """Whether the run folder holds a part of this run."""
    decoder_before: float | None
    """`hw_decoder_load` with which the run began; None = not known, or a new run."""
    messages: tuple[str, ...]

    @property
    def recipe(self) -> Recipe:
        return self.feed.recipe


def set_up(recipe: Recipe, world: World, *, check_memory: Callable[[Feed], object] = check_batches_fit) -> Setup:
    """Resolve the recipe and build the model. Collective; writes nothing.

    Raises:
        UserError: recipe, data and world do not fit together.
    """
    resumes = broadcast_from_rank0(lambda: will_resume(recipe), world)
    saved, messages = read_previous_start(recipe.run.out, world) if resumes else (None, [])
    decoder_before = None
    if saved is not None:
        decoder_before = saved.recipe.data.loader.dali.hw_decoder_load
        # Of rank 0 on all ranks: their cores may differ.
        machine = broadcast_from_rank0(lambda: (device_name(world.device), world.cores), world)
        recipe, inherited = inherit_options(recipe, saved, *machine)
        messages += inherited
    feed = Feed.of(recipe, world)
    check_memory(feed)
    check_values_per_channel(recipe, feed.shape.micro_rows, world)
    execution = Execution.of(recipe, world.device, accumulation=feed.shape.accumulation, ranks=world.size)
    model = build_model(recipe, feed.classes)
    loaded = load_initial_weights(model, recipe, feed.class_list)
    return Setup(feed, model, execution, resumes, decoder_before, (*messages, *(() if resumes else loaded)))
