"""The run folder of a start with a small network, without a training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

import fat
from launch.config.command_line import parse
from launch.engine.engine import Engine
from launch.engine.kernel_check import KernelCheckResult
from launch.feed import Feed
from launch.machine.world import World
from launch.resume.folder import RunFolder
from launch.run.progress import Progress
from tests.support.training_loop import CONFIG

OPTIONS = ("--size", "32", "--global-batch", "64", "--warmup-epochs", "0", "--epochs", "3", "--zero", "0")
STEPS = 22
"""Optimizer steps per epoch, with the set of digits."""


def run_folder(digits: Path, out: Path, *options: str) -> RunFolder:
    """Create a run folder, and return the `RunFolder` of a start with these training options."""
    recipe = parse(["--data", str(digits), "--out", str(out), *OPTIONS, *options])
    feed = Feed.of(recipe, World(0, 1, 0, 1, torch.device("cpu")))
    model = fat.create_model(replace(CONFIG, num_classes=feed.classes))
    engine = Engine(model, recipe, feed.world, shapes=feed.input_shapes)
    out.mkdir(parents=True, exist_ok=True)
    return RunFolder(recipe, feed, engine, KernelCheckResult())


def save(folder: RunFolder, *steps: int) -> None:
    """Start to save checkpoints of these steps, without evaluations."""
    for step in steps:
        folder.save(Progress(step=step, epoch=step // STEPS, epoch_step=step % STEPS))
    assert folder.save_errors() == []


def save_evaluated(folder: RunFolder, accuracies: dict[int, float]) -> None:
    """Save checkpoints of these steps, each with its top-1 accuracy."""
    progress = Progress()
    for step, top1 in accuracies.items():
        done = replace(progress, step=step, epoch=step // STEPS, epoch_step=step % STEPS)
        progress = folder.save(done.evaluated({"weights": top1}))
    assert folder._writer.wait()
    assert folder.save_errors() == []
