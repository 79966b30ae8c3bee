"""Train a FAT backbone: `accelerate launch launch/train.py --variant b0 --data SET`. Reads top to bottom like a run."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

# As a script, Python puts launch/ first on the path; the project's root belongs there.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.machine.standard_streams import ignore_failing_output, open_missing_streams

if __name__ == "__main__":
    open_missing_streams()  # before libraries open files

from launch.config.command_line import parse
from launch.config.recipe import Recipe
from launch.dry_run import show_run
from launch.engine.engine import Engine
from launch.engine.execution import kernels_from_environment
from launch.engine.kernel_check import check_training_kernels
from launch.engine.schedule import rate_of
from launch.feed import Feed
from launch.jpeg_decoder import choose_jpeg_decoder
from launch.machine.world import World, connect, run_command
from launch.prepare import set_up
from launch.resilience.guards import Guards
from launch.resilience.preempt import Preemption, StopRequested, deadline
from launch.resilience.preflight import preflight
from launch.resilience.watchdog import Watchdog
from launch.run.checkpoint_folder import CheckpointFolder
from launch.run.folder import CHECKPOINTS, RunFolder
from launch.run.lock import FolderLock
from launch.run.metrics import Metrics
from launch.run.progress import SCORED, Progress
from launch.run.status import EXIT_STATUS, Preempted, read_status, write_status
from launch.run.trackers import Trackers, start_trackers
from shards.errors import UserError, open_files_error
from shards.redact import printable


def train(recipe: Recipe, world: World, lock: FolderLock) -> None:
    """One run, from the recipe to its last checkpoint, curves and weights.

    Args:
        lock: taken here at the latest, when the run folder is made.

    Raises:
        UserError: recipe, data and world do not fit together, a file is damaged, or training failed.
        Preempted: the run was asked to leave, and has been saved.
    """
    stop_at = deadline(recipe.preempt, started=time.monotonic(), job_end=os.environ.get("SLURM_JOB_END_TIME", ""))
    feed, engine, folder, trackers, messages, resolved = prepare(recipe, world, lock)
    recipe, plan = feed.recipe, feed.plan
    state, resumed = folder.resume()
    with (
        folder,
        Metrics(recipe, feed, engine, state, trackers) as metrics,
        Preemption(folder.path, world, deadline=stop_at) as preemption,
        Watchdog(folder.path, world, timeout=recipe.watchdog.hang_timeout) as watchdog,
        feed.train_loader(step=state.step, dtype=engine.input_dtype) as train_loader,
        feed.eval_loader(dtype=engine.input_dtype) as val_loader,
    ):
        metrics.begin(*resumed, *messages, *engine.notes, *feed.advice(), resolved=resolved | train_loader.resolved)
        guards = Guards(engine, recipe.watchdog)
        lr = rate_of(recipe.optim, global_batch=plan.global_batch, steps_per_epoch=plan.steps_per_epoch)

        def log() -> None:
            """Read the device: check and log the steps since the last time."""
            metrics.say(*(f"warning: {fact}" for fact in (*guards.check(), *folder.complaints())))
            metrics.interval(skipped=guards.skipped, replaced=train_loader.bad_samples)

        def save() -> Progress:
            return folder.save(replace(state, seconds=metrics.seconds))

        def evaluate() -> Progress:
            results = {}
            for scored in SCORED if recipe.optim.ema else SCORED[:1]:
                batches = watchdog.beat_on_each(preemption.until_stop(val_loader or ()))
                results[scored] = engine.evaluate(batches, average=scored == "average")
            return state.evaluated(metrics.evaluation(state.step, results))

        try:
            if state.pending_evaluation and val_loader is not None:
                state = evaluate()
                state = save()
            while state.step < feed.last_step:
                if preemption.save_requested():
                    log()
                    state = save()
                batches = metrics.take(train_loader, feed.shape.accumulation)
                result = engine.step(batches, step=state.step, lr=lr(state.step))
                guards.note(state.step, result, batches)
                metrics.step(state.step, lr(state.step), result)
                state = state.after(state.step + 1, plan.at(state.step + 1))
                watchdog.beat(state.step)

                last = state.step == feed.last_step
                ends_epoch = state.epoch_step == 0 and due(state.epoch, recipe.run.eval_every)
                saves = last or ends_epoch or due(state.step, recipe.checkpoint.save_every)
                if saves or due(state.step, recipe.log.log_every):
                    log()
                if (last or ends_epoch) and val_loader is not None:
                    state = replace(state, pending_evaluation=True)
                    state = evaluate()
                if saves:
                    state = save()
                    metrics.restart_interval()
        except StopRequested as request:
            log()
            folder.save_and_stop(replace(state, seconds=metrics.seconds), str(request))
        metrics.say(*folder.finish(state))
        metrics.finish(state)


def due(count: int, every: int | None) -> bool:
    """Whether something that happens every `every` steps (None = never) is due after step `count`."""
    return every is not None and count % every == 0


class Prepared(NamedTuple):
    """What a run needs beside its recipe."""

    feed: Feed
    engine: Engine
    folder: RunFolder
    trackers: Trackers | None
    messages: tuple[str, ...]
    resolved: dict[str, str]
    """Values of options that were left open, for the log."""


def prepare(recipe: Recipe, world: World, lock: FolderLock) -> Prepared:
    """Validate everything, then take the run folder and build the engine. Collective."""
    setup = set_up(recipe, world)
    trackers = start_trackers(setup.recipe, world, resumes=setup.resumes)
    lock.take(world, make=True)
    verdict = check_training_kernels(setup.recipe, setup.feed, setup.model)  # before anything is compiled or captured
    feed, decoder_messages = choose_jpeg_decoder(setup.feed, previous=setup.decoder_before)
    shape = feed.shape
    engine = Engine(setup.model, feed.recipe, world, micro_batch=shape.micro_rows, accumulation=shape.accumulation)
    folder = RunFolder(feed.recipe, feed, engine, verdict)
    messages = (*setup.messages, *decoder_messages)
    return Prepared(feed, engine, folder, trackers, messages, engine.resolved | verdict.resolved)


def main() -> int:
    """The command line; returns the exit status: 0 done, 1 failed, 2 bad input (with one line), 75 saved and left."""
    ignore_failing_output()
    try:
        return run_command(kernels_from_environment()(lambda: run_recipe(parse())))
    except KeyboardInterrupt:  # the training loop handles Ctrl-C itself
        print("interrupted before training began; nothing is lost", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT


def run_recipe(recipe: Recipe) -> int:
    """The run of a recipe; returns the exit status."""
    if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
        # 'never' is about the run as it was when the job was submitted, not about the job's own earlier starts.
        recipe = replace(recipe, checkpoint=replace(recipe.checkpoint, resume="auto"))
    lock = FolderLock(recipe.run.out, wait=recipe.checkpoint.lock_seconds(recipe.watchdog.hang_timeout))
    with lock, failure_in_status(recipe.run.out, lock):
        world = connect(numa_binding=recipe.parallel.numa_binding)
        if recipe.run.dry_run:
            show_run(recipe, world)
            return 0
        lock.take(world, make=False)  # a folder that bad input would leave empty is not made yet
        if world.is_main:
            write_status(recipe.run.out, "running")  # an earlier end of this run must not be taken for this one's
        warnings = preflight(recipe, world)
        if warnings and world.is_main:
            print(*map(printable, warnings), sep="\n", file=sys.stderr, flush=True)
        try:
            train(recipe, world, lock)
        except Preempted as reason:
            print(f"saved and leaving: {printable(reason)}", file=sys.stderr, flush=True)
            return EXIT_STATUS
        return 0


@contextmanager
def failure_in_status(run: Path, lock: FolderLock) -> Iterator[None]:
    """Say in RUN/status how a start failed, unless the run folder, which knows more, has done so."""
    try:
        yield
    except Exception as error:
        if lock.taken and read_status(run) == "running":
            # With the step: rank 0, which knows it, may write at the same time, and must not lose it to another rank.
            step = CheckpointFolder(run / CHECKPOINTS).newest_step()
            known = error if isinstance(error, UserError) else open_files_error(error)
            refused = known is not None and known.exit_code == UserError.exit_code
            reason = str(known) if known else f"{type(error).__name__}: {error}"
            write_status(run, "refused" if refused else "failed", step=step, reason=reason)
        raise


if __name__ == "__main__":
    sys.exit(main())
