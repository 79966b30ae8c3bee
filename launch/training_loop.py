"""The training loop of `launch/train.py`."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import NoReturn

from launch.engine.engine import Engine
from launch.engine.loss import SampleResults
from launch.feed import Feed
from launch.monitor.metrics import Metrics
from launch.monitor.pictures import FIRST_BATCH_NAME, HARDEST_NAME, save_evaluation, save_first_batch
from launch.optim.schedule import lr_schedule
from launch.profiling.profiler import StepProfiler
from launch.resilience.guards import Guards
from launch.resilience.preempt import Preemption, StopRequested
from launch.resilience.stop_signals import Phase
from launch.resilience.watchdog import Watchdog
from launch.resume.folder import RunFolder
from launch.run.evaluation_record import EvaluationInfo
from launch.run.progress import WEIGHTS_KINDS, Progress, WeightsKind, best_weights
from launch.run.status import Preempted
from pipeline.loader import EvalLoader, TrainLoader


@dataclass
class TrainingLoop:
    """The training loop: steps, evaluations and checkpoints until the last step or the target accuracy."""

    feed: Feed
    engine: Engine
    folder: RunFolder
    metrics: Metrics
    preemption: Preemption
    watchdog: Watchdog
    profiler: StepProfiler
    train_loader: TrainLoader
    val_loader: EvalLoader | None
    state: Progress

    def __post_init__(self) -> None:
        self.recipe, plan = self.feed.recipe, self.feed.plan
        self.guards = Guards(self.engine, self.recipe.watchdog)
        self.lr = lr_schedule(self.recipe.optim, global_batch=plan.global_batch, steps_per_epoch=plan.steps_per_epoch)

    def run(self) -> None:
        """Train until the last step, or until an evaluation reaches the target accuracy. Collective.

        Raises:
            Preempted: the run was asked to stop, and has been saved.
        """
        signals = self.preemption.signals
        try:
            if self.state.pending_evaluation and self.val_loader is not None:
                self.evaluate()
                self._mark_end()
                self._save_between_steps()
            while not self.feed.finished(self.state):
                if self.preemption.save_requested():
                    self.log()
                    self._save_between_steps()
                self.step()
                self.after_step()
        except StopRequested as request:
            self.log()
            self._save_and_stop(str(request))
        except BaseException:
            signals.phase = Phase.ENDING
            raise

    def step(self) -> None:
        """Do one optimizer step. Does not wait for the device."""
        step = self.state.step
        self.profiler.begin_step(step)
        phase = self.feed.phase_at(step)
        batches = self.metrics.next_batches(self.train_loader, phase.shape.accumulation)
        if step == 0 and self.engine.world.is_main:
            self.metrics.print(*save_first_batch(self.folder.path, self.feed, batches[0]))
            self.metrics.log_picture("train/images", FIRST_BATCH_NAME, step=1)
        result = self.engine.step(batches, step=step, lr=self.lr(step))
        self.guards.note(step, result, batches)
        self.metrics.add_step(step, self.lr(step), result)
        self.profiler.end_step(step)
        self.state = self.state.after(step + 1, self.feed.plan.at(step + 1))
        self.watchdog.beat(step + 1)

    def after_step(self) -> None:
        """Log, evaluate and save, as far as each is due after this step."""
        state, run = self.state, self.recipe.run
        last = state.step == self.feed.last_step
        ends_epoch = state.epoch_step == 0 and due(state.epoch, run.eval_every)
        options = self.recipe.checkpoint
        saves_locally = due(state.step, options.local_checkpoint_every)
        saves = last or ends_epoch or due(state.step, options.save_every)
        saves |= saves_locally and not self.folder.has_checkpoint  # local checkpoints follow one of the run folder
        if saves or saves_locally or due(state.step, self.recipe.log.log_every):
            self.log()
        if state.epoch_step == 0:
            self.metrics.log_epoch_stop(state.step)
        if state.step == self.feed.total_steps and self.recipe.model.recalibrate_bn:
            self.recalibrate()
        if (last or ends_epoch) and self.val_loader is not None:
            self.state = replace(state, pending_evaluation=True)
            self.evaluate()
        self._mark_end()
        if saves:
            self._save_between_steps()
        elif saves_locally:
            self._save_locally()

    def _mark_end(self) -> None:
        """Stop the clock if training is finished."""
        if self.feed.finished(self.state):
            self.metrics.log_run_stop(self.state)

    def log(self) -> None:
        """Check and log the steps since the last call. Waits for the device."""
        self.metrics.print(*(f"warning: {fact}" for fact in (*self.guards.check(), *self.folder.save_errors())))
        loader = self.train_loader
        self.metrics.log_interval(skipped=self.guards.skipped, replaced=loader.bad_samples, cache=loader.cache_use)

    def save(self) -> None:
        """Start to write a checkpoint."""
        with self.preemption.signals.during(Phase.SAVING), self.metrics.saving(self.state.step):
            self.state = self.folder.save(replace(self.state, seconds=self.metrics.seconds))

    def _save_locally(self) -> None:
        """Start to write a local checkpoint."""
        with self.preemption.signals.during(Phase.SAVING), self.metrics.saving(self.state.step, local=True):
            state = replace(self.state, seconds=self.metrics.seconds)
            self.folder.save_locally(state, metrics=self.metrics.unwritten)
        self.metrics.restart_interval()  # only rank 0 saves, which is not slow because of it

    def _save_between_steps(self) -> None:
        self.save()
        self.metrics.restart_interval()  # the next interval begins after the save

    def _save_and_stop(self, reason: str) -> NoReturn:
        self.preemption.signals.phase = Phase.SAVING
        self.metrics.view.phase = "saving, then stopping"
        try:
            self.folder.save_and_stop(replace(self.state, seconds=self.metrics.seconds), reason)
        except Preempted:
            self.metrics.log_stop(self.state.step, reason)  # after the save, whose time is that of a checkpoint
            raise

    @property
    def _kinds(self) -> tuple[WeightsKind, ...]:
        return WEIGHTS_KINDS if self.recipe.optim.ema else WEIGHTS_KINDS[:1]

    def recalibrate(self) -> None:
        """Recalibrate BatchNorm's statistics, of the weights and of their EMA if there is one."""
        self.metrics.view.phase = "recalibrating BatchNorm"
        dtype, cache = self.engine.input_dtype, self.train_loader.memory_cache
        for kind in self._kinds:
            with self.feed.recalibration_batches(dtype=dtype, memory_cache=cache) as batches:
                self.engine.recalibrate_batch_norm(self.watchdog.beat_on_each(batches), average=kind == "average")
        self.metrics.view.phase = ""
        self.metrics.print(f"recalibrated BatchNorm over {self.recipe.model.recalibrate_bn} global batches")

    def evaluate(self) -> None:
        """Evaluate the weights, and their EMA if there is one."""
        results: dict[WeightsKind, dict[str, float]] = {}
        samples: dict[WeightsKind, SampleResults] = {}
        for kind in self._kinds:
            started = time.perf_counter()
            batches = self.metrics.evaluation(self.val_loader or (), kind)
            batches = self.watchdog.beat_on_each(self.preemption.until_stop(batches))
            samples[kind] = SampleResults()
            found = self.engine.evaluate(batches, average=kind == "average", samples=samples[kind])
            results[kind] = found | {"seconds": time.perf_counter() - started}
        top1 = {kind: result["top1"] for kind, result in results.items()}
        best = best_weights(top1)
        started = time.perf_counter()
        last = self.feed.finished(self.state.evaluated(top1))
        messages = self._save_evaluation(samples[best], best, last=last)
        results[best]["seconds"] += time.perf_counter() - started
        self.state = self.state.evaluated(self.metrics.log_evaluation(self.state.step, results))
        self.metrics.log_picture("eval/hardest", HARDEST_NAME, step=self.state.step)
        self.metrics.show_best(self.state)
        self.metrics.print(*messages)

    def _save_evaluation(self, samples: SampleResults, kind: WeightsKind, *, last: bool) -> list[str]:
        """Write the record of an evaluation to the run folder; return messages. Collective.

        Args:
            last: whether training ends after this evaluation.
        """
        info = EvaluationInfo(step=self.state.step, weights=kind, outputs=samples.outputs)
        return save_evaluation(self.folder.path, self.feed, samples, info, last=last)


def due(count: int, every: int | None) -> bool:
    """Return whether an action that is done every `every` steps (None: never) is due after step `count`."""
    return every is not None and count % every == 0
