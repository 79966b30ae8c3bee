"""Profile some optimizer steps of a run on rank 0, and write the results to RUN/profile. Errors never end the run."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from launch.config.run import LogConfig
from launch.engine.engine import Engine
from launch.feed import Feed
from launch.profiling.phases import DATA_WAIT, StepPhases
from launch.profiling.stages import loader_figures
from launch.profiling.trace_file import STEP_LABEL, write_trace
from pipeline.background import BackgroundLoader
from shards.errors import first_line
from shards.files.durable import durable_write, temporary_name

PROFILE = "profile"
# More than the batches that a loader holds ahead by default: afterwards its queues are as full as later in the run.
WARMUP_STEPS = 10
MAX_OPERATORS = 50
NO_KERNELS = (
    "warning: the trace has no GPU kernels, because CUPTI may not record them; see docs/profiling.md for the remedy"
)
MAX_ALLOCATIONS = 100_000  # of the memory snapshot; each takes a few KB


class StepProfiler:
    """Profiles steps between `begin_step` and `end_step`. Other ranks than 0, and other steps, cost nothing.

    Args:
        loader: the loader of training.
        steps: all steps of this start, counted from 0 at the start of training.
        log: prints lines.
    """

    def __init__(
        self, feed: Feed, engine: Engine, loader: BackgroundLoader, steps: range, log: Callable[..., None]
    ) -> None:
        self._engine, self._loader, self._log = engine, loader, log
        self._options, self._folder = feed.loader_options.settings, feed.recipe.run.out / PROFILE
        self._device = engine.world.device
        self._steps = profiled_steps(feed.recipe.log, steps) if engine.world.is_main else range(0)
        if feed.recipe.log.profile and engine.world.is_main and not self._steps:
            log(
                f"warning: --profile-from {feed.recipe.log.profile_from}: this start trains steps {steps.start + 1} to "
                f"{steps.stop}; nothing is profiled"
            )
        # torch.profiler discards the step in which it starts, because that step includes its own set-up.
        self._active = range(max(self._steps.start - 1, steps.start), self._steps.stop)
        self._torch: profile | None = None
        self._phases = StepPhases(self._device)
        self._windows: list[tuple[int, int]] = []
        self._label: record_function | None = None

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._torch is not None:
            self._abandon("the run ended before all steps were profiled")

    def begin_step(self, step: int) -> None:
        """Call before the batches of a step are fetched."""
        if step in self._active:
            with self._never_fails():
                if self._torch is None:
                    self._torch = self._start()
                if step in self._steps:
                    self._begin(self._torch, first=step == self._steps.start)

    def end_step(self, step: int) -> None:
        """Call after the work of a step has been launched."""
        if step in self._steps and self._label is not None:
            with self._never_fails():
                self._label.__exit__(None, None, None)
                self._phases.end_step()
                self._windows[-1] = self._windows[-1][0], time.monotonic_ns()
                if step == self._steps[-1]:
                    self._finish()

    def _start(self) -> profile:
        self._folder.mkdir(exist_ok=True)
        # Otherwise the library behind torch.profiler prints its own log lines to the terminal.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        plan = schedule(wait=0, warmup=1, active=len(self._steps), repeat=1)
        torch_profile = profile(activities=activities, schedule=plan, record_shapes=True)
        torch_profile.start()
        self._loader.stage_trace.start()
        return torch_profile

    def _begin(self, torch_profile: profile, *, first: bool) -> None:
        torch_profile.step()  # begins the step: the first call ends the step that is discarded
        if first:
            self._engine.phase = self._phases.phase
            if self._on_gpu:
                torch.cuda.memory._record_memory_history(max_entries=MAX_ALLOCATIONS, stacks="python")
        self._phases.begin_step()
        self._label = record_function(STEP_LABEL)
        self._windows.append((time.monotonic_ns(), 0))
        self._label.__enter__()

    def _finish(self) -> None:
        phases = self._phases.seconds()  # waits for the device, so that the trace contains all kernels
        torch_profile, self._torch = self._torch, None
        assert torch_profile is not None
        self._loader.stage_trace.stop()
        self._engine.phase = nullcontext
        torch_profile.stop()
        events = self._loader.stage_trace.drain()
        total = sum(phases.values())
        fractions = {name: round(seconds / total, 4) for name, seconds in phases.items()}
        figures = loader_figures(
            events, self._windows, data_wait=fractions[DATA_WAIT], settings=self._options, gpu=self._on_gpu
        )
        first, last = self._steps.start + 1, self._steps.stop
        self._log(
            f"profiled steps {first} to {last} on rank 0; the profiler slows them, so ignore their images/s",
            f"profile: {', '.join(f'{name} {fraction:.1%}' for name, fraction in fractions.items())} of the time",
            f"profile: {figures.verdict}",
        )
        summary = {"first_step": first, "last_step": last, "seconds": round(total, 4), "phases": fractions}
        self._write("summary.json", (json.dumps(summary | dataclasses.asdict(figures), indent=1) + "\n").encode())
        self._write("operators.txt", operator_tables(torch_profile, gpu=self._on_gpu).encode())
        files = f"{self._folder}/summary.json, operators.txt"
        if self._on_gpu:
            self._write_memory("memory.pickle")
            files += ", memory.pickle (for https://pytorch.org/memory_viz)"
        trace = self._folder / f"trace-step-{first}.json.gz"
        has_kernels = write_trace(torch_profile, events, [begin for begin, _ in self._windows], trace)
        self._log(
            f"profile: wrote {files}, {trace.name} (open it at https://ui.perfetto.dev, which uploads nothing)",
            *([NO_KERNELS] if self._on_gpu and not has_kernels else []),
        )

    def _write(self, name: str, content: bytes) -> None:
        durable_write(self._folder / name, content)

    def _write_memory(self, name: str) -> None:
        temporary = temporary_name(self._folder / name)
        try:
            torch.cuda.memory._dump_snapshot(str(temporary))
            temporary.rename(self._folder / name)
        finally:
            temporary.unlink(missing_ok=True)
            torch.cuda.memory._record_memory_history(enabled=None)

    @contextmanager
    def _never_fails(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._abandon(first_line(error) or type(error).__name__)

    def _abandon(self, reason: str) -> None:
        """Stop profiling, and log why."""
        torch_profile, self._torch = self._torch, None
        self._active = self._steps = range(0)
        self._engine.phase = nullcontext
        self._loader.stage_trace.stop()
        self._loader.stage_trace.drain()
        with suppress(Exception):
            if torch_profile is not None:
                torch_profile.stop()
            if self._on_gpu:
                torch.cuda.memory._record_memory_history(enabled=None)
        self._log(f"warning: --profile: {reason}; the profile in {self._folder} is incomplete")

    @property
    def _on_gpu(self) -> bool:
        return self._device.type == "cuda"


def profiled_steps(config: LogConfig, steps: range) -> range:
    """Return the steps to profile, counted from 0 like `steps`; empty if none."""
    if config.profile is None:
        return range(0)
    if config.profile_from is not None:
        first = config.profile_from - 1
    else:  # a run that is too short for the warm-up still gets its steps profiled
        first = max(steps.start, min(steps.start + WARMUP_STEPS, steps.stop - config.profile))
    found = range(first, min(first + config.profile, steps.stop))
    return found if first in steps else range(0)


def operator_tables(torch_profile: profile, *, gpu: bool) -> str:
    """Format the operators with the largest time of their own, first by name, then by name and shapes of the inputs."""
    key = "self_device_time_total" if gpu else "self_cpu_time_total"
    tables = []
    for title, by_shape in (("Operators", False), ("Operators by shapes of their inputs", True)):
        averages = torch_profile.key_averages(group_by_input_shape=by_shape)
        table = averages.table(sort_by=key, row_limit=MAX_OPERATORS, max_name_column_width=60)
        tables.append(f"{title}, sorted by {key}\n{table}")
    return "\n".join(tables)
