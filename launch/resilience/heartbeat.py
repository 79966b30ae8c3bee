"""Heartbeats: each rank publishes its step in RUN/heartbeat, and reads those of all ranks when training hangs.

When a collective hangs, further collectives cannot find the rank at fault, and torch's store is lost with the host of
rank 0. Heartbeats are files instead: the run folder is on shared storage, outlives every host and needs no open port.

    RUN/heartbeat/rank-N    replaced every few seconds by rank N: time, step, seconds without progress
    RUN/heartbeat/stacks    created by a rank whose hang timeout has expired; every rank then writes its stack traces

Clocks of different hosts are never compared: a rank is alive if its heartbeat changes while another rank watches it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from launch.machine.network import is_reachable
from launch.machine.world import World, broadcast_from_rank0
from launch.resilience.rank_status import Beat, RankStatus
from launch.run.files import read_regular, unwritable
from shards.files.durable import durable_write, temporary_name
from shards.schema import parse_json

log = logging.getLogger(__name__)

FOLDER = "heartbeat"
REQUEST = "stacks"
MAX_BYTES = 1024  # maximum size of a heartbeat file, which normally has about 200 bytes
CLOSE_SECONDS = 2.0  # timeout for publishing the last heartbeat at the end of a run


_BEAT = TypeAdapter(Beat)


@dataclass(frozen=True)
class Start:
    """One start of a run: its random id, and the host name of each rank."""

    id: str
    hosts: tuple[str, ...]


class Heartbeat:
    """Background thread that publishes the heartbeats of one rank, and writes its stack traces on request of any rank.

    Args:
        folder: RUN/heartbeat.
        interval: seconds between heartbeats.
        progress: returns (optimizer steps done, seconds since the last progress).
        dump: writes this rank's stack traces.
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
        self._requests_stacks = self._answered = self._ended = False
        self._reaches_rank0: bool | None = None
        self.failure = ""
        """Reason why the last heartbeat could not be published; empty if it was."""
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def request_stacks(self) -> None:
        """Request that every other rank writes its stack traces."""
        self._requests_stacks = True
        self._wake.set()
        with contextlib.suppress(OSError):  # if this write fails, publishing heartbeats fails too, and sets `failure`
            durable_write(self.folder / REQUEST, self._start.id.encode())

    def watch(self, seconds: float) -> list[RankStatus]:
        """Request the stack traces of all ranks; read heartbeats until every rank is found alive and has written them.

        Reads and writes files in the calling thread.

        Args:
            seconds: time limit, the same on every observer so that all ranks that are alive end together. If it allows
                less than two heartbeat intervals, every rank counts as alive.
        """
        ranks, end = range(len(self._start.hosts)), time.monotonic() + seconds
        self.request_stacks()
        first = [self._read(rank) for rank in ranks]
        began, last = time.monotonic(), list(first)
        while time.monotonic() < end:
            pending = [rank for rank in ranks if not (is_alive(first[rank], last[rank]) and is_complete(last[rank]))]
            if not pending:
                break
            time.sleep(min(1.0, self.interval))
            for rank in pending:
                last[rank] = self._read(rank) or last[rank]
        elapsed = time.monotonic() - began
        silent = [
            0.0 if is_alive(first[rank], last[rank]) or elapsed < 2 * self.interval else elapsed for rank in ranks
        ]
        return [RankStatus(rank, self._start.hosts[rank], last[rank], silent[rank]) for rank in ranks]

    def _read(self, rank: int) -> Beat | None:
        return read_beat(self.folder / f"rank-{rank}", self._start.id)

    def close(self) -> None:
        """Publish the last heartbeat, waiting at most `CLOSE_SECONDS`. Idempotent."""
        self._ended = True
        self._wake.set()
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while True:
            last = self._ended
            try:
                if self._requests_stacks or is_requested(self.folder / REQUEST, self._start.id):
                    self._answer()
                self._publish(last)
                self.failure = ""
            except Exception as error:  # the thread must survive every file system error
                if not self.failure:
                    log.warning("%s: cannot publish the heartbeat (%s); trying again", self.folder, error)
                self.failure = str(error) or type(error).__name__
            if last:
                return
            self._wake.wait(self.interval)
            self._wake.clear()

    def _answer(self) -> None:
        """Write the requested stack traces, once. On the requesting rank the watchdog has already written them."""
        if self._answered:
            return
        self._answered = True  # set even if the stack traces cannot be written
        self._reaches_rank0 = None if self._world.rank0 is None else is_reachable(self._world.rank0)
        if not self._requests_stacks:
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
        self._temporary.write_text(json.dumps(asdict(beat)))  # fsync is unnecessary: the next heartbeat follows soon
        self._temporary.replace(self.folder / f"rank-{self._world.rank}")


def is_alive(first: Beat | None, last: Beat | None) -> bool:
    """Return whether a rank is alive: its heartbeat changed between two reads, or was the last one before its end."""
    return last is not None and (last.ended or first is None or last.time != first.time)


def is_complete(beat: Beat | None) -> bool:
    """Return whether a rank has written its stack traces or ended, so that waiting for it is pointless."""
    return beat is not None and (beat.stacks or beat.ended)


def new_start(folder: Path, world: World) -> Start:
    """Agree on the id and the hosts of this start; rank 0 removes earlier heartbeats. Collective.

    Raises:
        UserError: the folder cannot be written.
    """
    start = broadcast_from_rank0(lambda: clear(folder), world)
    return Start(start, tuple(world.gather(world.host)))


def clear(folder: Path) -> str:
    """Prepare the folder for a new start, and return the id of that start."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in (*folder.glob("rank-*"), *folder.glob(".rank-*.tmp")):
            path.unlink(missing_ok=True)
        durable_write(folder / REQUEST, b"")  # empty, not absent: NFS clients may cache an absence for a minute
    except OSError as error:
        raise unwritable(folder.parent, error) from error
    return secrets.token_hex(8)


def read_beat(path: Path, start: str) -> Beat | None:
    """Read one heartbeat; return None if it is missing, invalid or of another start."""
    try:
        beat = parse_json(read_regular(path, limit=MAX_BYTES), _BEAT, limit=MAX_BYTES)
    except (OSError, ValueError):
        return None
    return beat if beat.start == start else None


def is_requested(path: Path, start: str) -> bool:
    """Return whether a rank of this start has requested the stack traces."""
    try:
        return read_regular(path, limit=MAX_BYTES) == start.encode()
    except OSError:
        return False
