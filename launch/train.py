"""Train a FAT backbone: `accelerate launch launch/train.py --variant b0 --data SET`. Reads top to bottom like a run."""

from __future__ import annotations

import sys
from pathlib import Path

# As a script, Python puts launch/ first on the path; the project's root belongs there.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

import fat
from launch.engine import Engine
from launch.feed import Feed
from launch.metrics import Tracker
from launch.recipe import Recipe, parse
from launch.run_folder import RunFolder
from launch.schedule import rate_of
from launch.world import connect, disconnect, report_error
from pipeline.loader import EvalLoader
from pipeline.rng import Stream, seed64
from shards.errors import UserError


def train(recipe: Recipe) -> None:
    """One run, from the recipe to its last checkpoint, curves and weights.

    Raises:
        UserError: recipe, data and world do not fit together, or a file is damaged.
    """
    world = connect()
    feed = Feed.of(recipe, world)
    engine = Engine(
        build_model(recipe, classes=len(feed.dataset.manifest.classes)),
        recipe,
        world,
        micro_batch=feed.shape.micro_rows,
        accumulation=feed.shape.accumulation,
    )

    folder = RunFolder(recipe, feed, engine)
    progress = folder.resume()
    tracker = Tracker(folder.path, world, progress=progress, total_steps=feed.last_step, images=feed.plan.global_batch)
    for line in folder.story:
        tracker.say(line)
    tracker.start(engine.description)

    rate = rate_of(recipe, feed.plan.steps_per_epoch)
    evaluation = feed.eval_loader(dtype=engine.input_dtype)
    with feed.train_loader(step=progress.step, dtype=engine.input_dtype) as loader:
        for step in range(progress.step, feed.last_step):
            with tracker.waiting_for_data():
                batches = [next(loader) for _ in range(feed.shape.accumulation)]
            tracker.step(step, batches[0].position.epoch, rate(step), engine.step(batches, step=step, lr=rate(step)))

            position = feed.plan.at(step + 1)
            ends = step + 1 == feed.last_step
            if (step + 1) % recipe.run.log_every == 0 or ends:
                tracker.interval()
            if ends or (position.step == 0 and position.epoch % recipe.run.eval_every == 0):
                top1 = evaluate(engine, evaluation, tracker, step + 1, position.epoch)
                progress = folder.save(tracker.progress(progress, step + 1, position, top1))
                tracker.resume_clock()

    tracker.finish(progress)
    folder.finish()
    for line in folder.story:
        tracker.say(line)
    tracker.close()


def build_model(recipe: Recipe, *, classes: int) -> torch.nn.Module:
    """The variant, initialised from the run's seed."""
    torch.manual_seed(seed64(Stream.INIT, recipe.run.seed))
    return fat.create_model(f"fat_{recipe.model.variant}", num_classes=classes, drop_path=recipe.model.drop_path)


def evaluate(engine: Engine, loader: EvalLoader | None, tracker: Tracker, step: int, epoch: int) -> float | None:
    """Top-1 (share) over the whole validation split, each image once; None where there is no such split."""
    if loader is None:
        return None
    result = engine.evaluate(loader)
    tracker.evaluation(step, epoch, result)
    return result["top1"]


def main() -> int:
    """The command line; returns the exit status: 0 done, 1 failed, 2 bad input (with one clear line)."""
    try:
        train(parse())
        return 0
    except UserError as error:
        return report_error(error)
    finally:
        disconnect()


if __name__ == "__main__":
    sys.exit(main())
