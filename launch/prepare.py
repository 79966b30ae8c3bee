"""Prepare a run without writing anything: resolve its recipe, check it against data and world size, build the model.

Used by training and by --dry-run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from launch.config.errors import RecipeError
from launch.config.recipe import Recipe
from launch.engine.build import build_model
from launch.engine.distillation import Teacher
from launch.engine.execution import Execution
from launch.engine.initial_weights import load_initial_weights
from launch.engine.memory import check_batches_fit
from launch.engine.sync_batchnorm import batch_norms, check_batch_norms, check_values_per_channel
from launch.feed import Feed
from launch.machine.provenance import device_name
from launch.machine.world import World, broadcast_from_rank0
from launch.optim.fine_tuning import classifier_of, set_grad_checkpointing
from launch.optim.optimizers import parameter_groups
from launch.resume.decision import ResumeDecision, decide_resume
from launch.run.saved_recipe import inherit_options, read_previous_start
from launch.run.weights_files import best_weights_file
from launch.teacher import load_teacher
from pipeline.options import DaliOptions


@dataclass(frozen=True)
class PreparedRun:
    """A validated run: data, recipe and model."""

    feed: Feed
    """Data of the run. Its recipe has inherited performance options from an earlier start (`inherit_options`)."""
    model: nn.Module
    """Initialized model, on the CPU."""
    execution: Execution
    teacher: Teacher | None
    """Teacher of a distillation, on the CPU."""
    resume: ResumeDecision
    """From which checkpoint this start resumes."""
    previous_dali: DaliOptions | None
    """Options of DALI at the run's previous start; None: unknown, or a new run."""
    messages: tuple[str, ...]

    @property
    def recipe(self) -> Recipe:
        return self.feed.recipe


def prepare_run(
    recipe: Recipe, world: World, *, check_memory: Callable[[Feed], object] = check_batches_fit
) -> PreparedRun:
    """Resolve the recipe, check it and build the model. Collective; writes nothing.

    Args:
        check_memory: function that raises an error if the batches do not fit into memory.

    Raises:
        UserError: recipe, data and world size do not fit together.
    """
    resume = broadcast_from_rank0(lambda: decide_resume(recipe.run.out, recipe.checkpoint.resume), world)
    saved, messages = read_previous_start(resume.run, world) if resume.resumes else (None, [])
    previous_dali = None
    if saved is not None:
        previous_dali = saved.recipe.data.loader.dali
        # All ranks must resolve the same recipe, so all use rank 0's device and number of cores.
        machine = broadcast_from_rank0(lambda: (device_name(world.device), world.cores), world)
        recipe, inherited = inherit_options(recipe, saved, *machine)
        messages += inherited
    feed = Feed.of(recipe, world)
    check_memory(feed)
    built = build_parts(feed)
    loaded = [] if resume.resumes else built.loaded
    messages += [*loaded, *built.teacher_messages]
    return PreparedRun(feed, built.model, built.execution, built.teacher, resume, previous_dali, tuple(messages))


class Parts(NamedTuple):
    """What is built from a recipe and its data before the training is set up."""

    model: nn.Module
    execution: Execution
    teacher: Teacher | None
    loaded: list[str]
    """Messages about the initial weights."""
    teacher_messages: list[str]


def build_parts(feed: Feed) -> Parts:
    """Build the model with its initial weights, and the teacher, and check them against the data and the world size.

    Raises:
        UserError: they do not fit together, or a file cannot be read.
    """
    recipe, world = feed.recipe, feed.world
    for phase in feed.phases:
        check_values_per_channel(recipe, phase.augment.size, phase.shape.micro_rows, world)
    accumulation = max(phase.shape.accumulation for phase in feed.phases)
    execution = Execution.of(recipe, world.device, accumulation=accumulation, ranks=world.size)
    model = build_model(recipe, feed.classes)
    check_fine_tuning(model, recipe)
    check_batch_norms(model, recipe.parallel.sync_bn, world)
    loaded = load_initial_weights(model, recipe, feed.class_list, file_of_run=best_weights_file)
    teacher, teacher_messages = load_teacher(feed)
    return Parts(model, execution, teacher, loaded, teacher_messages)


def check_fine_tuning(model: nn.Module, recipe: Recipe) -> None:
    """Check that the model has what the options of fine-tuning need.

    Raises:
        RecipeError: the model's layers or its classifier are unknown, it has no activation checkpointing, or options
            contradict each other.
    """
    if recipe.model.recalibrate_bn and not any(norm.running_mean is not None for norm in batch_norms(model)):
        raise RecipeError(
            f"--recalibrate-bn: {recipe.model.spec} has no BatchNorm layers with running statistics; omit the option"
        )
    if recipe.model.freeze_backbone and recipe.optim.layer_decay < 1:
        raise RecipeError("--layer-decay: has no effect with --freeze-backbone; omit one of the options")
    parameter_groups(model, recipe.optim)
    if recipe.model.freeze_backbone:
        classifier_of(model)
    if recipe.compile.grad_checkpointing:
        set_grad_checkpointing(model)  # raises an error if the model does not support it
        set_grad_checkpointing(model, enable=False)  # the engine enables it
