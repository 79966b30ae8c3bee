"""Heartbeats: each rank publishes its step in RUN/heartbeat, and ranks whose training hangs read those of the others.

When a collective hangs, nothing that needs one can tell which rank is at fault, and torch's store ends with the host of
rank 0. The run folder is on storage that all hosts share and outlives each of them; no port is opened.

    RUN/heartbeat/rank-N    replaced every few seconds by rank N: a count, its step, seconds without progress
    RUN/heartbeat/stacks    replaced by a rank that has waited too long; every rank then writes its stacks, once

Clocks of different hosts are never compared: a rank is alive if its count changes while another one watches it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch.distributed as dist
from pydantic import Field, TypeAdapter

from launch.machine.network import host_name, is_reachable, rank0_address
from launch.machine.world import World
from launch.run.files import read_regular
from shards.files.durable import is_temporary, temporary_name, write_all
from shards.schema import Count, Digest, Finite, parse_json

T = TypeVar("T")

log = logging.getLogger(__name__)

FOLDER = "heartbeat"
REQUEST = "stacks"
# Of a heartbeat file; one has about 200 bytes.
MAX_BYTES = 1024
# Heartbeats per second of all ranks together. Replacing a file takes about six operations of shared storage.
BEATS_PER_SECOND = 100
# Shortest interval between two heartbeats of a rank.
INTERVAL_SECONDS = 5.0
# Number of intervals for which a rank is watched before it is classified.
WATCHED_INTERVALS = 3
# Smallest number of intervals in the watchdog's timeout, so that three intervals are at most a fifth of it.
INTERVALS_IN_TIMEOUT = 15
# Ranks that read the heartbeats of all: enough to outlive the loss of several hosts, few enough for shared storage.
OBSERVERS = 16
# How long to wait for the stacks and heartbeats of other ranks after the timeout.
ANSWER_SECONDS = 12.0
# How long to wait for the last heartbeat at the end of a run, because a file system may delay it.
CLOSE_SECONDS = 2.0
SHOWN = 16
_HEARTBEAT = r"rank-\d+"


@dataclass(frozen=True)
class Beat:
    """Content of RUN/heartbeat/rank-N."""

    start: Digest
    """Random id of this start of the run; files of earlier starts are ignored."""
    count: Count
    """Increased with every heartbeat."""
    step: Count
    """Optimizer steps done."""
    idle: Annotated[Finite, Field(ge=0)]
    """Seconds since the last sign of progress, by the rank's own monotonic clock."""
    host: Annotated[str, Field(max_length=255)]
    pid: Count
    stacks: bool
    """Whether the rank has written its stacks because another rank asked for them."""
    reaches_rank0: bool | None
    """Whether it could connect to the host of rank 0 when it wrote its stacks; None = not tried."""
    ended: bool
    """Whether this is the last heartbeat: the rank has left its training loop, or its watchdog ends it."""


@dataclass(frozen=True)
class Request:
    """Content of RUN/heartbeat/stacks."""

    start: Digest
    rank: Count | None
    """Rank that asks for stacks; None = no rank has asked."""


_BEAT, _REQUEST = TypeAdapter(Beat), TypeAdapter(Request)


@dataclass(frozen=True)
class Member:
    """A rank of this start, as it introduced itself to the others."""

    rank: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.pid})"


@dataclass(frozen=True)
class Start:
    """One start of a run: a random id, and its ranks."""

    id: str
    members: tuple[Member, ...]


@dataclass(frozen=True)
class RankStatus:
    """State of a rank as its heartbeats show it."""

    member: Member
    beat: Beat | None
    """The last heartbeat read; None = none could be read."""
    alive: bool
    """Whether a new heartbeat appeared while the rank was watched. True too if it was not watched for long enough."""

    @property
    def silent(self) -> bool:
        return not self.alive and not self.ended

    @property
    def ended(self) -> bool:
        return self.beat is not None and self.beat.ended

    @property
    def disconnected(self) -> bool:
        """Whether the rank is alive, but its host cannot connect to the host of rank 0."""
        return not self.silent and self.beat is not None and self.beat.reaches_rank0 is False


def introduce(folder: Path, world: World) -> Start:
    """Agree on the ranks and the id of this start; rank 0 removes what an earlier start left. Collective."""
    own = (secrets.token_hex(8), Member(world.rank, host_name(), os.getpid()))
    if world.is_main:
        try:
            prepare(folder, own[0])
        except OSError as error:
            log.warning("%s: cannot be prepared (%s); a hang will be reported without the failing ranks", folder, error)
    everyone: list[Any] = [own] * world.size
    dist.all_gather_object(everyone, own)
    return Start(everyone[0][0], tuple(member for _, member in everyone))


def prepare(folder: Path, start: str) -> None:
    """Create the folder, remove files of earlier starts, and write an empty request.

    The request file exists from the start, because NFS may cache for a minute that a file does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / REQUEST, Request(start, None))  # first, so that processes of an earlier start stop writing
    with os.scandir(folder) as entries:
        for entry in entries:
            old = re.fullmatch(_HEARTBEAT, entry.name) or is_temporary(entry.name, f"{_HEARTBEAT}|{REQUEST}")
            if old and not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)


def beat_interval(timeout: float, ranks: int) -> float:
    """Seconds between two heartbeats of a rank, for a watchdog of `timeout` seconds."""
    return min(timeout / INTERVALS_IN_TIMEOUT, max(INTERVAL_SECONDS, ranks / BEATS_PER_SECOND))


def is_observer(rank: int, ranks: int) -> bool:
    """Whether `rank` reads the heartbeats of all when training hangs: all of few, else some spread over the hosts."""
    return ranks <= OBSERVERS or rank in {number * ranks // OBSERVERS for number in range(OBSERVERS)}


class Heartbeat:
    """Publishes one rank's heartbeats, and answers requests for stacks, from a thread of its own.

    No method blocks on the file system: if it hangs, only the thread hangs.

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
        rank: int,
        *,
        interval: float,
        progress: Callable[[], tuple[int, float]],
        dump: Callable[[], None],
    ) -> None:
        self.folder, self.start, self.rank, self.interval = folder, start, rank, interval
        self._progress, self._dump = progress, dump
        self._own = start.members[rank]
        self._rank0 = rank0_address()
        self._count = 0
        self._asks, self._answered, self._ended = False, False, False
        self._reaches_rank0: bool | None = None
        self._wake = threading.Event()
        self._wake.set()
        self.failure = ""
        """Why the last heartbeat could not be published."""
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def ask_for_stacks(self) -> None:
        """Ask every other rank for its stacks.

        Raises:
            OSError: the request cannot be written.
        """
        self._asks = True
        self._wake.set()
        replace_file(self.folder / REQUEST, Request(self.start.id, self.rank))

    def close(self) -> None:
        """Publish the last heartbeat; waits for it `CLOSE_SECONDS` at most. Idempotent."""
        self._ended = True
        self._wake.set()
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        last = False
        while not last:
            self._wake.wait(self.interval)
            self._wake.clear()
            last = self._ended
            try:
                request = read_file(self.folder / REQUEST, _REQUEST)
                if request is not None and request.start != self.start.id:
                    raise RuntimeError("a later start of this run uses the folder")
                if self._asks or (request is not None and request.rank is not None):
                    self._answer()
                self._publish()
                self.failure = ""
            except Exception as error:  # the thread must survive all errors of the file system
                if not self.failure:
                    log.warning("%s: no heartbeat published (%s); trying again", self.folder, error)
                self.failure = str(error) or type(error).__name__

    def _answer(self) -> None:
        """Write the stacks that a rank asks for, once."""
        if self._answered:
            return
        if not self._asks:
            try:
                self._dump()
            except (OSError, ValueError) as error:  # ValueError: the file is closed
                log.warning("stacks not written: %s", error)
        self._reaches_rank0 = None if self._rank0 is None else is_reachable(self._rank0)
        self._answered = True

    def _publish(self) -> None:
        step, idle = self._progress()
        self._count += 1
        beat = Beat(
            start=self.start.id,
            count=self._count,
            step=step,
            idle=round(idle, 1),
            host=self._own.host,
            pid=self._own.pid,
            stacks=self._answered,
            reaches_rank0=self._reaches_rank0,
            ended=self._ended,
        )
        try:
            replace_file(self.folder / f"rank-{self.rank}", beat)
        except FileNotFoundError:  # the folder was removed
            self.folder.mkdir(exist_ok=True)
            raise


class Observation:
    """Reads the heartbeats of all ranks, and remembers which of them change.

    Args:
        interval: seconds between two heartbeats. A rank that was not watched for two of them counts as alive.
    """

    def __init__(self, folder: Path, start: Start, *, interval: float) -> None:
        self._folder, self._start, self._needed = folder, start, 2 * interval
        self._begun = time.monotonic()
        self._first: dict[int, tuple[float, int | None]] = {}
        self._watched: dict[int, float] = {}
        self._last: dict[int, Beat] = {}
        self._alive: set[int] = set()
        self._first_look = threading.Thread(target=self.look, name="first-look", daemon=True)

    def begin(self) -> None:
        """Take the first look, in a thread."""
        self._first_look.start()

    def look(self, ranks: Iterable[int] | None = None) -> None:
        """Read the heartbeats of `ranks` (None = all). Blocks as long as the file system does."""
        for rank in range(len(self._start.members)) if ranks is None else ranks:
            beat = read_file(self._folder / f"rank-{rank}", _BEAT)
            if beat is not None and beat.start != self._start.id:
                beat = None
            now, count = time.monotonic(), None if beat is None else beat.count
            since, first = self._first.setdefault(rank, (now, count))
            self._watched[rank] = now - since
            if count not in (None, first):
                self._alive.add(rank)
            if beat is not None:
                self._last[rank] = beat

    def pending(self) -> list[int]:
        """Ranks that have not shown a sign of life yet, or have not written their stacks yet."""
        return [
            status.member.rank
            for status in self.ranks()
            if not status.ended and not (status.alive and status.beat is not None and status.beat.stacks)
        ]

    def wait(self, seconds: float, *, pause: float) -> None:
        """Look again until nothing is pending, or for `seconds`."""
        end = time.monotonic() + seconds
        self._first_look.join(seconds)
        while (pending := self.pending()) and time.monotonic() < end:
            time.sleep(pause)
            self.look(pending)

    def ranks(self) -> list[RankStatus]:
        """Return what is known of every rank."""
        return [
            RankStatus(
                member,
                self._last.get(member.rank),
                alive=member.rank in self._alive or self._watched.get(member.rank, -1.0) < self._needed,
            )
            for member in self._start.members
        ]

    @property
    def seconds(self) -> float:
        """How long the ranks have been watched."""
        return time.monotonic() - self._begun


def describe_failure(ranks: Collection[RankStatus], own: int, step: int, seconds: float) -> str:
    """Describe in one line which ranks are silent, behind or ahead.

    Args:
        own: rank of the caller.
        step: steps that it has done.
        seconds: how long the others have been watched.
    """
    others = [status for status in ranks if status.member.rank != own]
    silent = [
        f"{status.member}, {f'last at step {status.beat.step}' if status.beat else 'no heartbeat at all'}"
        for status in others
        if status.silent
    ]
    heard = [(status.member, status.beat) for status in others if not status.silent and status.beat is not None]
    disconnected = [str(status.member) for status in ranks if status.disconnected]
    behind = [f"{member}, at step {beat.step} for {beat.idle:.0f} s" for member, beat in heard if beat.step < step]
    ahead = [f"{member}, at step {beat.step}" for member, beat in heard if beat.step > step]
    labels = (
        (f"no heartbeat for {seconds:.0f} s from", silent),
        ("no connection to the host of rank 0 from", disconnected),
        ("behind", behind),
        ("ahead", ahead),
    )
    parts = [
        f"{label}: {'; '.join(names[:SHOWN])}{f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''}"
        for label, names in labels
        if names
    ]
    return "; ".join(parts) or (
        f"all other ranks are alive and at step {step} too: a collective, the network or a file system hangs"
    )


def failing_hosts(ranks: Collection[RankStatus]) -> list[str]:
    """Return the hosts that the next start should leave out.

    Hosts without a live rank, if they are at most half of the other hosts; otherwise this host may be at fault.
    Without any, hosts that do not reach the host of rank 0, if they are the minority; the host of rank 0, if no other
    host of several reaches it.
    """
    hosts = {status.member.host for status in ranks}
    silent = hosts - {status.member.host for status in ranks if not status.silent}
    if silent:
        return sorted(silent) if 2 * len(silent) <= len(hosts) - 1 else []
    rank0 = next(status.member.host for status in ranks if status.member.rank == 0)
    disconnected = {status.member.host for status in ranks if status.disconnected}
    others = hosts - {rank0}
    if 2 * len(disconnected) <= len(others):
        return sorted(disconnected)
    return [rank0] if disconnected == others and len(others) > 1 else []


def read_file(path: Path, schema: TypeAdapter[T]) -> T | None:
    """Read one small file of RUN/heartbeat; None unless it is a regular file with valid content."""
    try:
        content = read_regular(path, limit=MAX_BYTES, flags=os.O_RDONLY | os.O_NOFOLLOW)  # a rank writes no symlinks
        return parse_json(content, schema, limit=MAX_BYTES)
    except (OSError, ValueError):
        return None


def replace_file(path: Path, content: Beat | Request) -> None:
    """Replace a file in one step. Not durable: the next heartbeat follows in seconds.

    Raises:
        OSError: the file system refuses.
    """
    temporary = temporary_name(path)
    try:
        with temporary.open("xb", buffering=0) as file:
            write_all(file, json.dumps(dataclasses.asdict(content)).encode())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
