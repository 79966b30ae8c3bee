"""Figures of a loader's stages and queues from the events of `StageTrace`, and which stage is the slowest."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.options import LoaderSettings
from pipeline.stage_trace import (
    WAIT_FOR_DECODE,
    WAIT_FOR_FEED,
    WAIT_FOR_GPU,
    WAIT_FOR_READ,
    WAIT_FOR_SPACE,
    WAITS,
    Event,
    QueueLevel,
    Span,
)

# Below this fraction of waiting for data, training is the slowest stage.
KEEPS_UP = 0.03
LOADER_THREAD, FEED_THREAD = "train-loader", "feed process: MainThread"
ON_GPU = "decode and augmentation on the GPU"
STAGES = ("read", "draw", "send", "decode", "resize", "augment", "transfer")
# What a thread waits for while the batch that it needs is in an earlier stage.
STAGE_OF_WAIT = {WAIT_FOR_READ: "read", WAIT_FOR_DECODE: "decode", WAIT_FOR_GPU: ON_GPU}

Window = tuple[int, int]
"""Begin and end of a profiled step, nanoseconds of `time.monotonic_ns`."""


@dataclass(frozen=True)
class StageFigures:
    """Figures of a stage within the profiled steps."""

    busy: float
    """Fraction of the time in which at least one thread worked in this stage. DALI decodes in threads of its own: for
    its decoding, the fraction of the time in which the loader waited for it."""
    seconds_per_batch: float
    """Time of all threads together."""
    batches: int


@dataclass(frozen=True)
class QueueFigures:
    """Figures of a queue within the profiled steps."""

    empty: float
    """Fraction of the time in which the queue was empty."""
    mean: float
    """Mean number of batches in the queue."""
    size: int
    """Maximum number of batches in the queue."""


@dataclass(frozen=True)
class LoaderFigures:
    """Stages and queues in the order of the data, and the slowest stage."""

    stages: dict[str, StageFigures]
    queues: dict[str, QueueFigures]
    slowest: str
    """"training", or a stage of the loader."""
    verdict: str


def loader_figures(
    events: Iterable[Event], steps: Sequence[Window], *, data_wait: float, settings: LoaderSettings, gpu: bool
) -> LoaderFigures:
    """Compute the figures of the profiled steps.

    Args:
        steps: the profiled steps. Time between them, such as an evaluation, is not counted.
        data_wait: fraction of the steps' time in which training waited for data.
        settings: sizes of the queues.
        gpu: whether the batches are delivered on a GPU.
    """
    events = list(events)
    parts = list(_clipped(exclusive_parts(e for e in events if isinstance(e, Span)), steps))
    total = sum(end - start for start, end in steps)
    stages = _stages(parts, total)
    queues = _queues([e for e in events if isinstance(e, QueueLevel)], steps, settings)
    slowest = "training" if data_wait < KEEPS_UP else _slowest(parts, gpu=gpu)
    busy = 1 - data_wait if slowest == "training" else stages[slowest].busy if slowest in stages else None
    facts = [] if busy is None else [f"busy {busy:.0%}"]
    if "ready" in queues:
        facts.append(f"ready queue empty {queues['ready'].empty:.0%} of the time")
    return LoaderFigures(stages, queues, slowest, f"slowest stage: {slowest} ({', '.join(facts)})")


def exclusive_parts(spans: Iterable[Span]) -> Iterator[Span]:
    """Split spans so that those of a thread are disjoint: a span loses the time of the spans nested in it."""
    by_thread: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        by_thread[span.thread].append(span)
    for of_thread in by_thread.values():
        of_thread.sort(key=lambda span: (span.start, -span.end))
        yield from _exclusive_parts_of_thread(of_thread)


def _exclusive_parts_of_thread(spans: list[Span]) -> Iterator[Span]:
    open_spans: list[Span] = []
    done = 0  # the time up to which parts have been yielded

    def close_until(time: float) -> Iterator[Span]:
        nonlocal done
        while open_spans and open_spans[-1].end <= time:
            inner = open_spans.pop()
            if inner.end > done:
                yield inner._replace(start=max(inner.start, done))
                done = inner.end

    for span in spans:
        yield from close_until(span.start)
        if open_spans and span.start > done:
            outer = open_spans[-1]
            yield outer._replace(start=max(outer.start, done), end=span.start)
        open_spans.append(span)
        done = max(done, span.start)
    yield from close_until(math.inf)


def _clipped(parts: Iterable[Span], steps: Sequence[Window]) -> Iterator[Span]:
    for part in parts:
        for begin, end in steps:
            if part.start < end and begin < part.end:
                yield part._replace(start=max(part.start, begin), end=min(part.end, end))


def _stages(parts: list[Span], total: int) -> dict[str, StageFigures]:
    by_stage: dict[str, list[Span]] = defaultdict(list)
    for part in parts:
        if part.stage not in WAITS:
            by_stage[part.stage].append(part)
    figures = {}
    for stage, of_stage in by_stage.items():
        work = sum(part.end - part.start for part in of_stage)
        batches = len({part.batch for part in of_stage})
        busy = _covered((part.start, part.end) for part in of_stage) / total
        figures[stage] = StageFigures(round(busy, 4), round(work / batches / 1e9, 6), batches)
    return {stage: figures[stage] for stage in STAGES if stage in figures}


def _covered(intervals: Iterable[Window]) -> int:
    """Return the length of the union of intervals."""
    covered, reached = 0, 0
    for start, end in sorted(intervals):
        covered += max(0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def _queues(levels: list[QueueLevel], steps: Sequence[Window], settings: LoaderSettings) -> dict[str, QueueFigures]:
    sizes = {
        "read": settings.read_ahead,
        "decoding": settings.decode_ahead,
        "decoded": settings.decode_ahead,
        "ready": settings.ready,
    }
    figures = {}
    for queue, size in sizes.items():
        of_queue = sorted((level for level in levels if level.queue == queue), key=lambda level: level.time)
        times = Counter[int]()  # nanoseconds by number of batches
        ends = [level.time for level in of_queue[1:]] + [steps[-1][1]] if of_queue else []
        for level, until in zip(of_queue, ends, strict=True):
            for begin, end in steps:
                times[level.batches] += max(0, min(until, end) - max(level.time, begin))
        if total := times.total():
            mean = sum(batches * time for batches, time in times.items()) / total
            figures[queue] = QueueFigures(round(times[0] / total, 4), round(mean, 3), size)
    return figures


def _slowest(parts: list[Span], *, gpu: bool) -> str:
    """Return the stage on which the loader's thread spent most of its time, working in it or waiting for it.

    That thread passes every batch from stage to stage, so its time is what limits the loader.
    """
    held, feed = _time_by_stage(parts, LOADER_THREAD), _time_by_stage(parts, FEED_THREAD)
    del feed[WAIT_FOR_SPACE]
    # On a GPU, batches are in the ready queue before the GPU has finished them. If training waits although the queue
    # is full, it waits for the GPU.
    blocked = held.pop(WAIT_FOR_SPACE, 0)
    if gpu:
        held[ON_GPU] += blocked
    slowest = held.most_common(1)[0][0] if held else "loader"
    if slowest == WAIT_FOR_FEED:
        return feed.most_common(1)[0][0] if feed else "feed process"
    return slowest


def _time_by_stage(parts: list[Span], thread: str) -> Counter[str]:
    times = Counter[str]()
    for part in parts:
        if part.thread == thread:
            times[STAGE_OF_WAIT.get(part.stage, part.stage)] += part.end - part.start
    return times
