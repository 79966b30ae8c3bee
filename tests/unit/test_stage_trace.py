"""The record of a loader's stages and queues (pipeline/stage_trace.py), from real loaders."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections import defaultdict
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import stage_trace
from pipeline.augment.recipe import augment_recipe
from pipeline.batch_shape import BatchShape
from pipeline.loader import LoaderOptions, TrainLoader
from pipeline.plan import TrainPlan
from pipeline.stage_trace import (
    WAIT_FOR_BATCH,
    WAIT_FOR_DECODE,
    WAIT_FOR_FEED,
    WAIT_FOR_READ,
    WAIT_FOR_SPACE,
    QueueLevel,
    Span,
    StageTrace,
)
from shards.format.dataset import ShardSet

RECORDED = 20
COMMON = {"read", "draw", "augment", "transfer", WAIT_FOR_BATCH, WAIT_FOR_READ, WAIT_FOR_SPACE}
needs_ffcv = pytest.mark.skipif(
    importlib.util.find_spec("ffcv") is None and os.environ.get("CI") != "true", reason="needs FFCV"
)
# Options of the loader -> its stages and waits, and its queues.
LOADERS = {
    "dali": ({}, COMMON | {"decode", "resize"}, {"read", "decoding", "ready"}),
    "dali, feed process": (
        {"feed_process": "on"},
        COMMON | {"decode", "resize", "send", WAIT_FOR_FEED},
        {"read", "decoding", "ready"},
    ),
    "ffcv": ({"loader": "ffcv"}, COMMON | {"decode", WAIT_FOR_DECODE}, {"read", "decoded", "ready"}),
    "synthetic": ({"loader": "synthetic"}, {WAIT_FOR_BATCH, WAIT_FOR_SPACE}, {"ready"}),
}
IN_ORDER = ("read", "draw", "send", "decode", "resize", "augment", "transfer", WAIT_FOR_BATCH)


def open_loader(path: Path, **options: Any) -> TrainLoader:
    dataset, recipe = ShardSet(path), augment_recipe("fat", size=32)
    plan = TrainPlan(dataset.shard_samples("train"), global_batch=48, seed=5, pairs=recipe.mixes)
    return TrainLoader(
        dataset,
        plan,
        BatchShape(global_batch=48, pairs=recipe.mixes),
        recipe,
        epochs=3,
        device=torch.device("cpu"),
        options=LoaderOptions(**options),
    )


def record(loader: TrainLoader, *, skipped: int = 12) -> tuple[list[Span], list[QueueLevel]]:
    with loader:
        for _ in range(skipped):
            next(loader)
        assert loader.stage_trace.drain() == [], "nothing is recorded before `start`"
        loader.stage_trace.start()
        for _ in range(RECORDED):
            next(loader)
        loader.stage_trace.stop()
        events = loader.stage_trace.drain()
        next(loader)
        assert loader.stage_trace.drain() == [], "nothing is recorded after `stop`"
    return [e for e in events if isinstance(e, Span)], [e for e in events if isinstance(e, QueueLevel)]


@pytest.mark.parametrize("name", [pytest.param(n, marks=needs_ffcv if n == "ffcv" else ()) for n in LOADERS])
def test_every_loader_records_its_stages_in_order_and_its_queues(digits: Path, name: str) -> None:
    options, stages, queues = LOADERS[name]
    spans, levels = record(open_loader(digits, **options))
    assert {span.stage for span in spans} == stages
    assert {level.queue for level in levels} == queues

    by_batch: dict[int, dict[str, list[Span]]] = defaultdict(lambda: defaultdict(list))
    for span in spans:
        if span.batch is not None:
            by_batch[span.batch][span.stage].append(span)
    order = [stage for stage in IN_ORDER if stage in stages]
    complete = [batch for batch in by_batch.values() if set(order) <= set(batch)]
    assert len(complete) >= RECORDED // 3
    for batch in complete:
        ends = [max(span.end for span in batch[stage]) for stage in order]
        assert ends == sorted(ends), [(stage, batch[stage]) for stage in order]

    sizes = LoaderOptions(**options).settings
    largest = {"read": sizes.read_ahead + 1, "decoding": sizes.decode_ahead, "decoded": sizes.decode_ahead + 1}
    for level in levels:
        assert 0 <= level.batches <= largest.get(level.queue, sizes.ready)


@pytest.mark.parametrize("name", ["dali", "dali, feed process"])
def test_spans_of_a_thread_are_disjoint_or_nested(digits: Path, name: str) -> None:
    spans, _ = record(open_loader(digits, **LOADERS[name][0]))
    by_thread: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        by_thread[span.thread].append(span)
    assert {"MainThread", "train-loader"} <= set(by_thread)
    for of_thread in by_thread.values():
        open_spans: list[Span] = []
        for span in sorted(of_thread, key=lambda span: (span.start, -span.end)):
            while open_spans and open_spans[-1].end <= span.start:
                open_spans.pop()
            assert not open_spans or span.end <= open_spans[-1].end, (open_spans[-1], span)
            open_spans.append(span)


def test_the_feed_process_records_its_own_threads(digits: Path) -> None:
    spans, _ = record(open_loader(digits, feed_process="on"))
    threads = {stage: {span.thread for span in spans if span.stage == stage} for stage in ("draw", "send", "read")}
    assert threads["draw"] == threads["send"] == {"feed process: MainThread"}
    assert all(thread.startswith("feed process: batch-reader") for thread in threads["read"])
    waits = [span for span in spans if span.stage == WAIT_FOR_FEED]
    assert {span.thread for span in waits} == {"train-loader"}
    drawn = [span.start for span in spans if span.stage == "draw"]
    begin, end = min(span.start for span in waits), max(span.end for span in spans if span.stage == WAIT_FOR_BATCH)
    assert any(begin < start < end for start in drawn), "the clock is the same in both processes"


def test_stop_ends_open_spans_and_later_ends_of_them_are_ignored() -> None:
    trace = StageTrace()
    trace.start()
    with trace.span("outer", 7):
        with trace.span("inner"):
            pass
        trace.stop()
        stopped = trace.drain()
    assert [(span.stage, span.batch) for span in stopped if isinstance(span, Span)] == [("inner", None), ("outer", 7)]
    assert trace.drain() == []


def test_a_span_that_began_before_start_is_not_recorded() -> None:
    trace = StageTrace()
    with trace.span("early"):
        trace.start()
    assert trace.drain() == []


def test_events_of_another_process_are_ignored_after_stop() -> None:
    trace, event = StageTrace(), QueueLevel("read", 1, 2)
    trace.extend([event])
    assert trace.drain() == []
    trace.start()
    trace.extend([event])
    assert trace.drain() == [event]


def test_the_oldest_events_are_discarded_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_trace, "MAX_EVENTS", 3)
    trace = StageTrace()
    trace.start()
    for number in range(5):
        trace.level("ready", number)
    assert [event.batches for event in trace.drain() if isinstance(event, QueueLevel)] == [2, 3, 4]


@pytest.mark.parametrize("done_before", [0, 1, 2])
def test_a_level_is_recorded_when_the_last_future_is_done(done_before: int) -> None:
    trace, futures = StageTrace(), [Future[None](), Future[None]()]
    for future in futures[:done_before]:
        future.set_result(None)
    trace.start()
    trace.level_when_done("read", futures, lambda: sum(future.done() for future in futures))
    for future in reversed(futures[done_before:]):
        assert trace.drain() == []
        thread = threading.Thread(target=future.set_result, args=(None,))
        thread.start()
        thread.join()
    assert [event.batches for event in trace.drain() if isinstance(event, QueueLevel)] == [2]
