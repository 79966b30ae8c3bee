"""The prefetching thread (pipeline/prefetch.py): order of items, errors, and no leaked threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from pipeline.prefetch import Prefetcher


def test_items_are_delivered_in_order_and_end() -> None:
    items = Prefetcher(iter(range(100)), depth=3, name="t")
    assert list(items) == list(range(100))
    with pytest.raises(StopIteration):
        next(items)


def test_an_error_is_raised_after_the_items_before_it_and_by_every_later_call() -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("disk gone")

    items = Prefetcher(source(), depth=8, name="t")
    assert [next(items), next(items)] == [1, 2]
    for _ in range(3):
        with pytest.raises(OSError, match="disk gone"):
            next(items)


def test_the_thread_runs_no_further_ahead_than_the_depth() -> None:
    made, four = 0, threading.Event()

    def source() -> Iterator[int]:
        nonlocal made
        while True:
            made += 1
            if made == 4:
                four.set()
            yield made

    items = Prefetcher(source(), depth=3, name="t")
    assert four.wait(30)
    time.sleep(0.05)  # time for a fifth item, which must not be produced
    assert made == 4  # three are queued, the thread holds one
    assert items.ready == 3
    items.close()


def test_close_ends_the_thread_and_closes_the_source() -> None:
    closed_in: list[str] = []

    def source() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            closed_in.append(threading.current_thread().name)

    items = Prefetcher(source(), depth=2, name="the-thread")
    next(items)
    items.close()
    items.close()
    assert closed_in == ["the-thread"]
    assert "the-thread" not in [thread.name for thread in threading.enumerate()]
    with pytest.raises(StopIteration):
        next(items)


def test_close_wakes_a_consumer_that_waits_in_another_thread() -> None:
    may_go_on = threading.Event()

    def source() -> Iterator[int]:
        may_go_on.wait(10)
        yield from ()

    items = Prefetcher(source(), depth=2, name="t")
    waiting = threading.Thread(target=lambda: next(items, None))
    waiting.start()
    closing = threading.Thread(target=items.close)
    closing.start()
    may_go_on.set()
    for thread in (waiting, closing):
        thread.join(5)
        assert not thread.is_alive()
    items.close()
