"""The watchdog: a run in which no step ends for too long is explained, and ended for another start.

Each rank has one. Its thread looks at the last sign of progress; when that is too old, the stacks of all ranks that can
still be reached are written to RUN/stacks-rankN.txt, RUN/status becomes `stalled` with the ranks that do not answer or
lag, and the process leaves with `EXIT_STATUS`. Should even that thread get nowhere (a library that holds Python's
lock), a timer in C writes the stacks and ends the process.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from launch.network import START_TIMEOUT, host_name, shorten_timeouts
from launch.peers import Peers, Standing, explain
from launch.preempt import EXIT_STATUS
from launch.status import read_status, write_status
from launch.world import World

T = TypeVar("T")

# Longer than all that the thread does once the limit is passed.
LAST_RESORT_SECONDS = 60.0
# Leaving breaks the others' connections: first they may write their stacks and say what they see.
FAREWELL_SECONDS = 3.0


class Watchdog:
    """A context manager around the training loop, which calls `beat`. Made by all ranks together.

    Args:
        run: run folder.
        timeout: seconds without progress that are too many; 0 = no watchdog. Until the first step is done, at least
            half an hour is allowed.
    """

    def __init__(self, run: Path, world: World, *, timeout: float) -> None:
        self._run, self._world, self._timeout = run, world, timeout
        self._limit = max(timeout, START_TIMEOUT.total_seconds())
        self._steps, self._beat_at = 0, time.monotonic()
        self._stepped = self._evaluated = False
        self._ends = threading.Event()
        self._dumping = threading.Lock()
        self.stacks = run / f"stacks-rank{world.rank}.txt"
        """Where this rank's stacks go; there while the run goes on, and afterwards if anything was written."""

    def __enter__(self) -> Watchdog:
        if self._timeout:
            self._run.mkdir(parents=True, exist_ok=True)  # rank 0 may not have come to it yet
            self._file = self.stacks.open("a", encoding="utf-8")  # an earlier start's may be there
            self._peers = Peers(self._world, self._standing, self.dump)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._timeout:
            return
        self._ends.set()
        self._thread.join()
        self._peers.close()
        with self._dumping:
            self._file.close()
        if self.stacks.exists() and self.stacks.stat().st_size == 0:
            self.stacks.unlink()

    def beat(self, steps: int | None = None) -> None:
        """A sign of progress.

        Args:
            steps: optimiser steps that are behind the run; None = progress within one.
        """
        if steps is not None:
            self._steps = steps
            if not self._stepped and self._timeout:
                self._stepped, self._limit = True, self._timeout
                if self._world.size > 1:
                    shorten_timeouts(self._timeout)
        self._beat_at = time.monotonic()

    def watched(self, items: Iterable[T]) -> Iterator[T]:
        """`items`, each of which is a sign of progress. The first of all may be compiled for, as the first step is."""
        for item in items:
            self.beat()
            limit = self._limit
            if not self._evaluated:
                self._limit = max(limit, START_TIMEOUT.total_seconds())
            yield item
            self._evaluated, self._limit = True, limit
        self.beat()

    def dump(self) -> None:
        """Write the stacks of all threads of this rank."""
        with self._dumping:
            if self._file.closed:
                return
            self._file.write(f"{time.strftime('%F %T')}: rank {self._world.rank}, {self._steps} steps done\n")
            self._file.flush()
            faulthandler.dump_traceback(self._file, all_threads=True)

    def _standing(self) -> tuple[int, float]:
        return self._steps, time.monotonic() - self._beat_at

    def _watch(self) -> None:
        interval = min(1.0, self._timeout / 10)
        while not self._ends.wait(interval):
            faulthandler.dump_traceback_later(self._limit + LAST_RESORT_SECONDS, file=self._file, exit=True)
            if time.monotonic() - self._beat_at > self._limit:
                self._end()
        faulthandler.cancel_dump_traceback_later()

    def _end(self) -> None:
        """Explain, and leave without ceremony: the main thread may never come back."""
        steps, seconds = self._standing()
        self.dump()
        reason = f"rank {self._world.rank} on {host_name()}: no progress for {seconds:.0f} s after step {steps}"
        standings: list[Standing] = []
        if self._world.local_rank == 0:  # one rank of a host sees what the host sees
            standings = self._peers.ask(stacks=True)
            reason += f"; {explain(standings, steps)}"
            if read_status(self._run) != "stalled" or any(standing.silent for standing in standings):
                write_status(self._run, "stalled", reason=reason, nodes=unreachable(standings))
        print(f"stalled: {reason}; stacks are in {self.stacks}", file=sys.stderr, flush=True)
        time.sleep(FAREWELL_SECONDS)
        os._exit(EXIT_STATUS)


def unreachable(standings: list[Standing]) -> list[str]:
    """Hosts none of whose ranks answers; none where that is most of them, as then it is this host that is cut off."""
    own = host_name()
    hosts = {standing.peer.host for standing in standings} - {own}
    answering = {standing.peer.host for standing in standings if not standing.silent}
    silent = sorted(hosts - answering)
    return silent if len(silent) <= len(hosts) // 2 else []
