"""Heartbeats: each rank publishes its step in RUN/heartbeat; when training hangs, ranks read those of the others.

When a collective hangs, nothing that needs one can tell which rank is at fault, and torch's store ends with the host of
rank 0. The run folder is on storage that all hosts share and outlives each of them; no port is opened.

    RUN/heartbeat/rank-N    replaced every few seconds by rank N: time, step, seconds without progress
    RUN/heartbeat/stacks    written by a rank that has waited too long; every rank then writes its stacks, once

Clocks of different hosts are never compared: a rank is alive if its heartbeat changes while another one watches it.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from launch.machine.network import is_reachable
from launch.machine.world import World, broadcast_from_rank0
from launch.resilience.rank_status import RankStatus
from launch.run.files import read_regular, unwritable
from shards.files.durable import durable_write, temporary_name
from shards.schema import Count, Digest, Finite, parse_json

log = logging.getLogger(__name__)

FOLDER = "heartbeat"
REQUEST = "stacks"
MAX_BYTES = 1024  # of a heartbeat file, which has about 200 bytes
CLOSE_SECONDS = 2.0  # limit of the wait for the last heartbeat at the end of a run


@dataclass(frozen=True)
class Beat:
    """Content of RUN/heartbeat/rank-N."""

    start: Digest
    """Random id of this start of the run; files of earlier starts are ignored."""
    time: Finite
    """Wall-clock time of the rank's host, for people and to tell heartbeats apart."""
    step: Count
    """Optimizer steps done."""
    idle: Annotated[Finite, Field(ge=0)]
    """Seconds since the last sign of progress, by the rank's own monotonic clock."""
    host: Annotated[str, Field(max_length=255)]
    pid: Count
    stacks: bool
    """Whether the rank has written its stacks because a rank asked for them."""
    reaches_rank0: bool | None
    """Whether it could connect to the host of rank 0 when it wrote its stacks; None = not tried."""
    ended: bool
    """Whether this is the last heartbeat: the rank has left its training loop, or its watchdog ends it."""


_BEAT = TypeAdapter(Beat)


@dataclass(frozen=True)
class Start:
    """One start of a run: a random id, and the host of each rank."""

    id: str
    hosts: tuple[str, ...]


class Heartbeat:
    """Publishes one rank's heartbeats and reads those of the others, in a thread of its own.

    If the file system hangs, that thread alone hangs: only `ask_for_stacks` of the methods touches a file.

    Args:
        folder: RUN/heartbeat.
        interval: seconds between two heartbeats.
        progress: returns (steps done, seconds since the last sign of progress).
        dump: writes this rank's stacks.
    """

    def __init__(
        self,
        folder: Path,
        start: Start,
        world: World,
        *,
        interval: float,
        progress: Callable[[], tuple[int, float]],
        dump: Callable[[], None],
    ) -> None:
        self.folder, self.interval = folder, interval
        self._start, self._world = start, world
        self._progress, self._dump = progress, dump
        self._temporary = temporary_name(folder / f"rank-{world.rank}")
        self._asks = self._answered = self._ended = False
        self._reaches_rank0: bool | None = None
        self._first: dict[int, tuple[float, float | None]] = {}  # when each rank was first read, and its `Beat.time`
        self._last: dict[int, Beat] = {}
        self._alive: set[int] = set()
        self.observes = False
        """Whether the thread reads the heartbeats of all ranks; set by the watchdog."""
        self.failure = ""
        """Why the last heartbeat could not be published."""
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def ask_for_stacks(self) -> None:
        """Ask every other rank for its stacks.

        Raises:
            OSError: the request cannot be written.
        """
        self.observes = self._asks = True
        self._wake.set()
        durable_write(self.folder / REQUEST, self._start.id.encode())

    def pending(self) -> list[int]:
        """Return the ranks that have shown no sign of life, or not written their stacks, since they were watched."""
        return [
            rank
            for rank in range(len(self._start.hosts))
            if (beat := self._last.get(rank)) is None or not (beat.ended or (beat.stacks and rank in self._alive))
        ]

    def ranks(self) -> list[RankStatus]:
        """Return what is known of every rank. One that was watched for less than two intervals counts as alive."""
        now, statuses = time.monotonic(), []
        for rank, host in enumerate(self._start.hosts):
            beat = self._last.get(rank)
            watched = now - self._first.get(rank, (now, None))[0]
            alive = rank in self._alive or watched < 2 * self.interval or (beat is not None and beat.ended)
            status = RankStatus(rank, host, silent_seconds=0.0 if alive else watched)
            if beat is not None:
                reached = not alive or beat.reaches_rank0 is not False
                status = replace(status, pid=beat.pid, step=beat.step, idle_seconds=beat.idle, disconnected=not reached)
            statuses.append(status)
        return statuses

    def close(self) -> None:
        """Publish the last heartbeat; waits for it `CLOSE_SECONDS` at most. Idempotent."""
        self._ended = True
        self._wake.set()
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while True:
            last = self._ended
            try:
                if self._asks or is_requested(self.folder / REQUEST, self._start.id):
                    self._answer()
                self._publish(last)
                self._observe()
                self.failure = ""
            except Exception as error:  # the thread must survive all errors of the file system
                if not self.failure:
                    log.warning("%s: no heartbeat published (%s); trying again", self.folder, error)
                self.failure = str(error) or type(error).__name__
            if last:
                return
            self._wake.wait(min(1.0, self.interval) if self._asks else self.interval)
            self._wake.clear()

    def _answer(self) -> None:
        """Write the stacks that a rank asks for, once; the watchdog of a rank that asks has written its own."""
        if self._answered:
            return
        self._answered = True  # also where the stacks cannot be written
        self._reaches_rank0 = None if self._world.rank0 is None else is_reachable(self._world.rank0)
        if not self._asks:
            self._dump()

    def _publish(self, last: bool) -> None:
        step, idle = self._progress()
        beat = Beat(
            start=self._start.id,
            time=time.time(),
            step=step,
            idle=round(idle, 1),
            host=self._world.host,
            pid=os.getpid(),
            stacks=self._answered,
            reaches_rank0=self._reaches_rank0,
            ended=last,
        )
        self._temporary.write_text(json.dumps(asdict(beat)))  # not durable: the next one follows in seconds
        self._temporary.replace(self.folder / f"rank-{self._world.rank}")

    def _observe(self) -> None:
        """Read the heartbeats of ranks from which something is still to come, and remember which of them change."""
        if not self.observes:
            self._first, self._last, self._alive = {}, {}, set()
            return
        for rank in self.pending():
            beat = read_beat(self.folder / f"rank-{rank}", self._start.id)
            published = None if beat is None else beat.time
            _, first = self._first.setdefault(rank, (time.monotonic(), published))
            if beat is not None:
                self._last[rank] = beat
            if published not in (None, first):
                self._alive.add(rank)


def new_start(folder: Path, world: World) -> Start:
    """Agree on the id and the hosts of this start; rank 0 removes the heartbeats of earlier starts. Collective.

    Raises:
        UserError: the folder cannot be written.
    """
    start = broadcast_from_rank0(lambda: clear(folder), world)
    return Start(start, tuple(world.gather(world.host)))


def clear(folder: Path) -> str:
    """Make the folder ready for a new start, and return the id of that start."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in (*folder.glob("rank-*"), *folder.glob(".rank-*.tmp")):
            path.unlink(missing_ok=True)
        durable_write(folder / REQUEST, b"")  # NFS may cache for a minute that a file does not exist
    except OSError as error:
        raise unwritable(folder.parent, error) from error
    return secrets.token_hex(8)


def read_beat(path: Path, start: str) -> Beat | None:
    """Read one heartbeat; None unless it is valid and of this start."""
    try:
        beat = parse_json(read_regular(path, limit=MAX_BYTES), _BEAT, limit=MAX_BYTES)
    except (OSError, ValueError):
        return None
    return beat if beat.start == start else None


def is_requested(path: Path, start: str) -> bool:
    """Whether a rank of this start has asked for stacks."""
    try:
        return read_regular(path, limit=MAX_BYTES) == start.encode()
    except OSError:
        return False
