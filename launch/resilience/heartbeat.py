"""Heartbeats: each rank publishes its step in RUN/heartbeat; when training hangs, ranks read those of the others.

When a collective hangs, nothing that needs one can tell which rank is at fault, and torch's store ends with the host of
rank 0. The run folder is on storage that all hosts share and outlives each of them; no port is opened.

    RUN/heartbeat/rank-N    replaced every few seconds by rank N: time, step, seconds without progress
    RUN/heartbeat/stacks    written by a rank that has waited too long; every rank then writes its stacks, once

Clocks of different hosts are never compared: a rank is alive if its heartbeat changes while another one watches it.
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
MAX_BYTES = 1024  # of a heartbeat file, which has about 200 bytes
CLOSE_SECONDS = 2.0  # limit of the wait for the last heartbeat at the end of a run


_BEAT = TypeAdapter(Beat)


@dataclass(frozen=True)
class Start:
    """One start of a run: a random id, and the host of each rank."""

    id: str
    hosts: tuple[str, ...]


class Heartbeat:
    """Publishes one rank's heartbeats in a thread of its own, and writes its stacks when a rank asks for them.

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
        self.failure = ""
        """Why the last heartbeat could not be published."""
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def ask_for_stacks(self) -> None:
        """Ask every other rank for its stacks."""
        self._asks = True
        self._wake.set()
        with contextlib.suppress(OSError):  # then this rank cannot publish heartbeats either, which `failure` says
            durable_write(self.folder / REQUEST, self._start.id.encode())

    def watch(self, seconds: float) -> list[RankStatus]:
        """Ask every rank for its stacks, and read heartbeats until each has shown a sign of life and written them.

        Reads and writes files in the calling thread.

        Args:
            seconds: limit of all this, since ranks that are alive should end together. Ranks that were watched for less
                than two intervals count as alive.
        """
        ranks, end = range(len(self._start.hosts)), time.monotonic() + seconds
        self.ask_for_stacks()
        first = [self._read(rank) for rank in ranks]
        began, last = time.monotonic(), list(first)
        while time.monotonic() < end:
            pending = [rank for rank in ranks if not (is_alive(first[rank], last[rank]) and is_complete(last[rank]))]
            if not pending:
                break
            time.sleep(min(1.0, self.interval))
            for rank in pending:
                last[rank] = self._read(rank) or last[rank]
        watched = time.monotonic() - began
        silent = [
            0.0 if is_alive(first[rank], last[rank]) or watched < 2 * self.interval else watched for rank in ranks
        ]
        return [RankStatus(rank, self._start.hosts[rank], last[rank], silent[rank]) for rank in ranks]

    def _read(self, rank: int) -> Beat | None:
        return read_beat(self.folder / f"rank-{rank}", self._start.id)

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
                self.failure = ""
            except Exception as error:  # the thread must survive all errors of the file system
                if not self.failure:
                    log.warning("%s: no heartbeat published (%s); trying again", self.folder, error)
                self.failure = str(error) or type(error).__name__
            if last:
                return
            self._wake.wait(self.interval)
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


def is_alive(first: Beat | None, last: Beat | None) -> bool:
    """Whether a heartbeat has changed between two looks, or says that the rank has ended."""
    return last is not None and (last.ended or first is None or last.time != first.time)


def is_complete(beat: Beat | None) -> bool:
    """Whether nothing more is to come from a rank."""
    return beat is not None and (beat.stacks or beat.ended)


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
