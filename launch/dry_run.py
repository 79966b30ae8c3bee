"""Describe a run without starting it (--dry-run)."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from launch.config.recipe import Recipe
from launch.engine.execution import Execution, zero_and_precision
from launch.engine.memory import check_batches_fit
from launch.feed import Feed
from launch.jpeg_decoder import choose_jpeg_decoder
from launch.machine.world import World, broadcast_from_rank0
from launch.models.cost import count
from launch.optim.fine_tuning import classifier_of
from launch.optim.optimizers import OPTIMIZERS, parameter_groups
from launch.optim.schedule import lr_schedule
from launch.prepare import prepare_run
from launch.resume.decision import ResumeDecision
from launch.resume.preview import preview_resume
from pipeline.phases.train_phase import TrainPhase
from pipeline.storage.memory_cache.layout import CacheLayout
from shards.errors import UserError
from shards.memory import GIB
from shards.redact import printable

SAMPLED_RATES = 8
MIB = 2**20


def show_run(recipe: Recipe, world: World) -> None:
    """Print a description of the run, on rank 0.

    Raises:
        UserError: recipe, data and world size do not fit together.
    """

    def warn_of_memory(feed: Feed) -> None:
        try:
            check_batches_fit(feed)
        except UserError as error:  # the run may be meant for another machine, so this is only a warning
            if world.is_main:
                print(printable(f"warning: too large for this machine: {error}"))

    run = prepare_run(recipe, world, check_memory=warn_of_memory)
    feed, decoder_messages = choose_jpeg_decoder(run.feed, previous=run.previous_dali)
    teacher = run.teacher.digest if run.teacher else None
    resumes = broadcast_from_rank0(lambda: _preview_resume(run.resume, feed, teacher), world)
    if world.is_main:
        messages = map(printable, (*run.messages, *decoder_messages, *resumes))
        print(*messages, describe_run(feed, run.model, run.execution), sep="\n")


def _preview_resume(decision: ResumeDecision, feed: Feed, teacher: str | None) -> list[str]:
    messages: list[str] = []
    try:
        messages.extend(preview_resume(decision, feed, teacher))  # keeps those before an error
    except UserError as error:
        if decision.kind != "newest":
            raise
        # The folder may be specified only for its measured throughput.
        messages.append(f"warning: the run cannot resume: {error}")
    return messages


def describe_run(feed: Feed, model: nn.Module, execution: Execution) -> str:
    """Return a table of steps, learning rates, memory and checkpoint size as text.

    If the metrics in the run folder have a throughput, the table also has the training time.
    """
    recipe, plan, shape, world = feed.recipe, feed.plan, feed.shape, feed.world
    data, phases = recipe.data, feed.phases
    zero, precision = zero_and_precision(recipe.parallel, world.device, ranks=world.size)
    total = feed.total_steps
    costs = {size: count(model, size) for size in sorted({phase.augment.size for phase in phases})}
    cost = costs[phases[-1].augment.size]
    state = 4 * cost.parameters
    optim = recipe.optim
    trained = classifier_of(model) if recipe.model.freeze_backbone else model
    gradients = 4 * sum(parameter.numel() for parameter in trained.parameters())
    moments = len(OPTIMIZERS[optim.optimizer].moments) * gradients
    shards = world.size if zero else 1
    of_phases = [costs[phase.augment.size].activation_bytes * phase.shape.micro_rows for phase in phases]
    activations = max(of_phases) * (0.5 if precision == "bf16" else 1)
    average = gradients if optim.ema else 0
    title = f"dry run of {recipe.model.spec}"
    table = Table("name", "value", show_header=False, title=title, title_justify="left")
    table.add_row(
        "data",
        Text(f"{plan.samples:,} images, {feed.classes:,} classes, {printable(feed.dataset.path)}", overflow="fold"),
    )
    table.add_row("engine", f"{f'ZeRO-{zero}' if zero else 'plain'}, {precision}, {world.size} x {world.device.type}")
    table.add_row(
        "execution",
        f"compile {execution.compile}, memory format {execution.memory_format}, "
        f"optimizer {execution.optimizer_impl}, kernels {execution.kernels}",
    )
    table.add_row(
        "batch",
        f"{plan.global_batch} = {world.size} ranks x {shape.accumulation} micro-batches x {shape.micro_rows} images; "
        f"{plan.lanes} lanes",
    )
    if feed.loader_options.memory_cache:
        table.add_row("memory cache", describe_memory_cache(feed))
    if len(phases) > 1:
        table.add_row("image sizes", describe_phases(phases, total))
    if data.evaluation_size != data.size:
        table.add_row("evaluation", f"images of {data.evaluation_size} pixels")
    table.add_row("steps", f"{total:,} = {recipe.optim.epochs} epochs x {plan.steps_per_epoch:,}")
    if recipe.run.target_top1 is not None:
        table.add_row("ends", f"after the first evaluation with top-1 of at least {recipe.run.target_top1:.2%}")
    table.add_row("omitted", f"{plan.samples % plan.global_batch} images per epoch, a different subset every epoch")
    if plan.balance is not None:
        low, high = plan.balance.draws_per_sample
        table.add_row("class balance", f"{low:.3g} to {high:.3g} draws per image and epoch; more in small classes")
    rate = lr_schedule(optim, global_batch=plan.global_batch, steps_per_epoch=plan.steps_per_epoch)
    table.add_row("schedule", f"{optim.resolved_schedule}, {optim.warmup:g} epochs of warm-up")
    steps = sorted({round(i * (total - 1) / (SAMPLED_RATES - 1)) for i in range(SAMPLED_RATES)})
    table.add_row("learning rate", "\n".join(f"step {step:>9,}  {rate(step):.3e}" for step in steps))
    table.add_row("optimizer", describe_optimizer(recipe, model))
    table.add_row("parameters", f"{cost.parameters:,}{f', {gradients // 4:,} trained' if gradients < state else ''}")
    operations = [f"{each.macs / 1e9:.3f} G per image of {size} pixels" for size, each in costs.items()]
    table.add_row("multiply-accumulates", "\n".join(operations))
    table.add_row(
        "memory per rank, about",
        f"{(state + gradients + (moments + average) / shards + activations) / MIB:,.0f} MiB: weights and gradients "
        f"{(state + gradients) / MIB:,.0f}, optimizer state {moments / shards / MIB:,.0f}, EMA "
        f"{average / shards / MIB:,.0f}, activations {activations / MIB:,.0f}",
    )
    table.add_row("checkpoint", f"{(state + moments + average) / MIB:,.0f} MiB")
    table.add_row("time", Text(_describe_time(feed, total), overflow="fold"))
    text = io.StringIO()
    Console(width=110, file=text).print(table)
    return text.getvalue().rstrip()


def describe_memory_cache(feed: Feed) -> str:
    """Return the size of the memory cache and the images that it keeps."""
    options = feed.loader_options
    budget, side = int(options.memory_cache * GIB), options.memory_cache_short_side
    layout = CacheLayout.of(feed.dataset.index("train"), budget=budget, short_side=side, seed=feed.plan.seed)
    return layout.describe(side)


def describe_phases(phases: Sequence[TrainPhase], total: int) -> str:
    """Return a line for each phase: its size, steps, micro-batch and strength of the regularization."""
    ends = [*(phase.first_step for phase in phases[1:]), total]
    lines = []
    for phase, end in zip(phases, ends, strict=True):
        shape = phase.shape
        lines.append(
            f"{phase.augment.size} pixels: steps {phase.first_step + 1:,} to {end:,}, {shape.accumulation} x "
            f"{shape.micro_rows} images per rank, strength {phase.strength:.2f}"
        )
    return "\n".join(lines)


def describe_optimizer(recipe: Recipe, model: nn.Module) -> str:
    """Return the optimizer, the loss and the factors of the layers' learning rates in one line."""
    optim = recipe.optim
    loss = optim.loss if optim.bce_target_threshold is None else f"{optim.loss} above {optim.bce_target_threshold:g}"
    parts = [optim.optimizer, f"weight decay {optim.weight_decay:g}", f"loss {loss}"]
    scales = {group["lr_scale"] for group in parameter_groups(model, optim)}
    if len(scales) > 1:
        parts.append(f"{len(scales)} learning rates, {min(scales):.3g} to {max(scales):.3g} times the schedule's")
    return ", ".join(parts)


def _describe_time(feed: Feed, total: int) -> str:
    """Return the training time at the last throughput in the run folder's metrics."""
    from launch.run.metrics_file import read_metrics

    try:
        lines = [line for line in read_metrics(feed.recipe.run.out) if line["kind"] == "train"]
    except OSError:
        lines = []
    if not lines or not lines[-1]["images_per_second"]:
        return f"unknown: no run in {printable(feed.recipe.run.out)} has measured a throughput yet"
    plan, speed = feed.plan, float(lines[-1]["images_per_second"])
    size = lines[-1].get("size") or feed.recipe.data.size
    ends = [*(phase.first_step for phase in feed.phases[1:]), total]
    # In images of the measured size: smaller images take less time in proportion to their pixels.
    steps = sum(
        (end - phase.first_step) * (phase.augment.size / size) ** 2
        for phase, end in zip(feed.phases, ends, strict=True)
    )
    hours, of_size = steps * plan.global_batch / speed / 3600, f" of {size} pixels" if len(feed.phases) > 1 else ""
    return (
        f"{total / plan.steps_per_epoch / hours:.2f} epochs per hour, {hours:,.1f} hours in total, at the last "
        f"measured throughput of {speed:,.0f} images/s{of_size}"
    )
