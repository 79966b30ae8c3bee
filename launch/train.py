"""Train a FAT backbone: `accelerate launch launch/train.py --variant b0 --data SET`."""

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

# Python puts a script's folder, launch/, first on the import path; imports need the project's root there instead.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.machine.standard_streams import ignore_failing_output, open_missing_streams

if __name__ == "__main__":
    open_missing_streams()  # before libraries open files, which would get the descriptors of closed streams

from launch.config.command_line import parse
from launch.config.recipe import Recipe
from launch.dry_run import show_run
from launch.engine.engine import Engine
from launch.engine.execution import kernels_from_environment
from launch.engine.kernel_check import check_training_kernels
from launch.engine.loss import SampleResults
from launch.engine.schedule import lr_schedule
from launch.feed import Feed
from launch.jpeg_decoder import choose_jpeg_decoder
from launch.machine.world import World, connect, run_command
from launch.monitor.curves import draw_curves
from launch.monitor.metrics import Metrics
from launch.monitor.pictures import save_evaluation, save_first_batch
from launch.monitor.trackers import Trackers, start_trackers
from launch.prepare import prepare_run
from launch.resilience.guards import Guards
from launch.resilience.preempt import Preemption, StopRequested, deadline
from launch.resilience.preflight import preflight
from launch.resilience.watchdog import Watchdog
from launch.run.checkpoint_folder import CheckpointFolder
from launch.run.evaluation_record import EvaluationInfo
from launch.run.folder import CHECKPOINTS, RunFolder
from launch.run.lock import FolderLock
from launch.run.progress import WEIGHTS_KINDS, Progress, best_weights
from launch.run.status import EXIT_STATUS, Preempted, read_status, write_status
from shards.errors import UserError, first_line, open_files_error
from shards.redact import printable


def train(recipe: Recipe, world: World, lock: FolderLock) -> None:
    """Train a recipe's model, then write the last checkpoint, the curves and the weights. Collective.

    Args:
        lock: lock of the run folder; acquired here if the folder did not exist before.

    Raises:
        UserError: recipe, data and world size do not fit together, a file is damaged, or training failed.
        Preempted: the run was asked to stop, and has been saved.
    """
    stop_at = deadline(recipe.preempt, started=time.monotonic(), job_end=os.environ.get("SLURM_JOB_END_TIME", ""))
    feed, engine, folder, trackers, messages, resolved = build_components(recipe, world, lock)
    recipe, plan = feed.recipe, feed.plan
    restore = time.monotonic()
    state, resume_messages = folder.resume()
    restore = time.monotonic() - restore
    with (
        folder,
        Metrics(recipe, feed, engine, state, trackers, restore_seconds=restore) as metrics,
        Preemption(folder.path, world, deadline=stop_at) as preemption,
        Watchdog(folder.path, world, timeout=recipe.watchdog.hang_timeout) as watchdog,
        feed.train_loader(step=state.step, dtype=engine.input_dtype) as train_loader,
        feed.eval_loader(dtype=engine.input_dtype) as val_loader,
    ):
        warnings = feed.advice()
        metrics.log_start(
            *resume_messages, *messages, *engine.notes, *warnings, resolved=resolved | train_loader.resolved
        )
        guards = Guards(engine, recipe.watchdog)
        lr = lr_schedule(recipe.optim, global_batch=plan.global_batch, steps_per_epoch=plan.steps_per_epoch)

        def log() -> None:
            """Check and log the steps since the last call. Waits for the device."""
            metrics.print(*(f"warning: {fact}" for fact in (*guards.check(), *folder.save_errors())))
            metrics.log_interval(skipped=guards.skipped, replaced=train_loader.bad_samples)

        def save() -> Progress:
            started = time.monotonic()
            saved = folder.save(replace(state, seconds=metrics.seconds))
            metrics.log_checkpoint(state.step, time.monotonic() - started)
            return saved

        def evaluate() -> Progress:
            results, samples = {}, {}
            for kind in WEIGHTS_KINDS if recipe.optim.ema else WEIGHTS_KINDS[:1]:
                started = time.monotonic()
                batches = watchdog.beat_on_each(preemption.until_stop(val_loader or ()))
                samples[kind] = SampleResults()
                found = engine.evaluate(batches, average=kind == "average", samples=samples[kind])
                results[kind] = found | {"seconds": round(time.monotonic() - started, 3)}
            top1 = metrics.log_evaluation(state.step, results)
            better = best_weights(top1)
            info = EvaluationInfo(step=state.step, weights=better, outputs=samples[better].outputs)
            last = state.step == feed.last_step
            metrics.print(*save_evaluation(folder.path, feed, samples[better], info, last=last))
            return state.evaluated(top1)

        try:
            if state.pending_evaluation and val_loader is not None:
                state = evaluate()
                state = save()
            while state.step < feed.last_step:
                if preemption.save_requested():
                    log()
                    state = save()
                batches = metrics.next_batches(train_loader, feed.shape.accumulation)
                if state.step == 0 and world.is_main:
                    metrics.print(*save_first_batch(folder.path, feed, batches[0]))
                result = engine.step(batches, step=state.step, lr=lr(state.step))
                guards.note(state.step, result, batches)
                metrics.add_step(state.step, lr(state.step), result)
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
            metrics.log_stop(state.step, str(request))
            folder.save_and_stop(replace(state, seconds=metrics.seconds), str(request))
        metrics.print(*folder.finish(state))
        metrics.finish(state)
        if world.is_main:
            metrics.print(plot(folder.path))


def due(count: int, every: int | None) -> bool:
    """Return whether an action that is done every `every` steps (None: never) is due after step `count`."""
    return every is not None and count % every == 0


def plot(run: Path) -> str:
    """Plot the run's curves; return a message. An error does not fail a run whose weights are saved."""
    try:
        return f"wrote {draw_curves(run)}"
    except Exception as error:
        return f"warning: the curves could not be plotted ({first_line(error) or type(error).__name__})"


class Components(NamedTuple):
    """The objects that `train` uses, and messages for the log."""

    feed: Feed
    engine: Engine
    folder: RunFolder
    trackers: Trackers | None
    messages: tuple[str, ...]
    resolved: dict[str, str]
    """Names and chosen values of options that were not set."""


def build_components(recipe: Recipe, world: World, lock: FolderLock) -> Components:
    """Validate the run, acquire the lock of its folder and build the engine. Collective."""
    prepared = prepare_run(recipe, world)
    trackers = start_trackers(prepared.recipe, world, resumes=prepared.resumes)
    lock.acquire(world, create=True)
    # Kernels that fail the check are disabled before the model is compiled or captured with them.
    kernels = check_training_kernels(prepared.recipe, prepared.feed, prepared.model)
    feed, decoder_messages = choose_jpeg_decoder(prepared.feed, previous=prepared.previous_decoder_load)
    shape = feed.shape
    engine = Engine(prepared.model, feed.recipe, world, micro_batch=shape.micro_rows, accumulation=shape.accumulation)
    folder = RunFolder(feed.recipe, feed, engine, kernels)
    messages = (*prepared.messages, *decoder_messages)
    return Components(feed, engine, folder, trackers, messages, engine.resolved | kernels.resolved)


def main() -> int:
    """Run the command line; return the exit status: 0 done, 1 failed, 2 invalid input, 75 preempted and saved."""
    ignore_failing_output()
    try:
        return run_command(kernels_from_environment()(lambda: run_recipe(parse())))
    except KeyboardInterrupt:  # the training loop handles Ctrl-C itself
        print("interrupted before training started; nothing is lost", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT


def run_recipe(recipe: Recipe) -> int:
    """Start or resume the run of a recipe; return the exit status."""
    if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
        # `--resume never` excludes only checkpoints from before the job was submitted: a requeued job resumes its own.
        recipe = replace(recipe, checkpoint=replace(recipe.checkpoint, resume="auto"))
    lock = FolderLock(recipe.run.out, wait=recipe.checkpoint.lock_seconds(recipe.watchdog.hang_timeout))
    with lock, failure_in_status(recipe.run.out, lock):
        world = connect(numa_binding=recipe.parallel.numa_binding)
        if recipe.run.dry_run:
            show_run(recipe, world)
            return 0
        lock.acquire(world, create=False)  # no folder is created before the input has been validated
        if world.is_main:
            write_status(recipe.run.out, "running")  # replaces the status of an earlier start
        warnings = preflight(recipe, world)
        if warnings and world.is_main:
            print(*map(printable, warnings), sep="\n", file=sys.stderr, flush=True)
        try:
            train(recipe, world, lock)
        except Preempted as reason:
            print(
                f"saved and stopping: {printable(reason)}; run the same command again to resume",
                file=sys.stderr,
                flush=True,
            )
            return EXIT_STATUS
        return 0


@contextmanager
def failure_in_status(run: Path, lock: FolderLock) -> Iterator[None]:
    """Write to RUN/status why the start failed, unless `RunFolder` has already written the reason."""
    try:
        yield
    except Exception as error:
        if lock.acquired and read_status(run) == "running":
            # The status includes the step, because it may replace one in which rank 0 has just written the step.
            step = CheckpointFolder(run / CHECKPOINTS).newest_step()
            known = error if isinstance(error, UserError) else open_files_error(error)
            invalid_input = known is not None and known.exit_code == UserError.exit_code
            reason = str(known) if known else f"{type(error).__name__}: {error}"
            write_status(run, "refused" if invalid_input else "failed", step=step, reason=reason)
        raise


if __name__ == "__main__":
    sys.exit(main())
