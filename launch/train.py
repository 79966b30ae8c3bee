"""Train a FAT backbone: `accelerate launch launch/train.py --variant b0 --data SET`. Reads top to bottom like a run."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

# As a script, Python puts launch/ first on the path; the project's root belongs there.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.machine.standard_streams import ignore_failing_output, open_missing_streams

if __name__ == "__main__":
    open_missing_streams()  # before libraries open files

from launch.config.command_line import parse
from launch.config.recipe import Recipe
from launch.dry_run import show_run
from launch.engine.build import build_model, load_initial_weights
from launch.engine.engine import Engine
from launch.engine.execution import Execution
from launch.engine.kernel_check import check_recipe
from launch.engine.memory import check_batches_fit
from launch.engine.schedule import rate_of
from launch.engine.sync_batchnorm import check_values_per_channel
from launch.feed import Feed
from launch.jpeg_decoder import with_decoder
from launch.machine.provenance import device_name
from launch.machine.world import World, connect, run_command
from launch.resilience.guards import Guards
from launch.resilience.preempt import Preemption, Request, deadline
from launch.resilience.preflight import preflight
from launch.resilience.watchdog import Watchdog
from launch.run.checkpoint import SCORED, CheckpointFolder, Scored
from launch.run.folder import CHECKPOINTS, RunFolder, goes_on
from launch.run.lock import FolderLock
from launch.run.metrics import Tracker
from launch.run.saved_recipe import inherit_options, read_previous_start
from launch.run.status import EXIT_STATUS, Preempted, read_status, write_status
from launch.run.trackers import start_trackers
from shards.redact import printable


def train(recipe: Recipe, world: World, lock: FolderLock) -> None:  # noqa: PLR0915
    """One run, from the recipe to its last checkpoint, curves and weights.

    Args:
        lock: taken here at the latest, when the run folder is made.

    Raises:
        UserError: recipe, data and world do not fit together, a file is damaged, or training failed.
        Preempted: the run was asked to leave, and has been saved.
    """
    resumes = goes_on(recipe)
    saved, messages = read_previous_start(recipe.run.out, world) if resumes else (None, [])
    if saved is not None:
        recipe, inherited = inherit_options(recipe, saved, device_name(world.device), world.cores)
        messages += inherited
    leave_at = deadline(recipe.preempt, started=time.monotonic())
    feed = Feed.of(recipe, world)
    check_batches_fit(feed)
    check_values_per_channel(recipe, feed.shape.micro_rows, world)
    # Reject invalid combinations of options before creating files.
    Execution.of(recipe, world.device, accumulation=feed.shape.accumulation, ranks=world.size)
    model = build_model(recipe, feed.classes)
    loaded = load_initial_weights(model, recipe, feed.class_list)
    trackers = start_trackers(recipe, world, goes_on=resumes)
    lock.take(world, make=True)
    verdict = check_recipe(recipe, feed, model)  # before anything is compiled or captured
    began = None if saved is None else saved.recipe.data.loader.dali.hw_decoder_load
    feed, decoder = with_decoder(feed, began=began)
    recipe = feed.recipe
    shape = feed.shape
    engine = Engine(model, recipe, world, micro_batch=shape.micro_rows, accumulation=shape.accumulation)
    folder = RunFolder(recipe, feed, engine, verdict)
    progress, story = folder.resume()
    with (
        folder,
        Tracker(recipe, feed, engine, progress, trackers) as tracker,
        Preemption(folder.path, world, deadline=leave_at) as preemption,
        Watchdog(folder.path, world, timeout=recipe.watchdog.hang_timeout) as watchdog,
        feed.train_loader(step=progress.step, dtype=engine.input_dtype) as loader,
        feed.eval_loader(dtype=engine.input_dtype) as evaluation,
    ):
        tracker.begin(
            *(
                *story,
                *(() if progress.step else loaded),
                *messages,
                *(decoder.messages if decoder else ()),
                *engine.notes,
                *feed.advice(),
            ),
            picks=engine.picks | verdict.picks | loader.picks,
        )
        guards = Guards(
            engine, max_bad_steps=recipe.watchdog.max_bad_steps, compare_every=recipe.watchdog.compare_every
        )
        rate = rate_of(recipe.optim, global_batch=feed.plan.global_batch, steps_per_epoch=feed.plan.steps_per_epoch)

        def settle() -> None:
            """Read the device: judge and log the steps since the last time."""
            tracker.say(*(f"warning: {fact}" for fact in (*guards.check(), *folder.complaints())))
            tracker.interval(skipped=guards.skipped, replaced=loader.bad_samples)

        def evaluate(step: int) -> dict[Scored, float]:
            """Top-1 with `step` steps behind; asked to leave meanwhile, the run saves that this is still to be done."""
            results: dict[Scored, dict[str, float]] = {}
            for scored in SCORED if recipe.optim.ema else SCORED[:1]:
                result = engine.evaluate(
                    watchdog.watched(preemption.heed(evaluation or ())), average=scored == "average"
                )
                if result is None:
                    folder.leave(tracker.progress(progress, step, pending=True), preemption.reason)
                results[scored] = result
            return tracker.evaluation(step, results)

        if progress.pending_evaluation and evaluation is not None:
            progress = folder.save(tracker.progress(progress, progress.step, evaluate(progress.step)))
        for step in range(progress.step, feed.last_step):
            request = preemption.agreed()
            if request is not Request.NOTHING:
                settle()
                progress = tracker.progress(progress, step) if step > progress.step else progress
                folder.leave(progress, preemption.reason) if request is Request.LEAVE else folder.save(progress)

            batches = tracker.take(loader, shape.accumulation)
            result = engine.step(batches, step=step, lr=rate(step))
            guards.note(step, result, batches)
            tracker.step(step, rate(step), result)
            watchdog.beat(step + 1)

            done, ends = feed.plan.at(step + 1), step + 1 == feed.last_step
            evaluates = ends or (done.step == 0 and done.epoch % recipe.run.eval_every == 0)
            saves = evaluates or (step + 1) % (recipe.checkpoint.save_every or sys.maxsize) == 0
            if saves or (step + 1) % recipe.log.log_every == 0:
                settle()
            if saves:
                top1 = evaluate(step + 1) if evaluates and evaluation is not None else None
                progress = folder.save(tracker.progress(progress, step + 1, top1))
                tracker.restart_interval()

        tracker.say(*folder.finish(progress))
        tracker.finish(progress)


def main() -> int:
    """The command line; returns the exit status: 0 done, 1 failed, 2 bad input (with one line), 75 saved and left."""
    ignore_failing_output()
    try:
        return run_command(lambda: begin(parse()))
    except KeyboardInterrupt:  # the training loop handles Ctrl-C itself
        print("interrupted before training began; nothing is lost", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT


def begin(recipe: Recipe) -> int:
    """The run of a recipe; returns the exit status."""
    lock = FolderLock(recipe.run.out, wait=recipe.checkpoint.lock_seconds(recipe.watchdog.hang_timeout))

    def run() -> int:
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

    def failed(reason: str, *, refused: bool) -> None:
        if lock.taken and read_status(recipe.run.out) == "running":  # the run folder says more, if it can
            # With the step: rank 0, which knows it, may write at the same time, and must not lose it to another rank.
            step = CheckpointFolder(recipe.run.out / CHECKPOINTS).newest_step()
            write_status(recipe.run.out, "refused" if refused else "failed", step=step, reason=reason)
        lock.release()

    with lock:
        return run_command(run, failed)


if __name__ == "__main__":
    sys.exit(main())
