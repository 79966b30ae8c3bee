"""The inner loop of launch/train.py on a small network, step by step, for tests that watch it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import fat
from launch.command_line import parse
from launch.engine import Engine
from launch.feed import Feed
from launch.guards import Guards
from launch.schedule import rate_of
from launch.world import World


@contextmanager
def training(data: Path, out: Path, *options: str, batch: int, device: str) -> Iterator[Callable[[], None]]:
    """A function that does one step as training does, from the next batch to the guards' note."""
    sizes = ("--size", "32", "--global-batch", str(batch), "--zero", "0")
    recipe = parse(["--data", str(data), "--out", str(out), *sizes, *options])
    world = World(0, 1, 0, 1, torch.device(device, 0) if device == "cuda" else torch.device(device))
    feed = Feed.of(recipe, world)
    shape = feed.shape
    config = fat.FATConfig(widths=(16, 32, 48, 64), depths=(1, 1, 1, 1), heads=(2, 4, 6, 8), num_classes=feed.classes)
    engine = Engine(
        fat.create_model(config), recipe, world, micro_batch=shape.micro_rows, accumulation=shape.accumulation
    )
    guards = Guards(engine, max_bad_steps=10, compare_every=0)
    rate, numbers = rate_of(recipe, feed.plan.steps_per_epoch), itertools.count()

    with feed.train_loader(step=0, dtype=engine.input_dtype) as loader:

        def step() -> None:
            number = next(numbers)
            batches = [next(loader) for _ in range(shape.accumulation)]
            guards.note(number, engine.step(batches, step=number, lr=rate(number)), batches)

        yield step
