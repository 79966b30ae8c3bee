"""Train a FAT backbone: `accelerate launch launch/train.py --variant b0 --data SET`. Reads top to bottom like a run."""

from __future__ import annotations

import sys
import time
from pathlib import Path

# As a script, Python puts launch/ first on the path; the project's root belongs there.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

import fat
from launch.command_line import parse
from launch.dry_run import describe_run
from launch.engine import Engine
from launch.feed import Feed
from launch.guards import Guards
from launch.metrics import Tracker
from launch.preempt import EXIT_STATUS, Preempted, Preemption, Request, deadline
from launch.recipe import Recipe
from launch.run_folder import RunFolder
from launch.schedule import rate_of
from launch.world import World, connect, disconnect, report_error
from pipeline.rng import Stream, seed64
from shards.errors import UserError


def train(recipe: Recipe) -> None:
    """One run, from the recipe to its last checkpoint, curves and weights.

    Raises:
        UserError: recipe, data and world do not fit together, a file is damaged, or training failed.
        Preempted: the run was asked to leave, and has been saved.
    """
    started = time.time()
    world = connect()
    feed = Feed.of(recipe, world)
    model = build_model(recipe, feed.classes)
    if recipe.run.dry_run:
        say_once(world, describe_run(recipe, feed, model))
        return
    shape = feed.shape
    engine = Engine(model, recipe, world, micro_batch=shape.micro_rows, accumulation=shape.accumulation)
    folder = RunFolder(recipe, feed, engine)
    progress, story = folder.resume()
    with (
        folder,
        Tracker(recipe, feed, engine, progress) as tracker,
        Preemption(folder.path, world, deadline=deadline(recipe.run.time_limit, started)) as preemption,
        feed.train_loader(step=progress.step, dtype=engine.input_dtype) as loader,
    ):
        tracker.say(*story, *feed.advice())
        evaluation = feed.eval_loader(dtype=engine.input_dtype)
        guards = Guards(engine, max_bad_steps=recipe.run.max_bad_steps, compare_every=recipe.run.compare_every)
        rate = rate_of(recipe, feed.plan.steps_per_epoch)

        def settle() -> None:
            """Read the device: judge and log the steps since the last time."""
            tracker.say(*(f"warning: {fact}" for fact in (*guards.check(), *folder.complaints())))
            tracker.interval(skipped=guards.skipped)

        for step in range(progress.step, feed.last_step):
            request = preemption.agreed()
            if request is not Request.NOTHING and step > progress.step:
                settle()
                progress = folder.save(tracker.progress(progress, step))
            if request is Request.LEAVE:
                raise Preempted(preemption.reason or "another rank's request")

            with tracker.waiting_for_data():
                batches = [next(loader) for _ in range(shape.accumulation)]
            result = engine.step(batches, step=step, lr=rate(step))
            guards.note(step, result, batches)
            tracker.step(step, rate(step), result)

            done, ends = feed.plan.at(step + 1), step + 1 == feed.last_step
            evaluates = ends or (done.step == 0 and done.epoch % recipe.run.eval_every == 0)
            saves = evaluates or (step + 1) % (recipe.run.save_every or sys.maxsize) == 0
            if saves or (step + 1) % recipe.run.log_every == 0:
                settle()
            top1 = None
            if evaluates and evaluation is not None:
                top1 = tracker.evaluation(step + 1, engine.evaluate(evaluation))
                if recipe.optim.ema:
                    top1 = tracker.evaluation(step + 1, engine.evaluate(evaluation, average=True), kind="eval-ema")
            if saves:
                progress = folder.save(tracker.progress(progress, step + 1, top1))
                tracker.restart_interval()

        tracker.finish(progress)
        tracker.say(*folder.finish())


def build_model(recipe: Recipe, classes: int) -> torch.nn.Module:
    """The variant, initialised from the run's seed or from `--weights`.

    Raises:
        UserError: weights that do not fit.
    """
    torch.manual_seed(seed64(Stream.INIT, recipe.run.seed))
    try:
        return fat.create_model(
            f"fat_{recipe.model.variant}",
            num_classes=classes,
            drop_path=recipe.model.drop_path,
            weights=recipe.model.weights,
            replace_head=True,
        )
    except (ValueError, OSError) as error:
        raise UserError(f"--weights: {error}") from error


def say_once(world: World, text: str) -> None:
    if world.is_main:
        print(text)


def main() -> int:
    """The command line; returns the exit status: 0 done, 1 failed, 2 bad input (with one line), 75 saved and left."""
    try:
        train(parse())
        return 0
    except UserError as error:
        return report_error(error)
    except Preempted as reason:
        print(f"saved and leaving: {reason}", file=sys.stderr, flush=True)
        return EXIT_STATUS
    finally:
        disconnect()


if __name__ == "__main__":
    sys.exit(main())
