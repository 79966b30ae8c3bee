"""A thread that calls one tracker, so that training does not wait for its server."""

from __future__ import annotations

import collections
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from shards.errors import first_line

MAX_PENDING = 10_000
"""Calls that are kept while a server does not answer; further ones are dropped."""

_Action = Callable[[], Any]


class TrackerThread:
    """Runs actions one after the other, all in the same thread, to which MLflow's active run belongs.

    It is a daemon thread, so that an action that never ends does not keep the process alive.
    """

    def __init__(self, name: str) -> None:
        self._pending: queue.Queue[_Action] = queue.Queue(MAX_PENDING)
        self._failures: collections.deque[str] = collections.deque()
        self._failing = False
        threading.Thread(target=self._run, name=f"tracker {name}", daemon=True).start()

    def call(self, action: _Action) -> None:
        """Run an action and wait for its end; raise its exception."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                action()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        self._pending.put(run)
        done.result()

    def submit(self, action: _Action) -> None:
        """Run an action later. `failures` returns why it failed."""
        try:
            self._pending.put_nowait(action)
        except queue.Full:
            self._note(f"{MAX_PENDING} calls are pending; further ones are dropped")

    def finish(self, action: _Action, *, timeout: float) -> None:
        """Run a last action, and wait for its end for at most `timeout` seconds."""
        done = threading.Event()
        self.submit(action)
        try:
            self._pending.put_nowait(done.set)
            sent = done.wait(timeout)
        except queue.Full:
            sent = False
        if not sent:
            self._failures.append(f"not all values were sent within {timeout:g} seconds")

    def failures(self) -> list[str]:
        """Return the failures since the last call; of consecutive failures only the first."""
        return [self._failures.popleft() for _ in range(len(self._failures))]

    def _note(self, fact: str) -> None:
        if not self._failing:
            self._failures.append(fact)
        self._failing = True

    def _run(self) -> None:
        while True:
            action = self._pending.get()
            try:
                action()
            except BaseException as error:  # a tracker may raise any exception, which must not end the thread
                self._note(first_line(error) or type(error).__name__)
            else:
                self._failing = False
