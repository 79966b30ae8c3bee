"""Train a FAT backbone: `accelerate launch launch/train.py --variant b0 --data SET`."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

# Python puts a script's folder, launch/, first on the import path; imports need the project's root there instead.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.machine.simple_launcher import LAUNCHER
from launch.machine.standard_streams import ignore_failing_output, open_missing_streams
from shards.interrupt import exit_on_interrupt

if __name__ == "__main__":
    open_missing_streams()  # before libraries open files, which would get the descriptors of closed streams
    LAUNCHER.attach()

from launch.monitor.display import DISPLAY

if __name__ == "__main__":
    ignore_failing_output()
    exit_on_interrupt(LAUNCHER.exit)  # while libraries are imported, which takes seconds
    if not {"-h", "--help", "--version"} & set(sys.argv):
        DISPLAY.phase("loading PyTorch")

from launch.config.command_line import parse
from launch.config.recipe import Recipe
from launch.doctor.before_training import check_nodes
from launch.dry_run import show_run
from launch.engine.engine import Engine
from launch.engine.execution import kernels_from_environment
from launch.engine.kernel_check import check_training_kernels
from launch.feed import Feed
from launch.jpeg_decoder import choose_jpeg_decoder
from launch.machine.rank_errors import follows_rank0
from launch.machine.world import World, broadcast_from_rank0, connect, run_command
from launch.monitor.curves import draw_curves
from launch.monitor.metrics import Metrics, StartInfo
from launch.monitor.trackers import Trackers, start_trackers
from launch.prepare import prepare_run
from launch.profiling.profiler import StepProfiler
from launch.resilience.foreign_files import check_run_folder
from launch.resilience.preempt import Preemption, deadline
from launch.resilience.preflight import preflight
from launch.resilience.run_lock import FolderLock
from launch.resilience.stop_signals import Phase, StopSignals, Unsaved
from launch.resilience.watchdog import Watchdog
from launch.resume.folder import RunFolder
from launch.run.checkpoint_folder import CHECKPOINTS, CheckpointFolder
from launch.run.progress import Progress
from launch.run.status import (
    EXIT_STATUS,
    Preempted,
    Status,
    StatusContent,
    StatusRenewal,
    read_previous,
    read_status,
    write_status,
)
from launch.training_loop import TrainingLoop
from shards.command import main_program
from shards.errors import UserError, first_line, open_files_error

# Variables with the number of restarts of a SLURM job (launch/slurm/train.sbatch) and of torchrun --max-restarts.
RESTART_COUNTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")


def train(
    recipe: Recipe,
    world: World,
    lock: FolderLock,
    *,
    signals: StopSignals,
    renewal: StatusRenewal,
    previous: StatusContent | None = None,
) -> None:
    """Train a recipe's model, then write the last checkpoint, the weights and the curves. Collective.

    Args:
        lock: lock of the run folder; acquired here if the folder did not exist before.
        signals: signals of this process, which stop the training or save a checkpoint.
        renewal: thread that renews RUN/status.
        previous: status that the previous start left.

    Raises:
        UserError: recipe, data and world size do not fit together, a file is damaged, or training failed.
        Preempted: the run was asked to stop, and has been saved.
    """
    stop_at = deadline(recipe.preempt, started=time.monotonic(), job_end=os.environ.get("SLURM_JOB_END_TIME", ""))
    feed, engine, folder, trackers, messages, resolved = build_components(recipe, world, lock)
    recipe = feed.recipe
    DISPLAY.phase(f"opening the run folder {folder.path}")
    restore = time.perf_counter()
    state, resume_messages = folder.resume()
    restore = time.perf_counter() - restore
    if previous is not None and previous.status == "finished" and feed.finished(state) and not folder.chosen:
        with folder:
            DISPLAY.print(already_finished(state, feed))
        if trackers is not None:
            trackers.finish()
        return
    DISPLAY.phase("starting the loader")
    start = StartInfo(previous=previous, restore_seconds=restore, queued=queued_at(), origin=folder.origin)
    with (
        Metrics(recipe, feed, engine, state, trackers, display=DISPLAY, start=start) as metrics,
        folder,  # writes RUN/status before the trackers are closed, which may take half a minute
        Preemption(folder.path, world, deadline=stop_at, signals=signals) as preemption,
        Watchdog(folder.path, world, timeout=recipe.watchdog.hang_timeout, close=DISPLAY.close) as watchdog,
        folder.renew_status(renewal, lambda: metrics.step),
        feed.train_loader(step=state.step, dtype=engine.input_dtype) as train_loader,
        feed.eval_loader(dtype=engine.input_dtype) as val_loader,
        StepProfiler(feed, engine, train_loader, range(state.step, feed.last_step), metrics.print) as profiler,
    ):
        metrics.saved_at = lambda: folder.saved_at
        resolved |= train_loader.resolved
        metrics.log_start(*resume_messages, *messages, *engine.notes, *feed.advice(), resolved=resolved)
        loop = TrainingLoop(
            feed, engine, folder, metrics, preemption, watchdog, profiler, train_loader, val_loader, state
        )
        signals.say, signals.unsaved = metrics.print, lambda: Unsaved(loop.state.step, folder.newest_step)
        loop.run()
        signals.phase = Phase.FINISHING
        metrics.print(*folder.finish(loop.state))
        metrics.finish(loop.state)
        if world.is_main:
            metrics.print(plot(folder.path))


def already_finished(progress: Progress, feed: Feed) -> str:
    """Return the message of a start whose run needs no further steps."""
    run, epochs = feed.recipe.run, feed.recipe.optim.epochs
    best = f", best top-1 {progress.best:.2%}" if progress.best_of else ""
    if progress.step < feed.last_step:  # it has reached the target
        advice = f"run the same command with a --target-top1 above {run.target_top1:g}, or without it"
    elif progress.step < feed.total_steps:
        advice = f"run the same command with a --stop-after above {progress.step}, or without it"
    else:
        advice = f"run the same command with --epochs {epochs + 1} or more (the schedule then spans all of them)"
    return f"already finished: {progress.step:,} steps{best}; the weights are in {run.out}; to train longer, {advice}"


def queued_at() -> float | None:
    """Return the Unix time since which the scheduler's job waited for this start (launch/slurm/train.sbatch)."""
    value = os.environ.get("FAT_JOB_QUEUED", "")
    return float(value) if value.isascii() and value.isdigit() else None


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
    DISPLAY.phase(f"reading the index of {recipe.data.data}, and building {recipe.model.spec}")
    prepared = prepare_run(recipe, world)
    data_set = Path(str(prepared.feed.dataset.path)).name
    trackers = start_trackers(prepared.recipe, world, resumes=prepared.resume.kind == "newest", data_set=data_set)
    lock.acquire(world, create=True)
    DISPLAY.phase("checking the kernels")
    # Kernels that fail the check are disabled before the model is compiled or captured with them.
    kernels = check_training_kernels(prepared.recipe, prepared.feed, prepared.model)
    feed, decoder_messages = choose_jpeg_decoder(prepared.feed, previous=prepared.previous_dali)
    DISPLAY.phase("preparing the model for training")
    engine = Engine(prepared.model, feed.recipe, world, shapes=feed.input_shapes, teacher=prepared.teacher)
    folder = RunFolder(feed.recipe, feed, engine, kernels)
    messages = (*prepared.messages, *decoder_messages)
    return Components(feed, engine, folder, trackers, messages, engine.resolved | kernels.resolved)


def main() -> int:
    """Run the command line; return the exit status: 0 done, 1 failed, 2 invalid input, 75 preempted and saved."""
    ignore_failing_output()
    with StopSignals() as signals:
        signals.close = DISPLAY.close
        command = kernels_from_environment()(lambda: parse_and_run(signals))
        ended = lambda: signals.stop == "SIGTERM"  # noqa: E731
        return LAUNCHER.run(lambda: main_program(lambda: run_command(command, ended=ended), sys.argv[1:]))


def parse_and_run(signals: StopSignals) -> int:
    """Parse the command line and run its recipe; return the exit status."""
    with contextlib.closing(DISPLAY):
        return run_recipe(parse_once(), signals)


def parse_once() -> Recipe:
    """Parse the command line; only rank 0 prints help and errors in the usage."""
    with contextlib.ExitStack() as silence:
        if follows_rank0():
            silence.enter_context(contextlib.redirect_stdout(io.StringIO()))
            silence.enter_context(contextlib.redirect_stderr(io.StringIO()))
        return parse()


def run_recipe(recipe: Recipe, signals: StopSignals) -> int:
    """Start or resume the run of a recipe; return the exit status."""
    run = recipe.run.out
    lock = FolderLock(run, wait=recipe.checkpoint.lock_seconds(recipe.watchdog.hang_timeout))
    renewal = StatusRenewal(run, lambda: write_status(run, "running"))
    with lock, end_in_status(run, lock, signals, renewal):
        world = connect(numa_binding=recipe.parallel.numa_binding)
        recipe = resume_after_restart(recipe, world)
        broadcast_from_rank0(lambda: check_run_folder(run), world)
        if recipe.run.dry_run:
            DISPLAY.close()
            show_run(recipe, world)
            return 0
        DISPLAY.phase(f"waiting for the lock of {run}")
        lock.acquire(world, create=False)  # no folder is created before the input has been validated
        previous = broadcast_from_rank0(lambda: read_previous(run), world)
        if world.is_main:
            if read_status(run) != "finished":  # a start that ends before it trains leaves a finished run as it is
                # Replace the status of an earlier start, but keep how far its training had come.
                write_status(run, "running", at=previous.training if previous and previous.interrupted else None)
            renewal.start()
        warnings = [*preflight(recipe, world), *check_nodes(recipe, world, DISPLAY.phase)]
        for warning in warnings:
            DISPLAY.print(warning)
        try:
            train(recipe, world, lock, signals=signals, renewal=renewal, previous=previous)
        except Preempted as reason:
            DISPLAY.print(f"saved and stopping: {reason}; run the same command again to resume")
            return EXIT_STATUS
        return 0


def resume_after_restart(recipe: Recipe, world: World) -> Recipe:
    """Replace `--resume never` by `auto` if SLURM or torchrun has started the training again. Collective.

    The option excludes only checkpoints from before the job was submitted, or torchrun was started. Each agent of
    torchrun counts only the failures of its own processes, so that the count of rank 0 may be 0 in a restart.
    RUN/origin.json has the same effect if a checkpoint was chosen (`launch.resume.decision`).
    """
    if recipe.checkpoint.resume != "never":
        return recipe
    if not any(world.gather(any(os.environ.get(name, "0") != "0" for name in RESTART_COUNTS))):
        return recipe
    return replace(recipe, checkpoint=replace(recipe.checkpoint, resume="auto"))


@contextlib.contextmanager
def end_in_status(run: Path, lock: FolderLock, signals: StopSignals, renewal: StatusRenewal) -> Iterator[None]:
    """Write to RUN/status why the start failed or was stopped, unless `RunFolder` has already written the reason."""

    def write(status: Status, step: int | None, reason: str) -> None:
        renewal.stop()
        if lock.acquired and read_status(run) == "running":
            # The status includes the step, because it may replace one in which rank 0 has just written the step.
            step = CheckpointFolder(run / CHECKPOINTS).newest_step() if step is None else step
            write_status(run, status, step=step, reason=reason)

    signals.write_status = write
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        known = error if isinstance(error, UserError) else open_files_error(error)
        invalid_input = known is not None and known.exit_code == UserError.exit_code
        write("refused" if invalid_input else "failed", None, str(known or f"{type(error).__name__}: {error}"))
        raise
    finally:
        renewal.stop()


if __name__ == "__main__":
    exit_status = main()
    exit_on_interrupt(LAUNCHER.exit, status=exit_status)  # the end of the interpreter may take seconds, too
    sys.exit(exit_status)
