"""Collect the metrics of a run and write them to RUN/metrics.jsonl, to the trackers and to the terminal.

Losses and gradient norms stay on the device until a log line is due, so that steps do not wait for the device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch.distributed as dist

from launch.config.recipe import Recipe
from launch.engine.engine import Engine, StepResult
from launch.engine.loss import MAX_TOP5
from launch.feed import Feed
from launch.machine.device_peaks import synchronize
from launch.machine.provenance import device_name
from launch.monitor.display import Display
from launch.monitor.roofline import Roofline
from launch.monitor.trackers import Trackers
from launch.monitor.view import GAP, View
from launch.run.metrics_file import MetricsLog
from launch.run.origin import Origin
from launch.run.progress import Progress, WeightsKind
from launch.run.status import StatusContent
from launch.stragglers.rank_times import RankTimes
from pipeline.batch import Batch
from pipeline.data_wait import DataWait
from pipeline.decode.cached import CacheUse

# For each kind of weights: the `kind` of its evaluation lines in the metrics, and its name in messages.
EVALUATION_KINDS: dict[WeightsKind, str] = {"weights": "eval", "average": "eval-ema"}
WEIGHTS_NAMES: dict[WeightsKind, str] = {"weights": "weights", "average": "moving average"}

_NULLABLE = ("loss", "best")  # fields that are written even if they are None


@dataclass(frozen=True)
class StartInfo:
    """What happened before the training loop of this start."""

    previous: StatusContent | None = None
    """Status that the previous start left; None: there is none."""
    restore_seconds: float = 0.0
    """Time to load the checkpoint."""
    queued: float | None = None
    """Unix time since which the scheduler's job waited for this start; None: unknown."""
    origin: Origin | None = None
    """Checkpoint that was chosen with --resume, if this start begins at it."""

    def fields(self) -> dict[str, float | str | None]:
        """Return the fields of the "start" line."""
        training = self.previous.training if self.previous is not None and self.previous.interrupted else None
        return {
            "started": round(psutil.Process().create_time(), 3),
            "restore_seconds": round(self.restore_seconds, 3),
            "queued": self.queued,
            "previous_alive": None if training is None else training[1],
            "previous_step": None if training is None else training[0],
            "origin": None if self.origin is None else self.origin.checkpoint,
            "origin_digest": None if self.origin is None else self.origin.digest,
        }


class Metrics:
    """Collects and logs the metrics of training intervals and evaluations, and measures the time of training.

    It is a context manager, which closes the log and the display on exit.

    Args:
        display: shows progress and messages. None: a new one.
    """

    def __init__(
        self,
        recipe: Recipe,
        feed: Feed,
        engine: Engine,
        progress: Progress,
        trackers: Trackers | None = None,
        *,
        display: Display | None = None,
        start: StartInfo | None = None,
    ) -> None:
        self._world, self._plan, self._resumed = engine.world, feed.plan, progress
        self._recipe, self._feed = recipe, feed
        main = self._world.is_main
        self._log = MetricsLog(recipe.run.out if main else None)
        self._trackers = trackers
        if trackers is not None:
            trackers.open(recipe.run.out, step=progress.step)
        self._display = display or Display(enabled=main)
        self._verbose = recipe.log.verbose
        # A shared CPU's peak arithmetic throughput is not known well enough for a meaningful utilization.
        measures_utilization = main and (self._world.device.type == "cuda" or self._verbose)
        sizes = [phase.augment.size for phase in feed.phases] if measures_utilization else []
        self._rooflines = Roofline.by_size(feed, engine, sizes) if sizes else {}
        several = self._world.size > 1
        hosts = self._world.gather(self._world.host)
        self._ranks = RankTimes(self._world, hosts, engine.collective_wait) if several else None
        self._write(
            "start",
            step=progress.step,
            world=self._world.size,
            engine=engine.description,
            model=str(recipe.model.spec),
            device=device_name(self._world.device),
            host=self._world.host,
            total_steps=feed.last_step,
            steps_per_epoch=self._plan.steps_per_epoch,
            epochs=recipe.optim.epochs,
            global_batch=self._plan.global_batch,
            **(start or StartInfo()).fields(),
        )
        self._clock = time.perf_counter()
        self._write(
            "run_start", step=progress.step, clock=round(progress.seconds, 3), target_top1=recipe.run.target_top1
        )
        self._first_step_seconds: float | None = None
        self._stepped = False
        self._cache_use = (0, 0)
        self._rate, self._wait = 0.0, DataWait(self._world.device)
        self._last: dict[WeightsKind, float] = {}  # top-1 accuracies of the last evaluation
        self.saved_at: Callable[[], float | None] = lambda: None
        """Returns the time of the newest checkpoint by `time.monotonic`."""
        self.step = progress.step
        """Optimizer steps done."""
        self.view = View(
            title=f"{recipe.run.out.resolve().name}{GAP}{recipe.model.spec} on {self._devices}",
            step=progress.step,
            first_step=progress.step,
            total_steps=feed.last_step,
            epochs=recipe.optim.epochs,
            steps_per_epoch=self._plan.steps_per_epoch,
            seconds=progress.seconds,
            sizes=[(phase.first_step, phase.augment.size) for phase in feed.phases],
            best_accuracy=_best(progress),
        )
        self.restart_interval()

    @property
    def _devices(self) -> str:
        size, gpus = self._world.size, self._world.device.type == "cuda"
        if size == 1:
            return "one GPU" if gpus else "CPUs"
        return f"{size} GPUs" if gpus else f"CPUs, {size} processes"

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ranks is not None:
            self._ranks.close()
        self.print(*self._log.close())
        if self._trackers is not None:
            self._trackers.finish()
            self.print(*self._trackers.messages())
        self._display.close()

    def _write(self, kind: str, **values: Any) -> None:
        values = {name: value for name, value in values.items() if value is not None or name in _NULLABLE}
        self._log.write(kind, **values)
        self.print(*self._log.messages())
        if self._trackers is not None:
            self._trackers.log_line(kind, values)
            self.print(*self._trackers.messages())

    @property
    def unwritten(self) -> bytes:
        """The lines of metrics.jsonl that could not be written so far."""
        return self._log.unwritten

    def restart_interval(self) -> None:
        """Start a new interval, so that the throughput does not include evaluation and saving."""
        self._interval_started = time.perf_counter()
        self._wait.restart()
        if self._ranks is not None:
            self._ranks.restart()
        self._results: list[StepResult] = []

    def next_batches(self, loader: Iterator[Batch], count: int) -> list[Batch]:
        """Return the batches of the next step, and measure how long the device waits for them."""
        return self._wait.next_batches(loader, count)

    def print(self, *lines: str) -> None:
        for line in lines:
            self._display.print(line)

    def add_step(self, step: int, rate: float, result: StepResult) -> None:
        """Add optimizer step `step`, whose kernels have been launched. Does not wait for the device.

        Args:
            rate: learning rate of the step.
        """
        self._wait.mark_step_end()
        if self._ranks is not None:
            self._ranks.end_step()
        self._rate = rate
        self._results.append(result)
        self.step = self.view.step = step + 1
        if not self._stepped:  # the first step includes compilation, and is measured once per start
            self._stepped = True
            synchronize(self._world.device)
            self._first_step_seconds = round(time.perf_counter() - self._interval_started, 4)
            self.view.phase = ""

    def log_interval(self, *, skipped: int, replaced: int, cache: CacheUse | None = None) -> None:
        """Write a line about the steps since the last interval. Collective; waits for the device.

        Args:
            skipped: number of updates skipped so far.
            replaced: number of damaged samples that this rank has replaced so far.
            cache: use of the cache of decoded images by this rank so far. None: there is no cache.
        """
        if not self._results:
            return
        losses = torch.stack([result.loss for result in self._results])
        finite = losses.isfinite()
        counts = losses.new_tensor([replaced, *self._new_hits(cache)])
        sums = torch.cat([torch.stack([torch.where(finite, losses, 0.0).sum(), finite.sum()]), counts]).float()
        if self._ranks is not None:
            before = time.perf_counter() - self._interval_started
            sums = torch.cat([sums, sums.new_tensor(self._ranks.exchanged(before, self._wait.seconds()))])
            dist.all_reduce(sums)
        norms = torch.stack([result.grad_norm for result in self._results]).tolist()
        norms = [norm for norm in norms if math.isfinite(norm)]
        loss, count, replaced_by_all, hits, samples, *times_of_ranks = sums.tolist()
        seconds = time.perf_counter() - self._interval_started
        rate = len(self._results) * self._plan.global_batch / seconds
        device, data_wait = self._world.device, min(1.0, round(self._wait.seconds() / seconds, 4))
        split, messages = self._compare_ranks(times_of_ranks, data_wait)
        values = {
            "loss": round(loss / count, 5) if count else None,
            "grad_norm": round(sum(norms) / len(norms), 4) if norms else None,
            "steps": len(self._results),
            "seconds": round(seconds, 4),
            "first_step_seconds": self._first_step_seconds,
            "images_per_second": round(rate, 1),
            **self._utilization(rate / self._world.size, len(self._results)),
            "data_wait": data_wait,
            **split,
            # Reserved, not allocated memory: the pool of CUDA graphs does not count as allocated between captures.
            "memory_bytes": torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0,
            "skipped": skipped,
            "replaced": int(replaced_by_all),
            "cache_hits": round(hits / samples, 4) if samples else None,
            "cache_bytes": None if cache is None else cache.stored_bytes,
        }
        self._first_step_seconds = None
        epoch = self._plan.at(self.step - 1).epoch + 1
        size = self._feed.phase_at(self.step - 1).augment.size
        self._write("train", step=self.step, epoch=epoch, lr=self._rate, size=size, **values)
        self.view.update({"lr": self._rate, **values}, self._plan.global_batch)
        self.view.checkpoint_at = self.saved_at()
        self._display.show_interval()
        self.print(*messages)
        self.restart_interval()

    def _new_hits(self, cache: CacheUse | None) -> tuple[int, int]:
        """Return the hits and the samples of this rank since the last call."""
        before, now = self._cache_use, (0, 0) if cache is None else (cache.hits, cache.samples)
        self._cache_use = now
        return now[0] - before[0], now[1] - before[1]

    def _compare_ranks(self, times: list[float], data_wait: float) -> tuple[dict[str, Any], list[str]]:
        """Return the fields about the split of the step time and about the slowest rank, and messages for the log."""
        if self._ranks is None:
            return {}, []
        own, messages = self._ranks.compare(times, first=self._first_step_seconds is not None)
        communication = min(1 - data_wait, round(own.communication / max(own.seconds, 1e-9), 4))
        fields = {"compute": round(1 - data_wait - communication, 4), "communication": round(communication, 4)}
        if (slowest := self._ranks.slowest) is None:
            return fields, messages
        return fields | {
            "slowest_rank": slowest.rank,
            "slowest_host": slowest.host,
            "behind": round(max(0.0, slowest.behind), 4),
            "cause": slowest.cause.name if slowest.cause else None,
        }, messages

    def _utilization(self, rate: float, steps: int) -> dict[str, float]:
        """Return the utilization of a device at `rate` images per second in the last `steps` steps, on rank 0."""
        if not self._rooflines:
            return {}
        sizes = [self._feed.phase_at(step).augment.size for step in range(self.step - steps, self.step)]
        mfu = sum(self._rooflines[size].mfu(rate) for size in sizes) / steps
        bandwidth = sum(self._rooflines[size].bandwidth(rate) for size in sizes) / steps
        return {"mfu": round(mfu, 4), "bandwidth": round(bandwidth, 4)}

    def log_start(self, *messages: str, resolved: dict[str, str]) -> None:
        """Log messages of the start, and the values of options that were not set.

        Args:
            resolved: the values of these options, by name.
        """
        self._write("resolved", step=self._resumed.step, **resolved)
        self.print(*messages)
        if self._verbose:
            self.print("; ".join(f"{name}: {value}" for name, value in resolved.items()))
        self.view.phase = "first step"
        self.view.started = time.monotonic()
        self._display.start(self.view)
        self.restart_interval()

    def log_evaluation(self, step: int, results: Mapping[WeightsKind, dict[str, float]]) -> dict[WeightsKind, float]:
        """Write a line about each evaluation, with its duration in `seconds`; return the top-1 accuracies."""
        epoch, clock = self._plan.at(step - 1).epoch + 1, round(self.seconds, 3)
        for weights, result in results.items():
            times = {"seconds": round(result.get("seconds", 0.0), 3), "clock": clock}
            self._write(EVALUATION_KINDS[weights], step=step, epoch=epoch, **result | times)
            name = f", {WEIGHTS_NAMES[weights]}" if len(results) > 1 else ""
            top5 = f", top-5 {result['top5']:.2%}" if self._feed.classes > MAX_TOP5 else ""
            self.print(
                f"epoch {epoch}{name}: top-1 {result['top1']:.2%}{top5}, "
                f"loss {result['loss']:.4f} over {result['samples']} images"
            )
        self._last = {weights: result["top1"] for weights, result in results.items()}
        self.view.last_accuracy = "last top-1 " + ", EMA ".join(f"{top1:.2%}" for top1 in self._last.values())
        every = self._recipe.run.eval_every * self._plan.steps_per_epoch
        self.view.evaluation_seconds = sum(result.get("seconds", 0.0) for result in results.values()) / every
        return self._last

    def log_picture(self, name: str, file: str, *, step: int) -> None:
        """Log an image file of the run folder, if it exists, to the trackers under `name`."""
        if self._trackers is not None:
            self._trackers.log_picture(name, self._recipe.run.out / file, step=step)

    def show_best(self, progress: Progress) -> None:
        """Show the best accuracy so far."""
        self.view.best_accuracy = _best(progress)

    def evaluation(self, batches: Iterable[Batch], weights: WeightsKind) -> Iterator[Batch]:
        """Yield the batches of an evaluation, and show how many of its images are done."""
        split = self._feed.dataset.split("val")
        with self._display.evaluating(WEIGHTS_NAMES[weights], split.samples) as progress:
            for batch in batches:
                yield batch
                progress.advance(len(batch.ids) * self._world.size)

    @contextmanager
    def saving(self, step: int, *, local: bool = False) -> Iterator[None]:
        """Measure how long a checkpoint blocks training, and write a line about it.

        Args:
            local: it is a local checkpoint.
        """
        started = time.perf_counter()
        yield
        where = {"local": True} if local else {}
        self._write("checkpoint", step=step, seconds=round(time.perf_counter() - started, 4), **where)

    def log_epoch_stop(self, step: int) -> None:
        """Write a line about the end of an epoch, whose last step has been started."""
        self._write("epoch_stop", step=step, epoch=self._plan.at(step - 1).epoch + 1, clock=round(self.seconds, 3))

    def log_run_stop(self, progress: Progress) -> None:
        """Write a line about the end of the training, before its last checkpoint is saved."""
        clock, target = self.seconds, self._recipe.run.target_top1
        reached = target is None or progress.reached(target)
        self._write(
            "run_stop", step=progress.step, clock=round(clock, 3), status="success" if reached else "aborted"
        )
        if target is not None:
            goal = f"--target-top1 {target:g}"
            after = f"after {clock:.1f} s of training"
            self.print(
                f"reached {goal}: top-1 {progress.best:.2%} {after}"
                if reached
                else f"warning: {goal} was not reached: best top-1 {progress.best:.2%} {after}"
            )

    def log_stop(self, step: int, reason: str) -> None:
        """Write a line about the end of this start, whose run is resumed later."""
        self._write("stop", step=step, reason=reason)

    @property
    def seconds(self) -> float:
        """Seconds of training so far, in all starts of the run."""
        return self._resumed.seconds + time.perf_counter() - self._clock

    def finish(self, progress: Progress) -> None:
        """Write the last line of the metrics, and print the best and the last accuracies."""
        best = {"best": progress.best, "best_of": progress.best_of} if progress.best_of else {"best": None}
        self._write("end", step=progress.step, seconds=round(progress.seconds, 1), **best)
        text = f"{progress.step} steps in {progress.seconds:.0f} s"
        if progress.best_of:
            text += f", best top-1 {progress.best:.2%}"
            text += f" ({WEIGHTS_NAMES[progress.best_of]})" if "average" in self._last else ""
        if len(self._last) > 1:
            text += "; at the end: " + ", ".join(
                f"{WEIGHTS_NAMES[weights]} {top1:.2%}" for weights, top1 in self._last.items()
            )
        self.print(text)


def _best(progress: Progress) -> str:
    """Describe the best accuracy; empty if nothing has been evaluated yet."""
    if not progress.best_of:
        return ""
    return f"best {progress.best:.2%}" + (" (EMA)" if progress.best_of == "average" else "")
