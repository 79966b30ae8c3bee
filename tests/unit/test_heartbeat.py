"""Heartbeats in RUN/heartbeat, and the ranks and hosts at fault. tests/dist tests them with several processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.machine import network
from launch.machine.world import World
from launch.resilience.heartbeat import MAX_BYTES, Heartbeat, Start, clear, read_beat
from launch.resilience.rank_status import Beat, RankStatus, describe_failure, failing_hosts
from launch.resilience.watchdog import OBSERVERS, is_observer
from tests.support.launching import ROOT
from tests.support.waiting import wait_until

ID, EARLIER = "0123456789abcdef", "fedcba9876543210"


def beat(start: str, **changes: Any) -> Beat:
    fields: dict[str, Any] = {
        "start": start, "time": 1.0, "step": 5, "idle": 1.0, "host": "h1", "pid": 7, "stacks": False,
        "reaches_rank0": None, "ended": False,
    }  # fmt: skip
    return Beat(**fields | changes)


def encoded(content: Beat, **changes: Any) -> bytes:
    return json.dumps(dataclasses.asdict(content) | changes).encode()


# -- messages and hosts to exclude -------------------------------------------------------------------------------------


def ranks_of(count: int, per_host: int = 1, **by_rank: dict[str, Any]) -> list[RankStatus]:
    """Return ranks that are alive at step 5, except for changes such as r1={"step": 4}."""
    ranks = []
    for rank in range(count):
        changes = by_rank.get(f"r{rank}", {})
        own = {name: changes[name] for name in ("silent_seconds", "beat") if name in changes}
        last = beat(ID, pid=100 + rank, **{name: value for name, value in changes.items() if name not in own})
        ranks.append(RankStatus(**{"rank": rank, "host": f"h{rank // per_host}", "beat": last} | own))
    return ranks


SILENT, OFFLINE = {"silent_seconds": 9.0}, {"reaches_rank0": False}
UNREAD = SILENT | {"beat": None}


@pytest.mark.parametrize(
    ("ranks", "message", "hosts"),
    [
        (ranks_of(3), "all other ranks are alive and also at step 5: a collective, the network or a file system", []),
        (ranks_of(3, r1=SILENT), "no heartbeat for 9 s from: rank 1 on h1 (process 101), last at step 5", ["h1"]),
        (ranks_of(3, r1=UNREAD), "no heartbeat for 9 s from: rank 1 on h1, no heartbeat at all", ["h1"]),
        # One process of a host has died, but the host is up.
        (ranks_of(8, 2, r3=SILENT), "no heartbeat for 9 s from: rank 3 on h1 (process 103)", []),
        (ranks_of(8, 2, r2=SILENT, r3=SILENT), "rank 2 on h1 (process 102), last at step 5; rank 3 on h1", ["h1"]),
        # Most hosts are silent: this host may be at fault.
        (ranks_of(4, r1=SILENT, r2=SILENT), "no heartbeat for 9 s from: rank 1 on h1", []),
        (ranks_of(2, r1=SILENT), "no heartbeat for 9 s from: rank 1 on h1", []),
        (
            ranks_of(4, r1={"step": 4, "idle": 33.0}, r2={"step": 6}),
            "behind: rank 1 on h1 (process 101), at step 4 for 33 s; ahead: rank 2 on h2 (process 102), at step 6",
            [],
        ),
        (ranks_of(3, r2=OFFLINE), "no connection to the host of rank 0 from: rank 2 on h2 (process 102)", ["h2"]),
        (ranks_of(3, r1=OFFLINE, r2=OFFLINE), "no connection to the host of rank 0 from: rank 1 on h1", ["h0"]),
        (ranks_of(4, r1=OFFLINE, r2=OFFLINE), "no connection to the host of rank 0 from: rank 1 on h1", []),
        (ranks_of(2, r1=OFFLINE), "no connection to the host of rank 0 from: rank 1 on h1", []),
        (ranks_of(4, r1=SILENT, r2=OFFLINE), "no heartbeat for 9 s from: rank 1", ["h1"]),
        # The last network state of a silent rank is ignored.
        (ranks_of(4, r1=SILENT | OFFLINE), "no heartbeat for 9 s from: rank 1", ["h1"]),
        (ranks_of(40, **{f"r{rank}": SILENT for rank in range(1, 40)}), "and 23 more", []),
    ],
)  # fmt: skip
def test_the_ranks_and_hosts_at_fault(ranks: list[RankStatus], message: str, hosts: list[str]) -> None:
    assert message in describe_failure(ranks, 0, 5)
    assert failing_hosts(ranks) == hosts


@pytest.mark.parametrize("ranks", [2, 64, 1000])
def test_observers_are_few_and_on_as_many_hosts_as_possible(ranks: int) -> None:
    observers = [rank for rank in range(ranks) if is_observer(rank, ranks)]
    assert len(observers) == min(ranks, OBSERVERS)
    assert len({rank // 8 for rank in observers}) == min(-(-ranks // 8), OBSERVERS)


# -- reading heartbeats ------------------------------------------------------------------------------------------------


def regular_file(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


NO_HEARTBEAT: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "empty": regular_file(b""),
    "torn": regular_file(encoded(beat(ID))[:-20]),
    "too large": regular_file(encoded(beat(ID)) + b" " * MAX_BYTES),
    "a negative step": regular_file(encoded(beat(ID), step=-1)),
    "an unknown field": regular_file(encoded(beat(ID), more=1)),
    "an earlier start": regular_file(encoded(beat(EARLIER))),
    "a folder": Path.mkdir,
    "a fifo": os.mkfifo,
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", NO_HEARTBEAT)
def test_only_a_valid_regular_file_of_this_start_is_a_heartbeat(tmp_path: Path, kind: str) -> None:
    (tmp_path / "rank-0").write_bytes(encoded(beat(ID)))
    assert read_beat(tmp_path / "rank-0", ID) == beat(ID)
    NO_HEARTBEAT[kind](tmp_path / "rank-1")
    assert read_beat(tmp_path / "rank-1", ID) is None


# -- a rank's thread ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Publisher:
    """The heartbeat thread of rank 1 of several ranks."""

    folder: Path
    start: Start
    dumps: list[float]
    heartbeat: Heartbeat = dataclasses.field(init=False)
    error: Exception | None = None

    def dump(self) -> None:
        self.dumps.append(time.monotonic())
        if self.error is not None:
            raise self.error

    def request_stacks(self) -> None:
        (self.folder / "stacks").write_text(self.start.id)

    def write(self, rank: int, **changes: Any) -> None:
        """Publish a heartbeat in the name of another rank."""
        (self.folder / "new").write_bytes(encoded(beat(self.start.id, **changes)))
        (self.folder / "new").replace(self.folder / f"rank-{rank}")

    @property
    def beat(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.folder / "rank-1").read_bytes()))
        except OSError:
            return {"time": 0.0, "stacks": False}

    def wait_for_beats(self, count: int = 1) -> None:
        for _ in range(count):
            last = self.beat["time"]
            wait_until(lambda last=last: self.beat["time"] != last)  # type: ignore[misc]


@contextlib.contextmanager
def publishing(folder: Path, ranks: int, interval: float = 0.01) -> Iterator[Publisher]:
    start = Start(clear(folder), tuple(f"h{rank}" for rank in range(ranks)))
    publisher = Publisher(folder, start, [])
    world = World(1, ranks, 0, 1, torch.device("cpu"), host="h1")
    publisher.heartbeat = Heartbeat(
        folder, start, world, interval=interval, progress=lambda: (3, 1.26), dump=publisher.dump
    )
    try:
        yield publisher
    finally:
        publisher.heartbeat.close()


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[Publisher]:
    with publishing(tmp_path / "run" / "heartbeat", ranks=2) as publisher:
        yield publisher


def test_heartbeats_are_published_until_the_last_one_is_marked_as_such(publisher: Publisher) -> None:
    publisher.wait_for_beats(2)
    found = publisher.beat
    assert (found["step"], found["idle"], found["host"], found["pid"]) == (3, 1.3, "h1", os.getpid())
    assert not found["ended"]
    publisher.heartbeat.close()
    assert publisher.beat["ended"]
    assert {path.name for path in publisher.folder.iterdir()} == {"rank-1", "stacks"}
    assert (publisher.folder / "rank-1").stat().st_size < MAX_BYTES // 2


def watched(publisher: Publisher, while_watched: Callable[[], object] = lambda: None) -> list[RankStatus]:
    """Watch all ranks for two seconds while `while_watched` changes their files, and return their states."""
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(publisher.heartbeat.watch, 2.0)
        publisher.wait_for_beats(5)  # each rank is read at least once
        while_watched()
        return found.result()


def test_a_rank_is_alive_if_its_heartbeat_changes_while_it_is_watched(tmp_path: Path) -> None:
    with publishing(tmp_path / "heartbeat", ranks=7) as publisher:
        for rank in (0, 2, 3, 4, 6):
            publisher.write(rank)

        def change() -> None:
            publisher.write(2, time=0.5)  # back in time: any change counts
            publisher.write(3, ended=True)
            (publisher.folder / "rank-4").write_bytes(b"garbage")
            publisher.write(5)  # its first heartbeat
            publisher.write(6, time=2.0, reaches_rank0=False)

        statuses = watched(publisher, change)
        assert [status.rank for status in statuses if status.silent_seconds] == [0, 4]
        assert [(status.host, status.beat and status.beat.step) for status in statuses] == [
            ("h0", 5), ("h1", 3), ("h2", 5), ("h3", 5), ("h4", 5), ("h5", 5), ("h6", 5)
        ]  # fmt: skip
        assert [status.rank for status in statuses if status.disconnected] == [6]


def test_ranks_are_watched_until_all_have_written_their_stacks(tmp_path: Path) -> None:
    with publishing(tmp_path / "heartbeat", ranks=3) as publisher, ThreadPoolExecutor(1) as pool:
        publisher.heartbeat.request_stacks()
        publisher.write(0, ended=True)
        publisher.write(2, stacks=True)
        found = pool.submit(publisher.heartbeat.watch, 3600)
        publisher.wait_for_beats(5)
        assert not found.done()  # rank 2 has not shown that it is still alive
        publisher.write(2, stacks=True, time=2.0)
        assert [status.beat and status.beat.stacks for status in found.result(60)] == [False, True, True]


def test_a_rank_that_was_not_watched_long_enough_is_not_reported_as_silent(tmp_path: Path) -> None:
    with publishing(tmp_path / "heartbeat", ranks=2, interval=3600) as publisher:
        assert not any(status.silent_seconds for status in publisher.heartbeat.watch(0.0))


def test_stacks_are_written_once_for_a_request_of_this_start(publisher: Publisher) -> None:
    request = publisher.folder / "stacks"
    for content in (b"", b"\xff garbage", EARLIER.encode()):
        request.write_bytes(content)
        publisher.wait_for_beats(2)
    assert not publisher.dumps
    publisher.request_stacks()
    wait_until(lambda: publisher.beat["stacks"])
    publisher.request_stacks()
    publisher.wait_for_beats(2)
    assert len(publisher.dumps) == 1


def test_a_rank_that_cannot_write_its_stacks_keeps_publishing(publisher: Publisher) -> None:
    publisher.error = OSError(28, "No space left on device")
    publisher.request_stacks()
    wait_until(lambda: publisher.beat["stacks"])
    publisher.wait_for_beats()


def test_the_requesting_rank_does_not_answer_its_own_request(publisher: Publisher) -> None:
    publisher.heartbeat.request_stacks()
    wait_until(lambda: publisher.beat["stacks"])
    assert (publisher.folder / "stacks").read_text() == publisher.start.id
    assert not publisher.dumps


def test_heartbeats_resume_when_the_file_system_works_again(publisher: Publisher) -> None:
    publisher.wait_for_beats()
    publisher.folder.rename(publisher.folder.with_name("elsewhere"))
    wait_until(lambda: "No such file" in publisher.heartbeat.failure)
    publisher.folder.with_name("elsewhere").rename(publisher.folder)
    publisher.wait_for_beats()
    wait_until(lambda: not publisher.heartbeat.failure)


def test_a_start_removes_the_heartbeats_and_the_request_of_the_previous_start(tmp_path: Path) -> None:
    folder = tmp_path / "heartbeat"
    folder.mkdir()
    for name in ("rank-0", "rank-1023", ".rank-7.00c0ffee00c0ffee.tmp", "notes.txt"):
        (folder / name).write_text("old")
    (folder / "stacks").write_text(clear(folder))
    assert clear(folder) != clear(folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"notes.txt": "old", "stacks": ""}


# -- the network -------------------------------------------------------------------------------------------------------


def test_a_host_that_refuses_a_connection_is_reachable_unlike_one_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(network, "CONNECT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, contextlib.ExitStack() as connections:
        address = network.rank0_address("127.0.0.1", str(server.getsockname()[1]))
        assert address is not None
        assert network.is_reachable(address)
        for _ in range(4):  # fill the backlog of a server that accepts nothing: further connections get no answer
            connection = connections.enter_context(socket.socket())
            connection.setblocking(False)
            connection.connect_ex(server.getsockname())
        assert not network.is_reachable(address)
    assert network.is_reachable(address)  # nothing listens on the port any more


@pytest.mark.parametrize(
    ("host", "port"), [("", ""), ("localhost", ""), ("no.such.host.invalid", "1"), ("x" * 99, "1")]
)
def test_an_unset_or_unresolvable_address_is_none(host: str, port: str) -> None:
    assert network.rank0_address(host, port) is None


def test_the_project_opens_no_listening_port() -> None:
    """torch and NCCL do, see docs/security.md. The feed process uses a socket pair."""
    listening = re.compile(
        r"\.(listen|create_server|start_server)\(|\bsock\w*\.bind\(|\b\w*(TCP|UDP|HTTP|Manager)Server\("
    )
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for package in ("fat", "shards", "pipeline", "launch")
        for path in sorted((ROOT / package).rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if listening.search(line)
    ]
    assert found == []
