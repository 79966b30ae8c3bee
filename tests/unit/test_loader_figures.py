"""Figures of a loader's stages, and the slowest stage, from recorded events (launch/profiling/stages.py)."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.profiling.stages import (
    FEED_THREAD,
    LOADER_THREAD,
    ON_GPU,
    LoaderFigures,
    exclusive_parts,
    loader_figures,
)
from pipeline.options import LoaderSettings
from pipeline.stage_trace import (
    WAIT_FOR_DECODE,
    WAIT_FOR_FEED,
    WAIT_FOR_GPU,
    WAIT_FOR_READ,
    WAIT_FOR_SPACE,
    Event,
    QueueLevel,
    Span,
)

SETTINGS = LoaderSettings(decode_threads=2)


def spans(thread: str, *stages: tuple[str, int], start: int = 0) -> list[Event]:
    """Return consecutive spans of one thread, given as (stage, nanoseconds)."""
    found: list[Event] = []
    for stage, length in stages:
        found.append(Span(stage, 0, start, start + length, thread))
        start += length
    return found


def figures(
    events: list[Event], *, data_wait: float = 0.5, gpu: bool = False, steps: Any = ((0, 100),)
) -> LoaderFigures:
    return loader_figures(events, steps, data_wait=data_wait, settings=SETTINGS, gpu=gpu)


@pytest.mark.parametrize(
    ("events", "options", "slowest"),
    [
        (spans(LOADER_THREAD, ("decode", 90), ("augment", 10)), {}, "decode"),
        (spans(LOADER_THREAD, ("decode", 30), ("resize", 20), ("augment", 50)), {}, "augment"),
        (spans(LOADER_THREAD, (WAIT_FOR_READ, 60), ("decode", 40)), {}, "read"),
        (spans(LOADER_THREAD, (WAIT_FOR_DECODE, 60), ("augment", 40)), {}, "decode"),
        (spans(LOADER_THREAD, ("augment", 20), (WAIT_FOR_SPACE, 80)), {}, "augment"),
        (spans(LOADER_THREAD, ("decode", 20), (WAIT_FOR_SPACE, 80)), {"gpu": True}, ON_GPU),
        (spans(LOADER_THREAD, ("decode", 20), (WAIT_FOR_GPU, 80)), {"gpu": True}, ON_GPU),
        (spans(LOADER_THREAD, ("decode", 90), (WAIT_FOR_SPACE, 10)), {"gpu": True}, "decode"),
        (spans(LOADER_THREAD, ("decode", 90), ("augment", 10)), {"data_wait": 0.01}, "training"),
        ([], {}, "loader"),
        (
            [
                *spans(LOADER_THREAD, (WAIT_FOR_FEED, 80), ("decode", 20)),
                *spans(FEED_THREAD, (WAIT_FOR_READ, 70), ("draw", 20), ("send", 10)),
            ],
            {},
            "read",
        ),
        (
            [
                *spans(LOADER_THREAD, (WAIT_FOR_FEED, 80), ("decode", 20)),
                *spans(FEED_THREAD, (WAIT_FOR_SPACE, 60), ("draw", 40)),
            ],
            {},
            "draw",
        ),
    ],
)
def test_the_slowest_stage_is_the_one_that_holds_the_loaders_thread_longest(
    events: list[Event], options: dict[str, Any], slowest: str
) -> None:
    found = figures(events, **options)
    assert found.slowest == slowest
    assert found.verdict.startswith(f"slowest stage: {slowest} (")


def test_the_verdict_gives_busy_time_and_how_often_the_ready_queue_was_empty() -> None:
    events = [
        *spans(LOADER_THREAD, ("decode", 96)),
        *spans("MainThread", ("wait for batch", 50)),
        QueueLevel("ready", 0, 0),
        QueueLevel("ready", 81, 1),
    ]
    assert figures(events).verdict == "slowest stage: decode (busy 96%, ready queue empty 81% of the time)"


def test_a_stage_is_busy_while_at_least_one_thread_works_in_it() -> None:
    events = [*spans("reader_0", ("read", 40)), *spans("reader_1", ("read", 40), start=20)]
    read = figures(events).stages["read"]
    assert read.busy == 0.6
    assert read.seconds_per_batch * 1e9 == pytest.approx(80, abs=1000)


def test_only_the_time_within_profiled_steps_counts() -> None:
    events = [
        *spans(LOADER_THREAD, ("decode", 300)),
        QueueLevel("ready", 0, 0),
        QueueLevel("ready", 50, 2),
        QueueLevel("ready", 150, 0),
    ]
    found = figures(events, steps=((0, 100), (200, 300)))
    assert found.stages["decode"].busy == 1.0
    assert found.queues["ready"].empty == 0.75, "50 of the first 100, and all of the second 100"
    assert found.queues["ready"].mean == 0.5
    assert found.queues["ready"].size == SETTINGS.ready


@st.composite
def nested(draw: st.DrawFn) -> list[Span]:
    """Spans of one thread that are disjoint or nested."""
    found: list[Span] = []

    def fill(start: int, end: int, depth: int) -> None:
        at = start
        while depth < 4 and at < end and draw(st.booleans()):
            begin = draw(st.integers(at, end))
            stop = draw(st.integers(begin, end))
            found.append(Span(f"depth {depth}", None, begin, stop, "thread"))
            fill(begin, stop, depth + 1)
            at = stop

    fill(0, 1000, 0)
    return found


@given(nested())
def test_exclusive_parts_give_each_moment_to_the_innermost_span(found: list[Span]) -> None:
    expected = Counter[str]()
    for moment in range(1000):
        covering = [span.stage for span in found if span.start <= moment < span.end]
        if covering:
            expected[max(covering)] += 1  # the deepest
    parts = list(exclusive_parts(found))
    times = Counter[str]()
    for part in parts:
        times[part.stage] += part.end - part.start
    assert times == expected
    assert all(a.end <= b.start for a, b in pairwise(parts)), "in order, without overlap"
