"""The inner loop of launch/train.py on a small network, for tests that run it step by step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

import fat
from launch.config.command_line import parse
from launch.config.resilience import WatchdogConfig
from launch.engine.engine import Engine
from launch.feed import Feed
from launch.machine.world import World
from launch.monitor.metrics import Metrics
from launch.optim.schedule import lr_schedule
from launch.profiling.profiler import StepProfiler
from launch.resilience.guards import Guards
from launch.resilience.preempt import Preemption
from launch.resilience.watchdog import Watchdog
from launch.run.progress import Progress

SIZE = 32
CONFIG = fat.FATConfig(widths=(16, 32, 48, 64), depths=(1, 1, 1, 1), heads=(2, 4, 6, 8))


@contextmanager
def training(
    data: Path, out: Path, *options: str, batch: int, device: str = "", world: World | None = None
) -> Iterator[Callable[[], None]]:
    """Yield a function that runs one training step, with all calls that launch/train.py makes in every step.

    Args:
        options: of launch/train.py. The ZeRO stage is 0 unless --zero is set.
        batch: global batch size.
        device: of the only process, if `world` is None.
        world: the ranks.
    """
    zero = () if "--zero" in options else ("--zero", "0")
    recipe = parse(
        ["--data", str(data), "--out", str(out), "--size", str(SIZE), "--global-batch", str(batch), *zero, *options]
    )
    world = world or World(0, 1, 0, 1, torch.device(device, 0) if device == "cuda" else torch.device(device))
    feed = Feed.of(recipe, world)
    shape = feed.shape
    model = fat.create_model(replace(CONFIG, num_classes=feed.classes))
    engine = Engine(model, recipe, world, shapes=feed.input_shapes)
    guards = Guards(engine, WatchdogConfig(compare_every=0))
    rate = lr_schedule(recipe.optim, global_batch=batch, steps_per_epoch=feed.plan.steps_per_epoch)
    numbers = itertools.count()
    out.mkdir(parents=True, exist_ok=True)

    with (
        Metrics(recipe, feed, engine, Progress()) as metrics,
        Preemption(out, world, deadline=None) as preemption,
        Watchdog(out, world, timeout=0) as watchdog,
        feed.train_loader(step=0, dtype=engine.input_dtype) as loader,
        StepProfiler(feed, engine, loader, range(feed.last_step), metrics.print) as profiler,
    ):

        def step() -> None:
            number = next(numbers)
            preemption.save_requested()
            profiler.begin_step(number)
            batches = metrics.next_batches(loader, shape.accumulation)
            result = engine.step(batches, step=number, lr=rate(number))
            guards.note(number, result, batches)
            metrics.add_step(number, rate(number), result)
            profiler.end_step(number)
            watchdog.beat(number + 1)

        yield step
