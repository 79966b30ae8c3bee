"""What ranks publish in RUN/heartbeat, and how others read and judge it. tests/dist has it with several processes."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.machine import network
from launch.resilience.heartbeat import (
    BEATS_PER_SECOND,
    MAX_BYTES,
    OBSERVERS,
    WATCHED_INTERVALS,
    Beat,
    Heartbeat,
    Member,
    Observation,
    RankStatus,
    Request,
    Start,
    beat_interval,
    describe_failure,
    failing_hosts,
    is_observer,
    prepare,
    replace_file,
)
from tests.dist.launching import ROOT

ID, EARLIER = "0123456789abcdef", "fedcba9876543210"


def beat(count: int = 1, **changes: Any) -> Beat:
    fields: dict[str, Any] = {
        "start": ID, "count": count, "step": 5, "idle": 1.0, "host": "h1", "pid": 7, "stacks": False,
        "reaches_rank0": None, "ended": False,
    }  # fmt: skip
    return Beat(**fields | changes)


def encoded(content: Beat, **changes: Any) -> bytes:
    return json.dumps(dataclasses.asdict(content) | changes).encode()


def start_of(ranks: int, per_host: int = 1) -> Start:
    return Start(ID, tuple(Member(rank, f"h{rank // per_host}", 100 + rank) for rank in range(ranks)))


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not come true"
        time.sleep(0.01)


# -- what is read ------------------------------------------------------------------------------------------------------


def regular(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def sparse(path: Path) -> None:
    path.write_bytes(encoded(beat(2)))
    os.truncate(path, 1 << 40)


def link_to_valid(path: Path) -> None:
    path.with_name("elsewhere").write_bytes(encoded(beat(2)))
    path.symlink_to("elsewhere")


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(path))


NO_HEARTBEAT: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "empty": regular(b""),
    "garbage": regular(b"\xff\xfe\x00garbage\n"),
    "not ASCII": regular("é standing\n".encode()),
    "torn": regular(encoded(beat(2))[:-20]),
    "two writers": regular(encoded(beat(2)) * 2),
    "another document": regular(b"[1, 2, 3]"),
    "deeply nested": regular(b"[" * MAX_BYTES),
    "too large": regular(encoded(beat(2)) + b" " * MAX_BYTES),
    "a terabyte": sparse,
    "a count that is text": regular(encoded(beat(), count="2")),
    "a count that is too large": regular(encoded(beat(), count=10**30)),
    "a negative step": regular(encoded(beat(2), step=-1)),
    "a time that is no number": regular(encoded(beat(2), idle=float("nan"))),
    "an infinite time": regular(encoded(beat(2), idle=float("inf"))),
    "an unknown field": regular(encoded(beat(2), more=1)),
    "an earlier start": regular(encoded(beat(2, start=EARLIER))),
    "a directory": Path.mkdir,
    "a fifo": os.mkfifo,
    "a socket": unix_socket,
    "a symlink": link_to_valid,
    "a symlink to a device": lambda path: path.symlink_to("/dev/zero"),
    "a loop of symlinks": lambda path: path.symlink_to(path),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", NO_HEARTBEAT)
def test_anything_but_a_valid_regular_file_is_no_heartbeat(tmp_path: Path, kind: str) -> None:
    replace_file(tmp_path / "rank-0", beat())
    NO_HEARTBEAT[kind](tmp_path / "rank-1")
    observation = Observation(tmp_path, start_of(2), interval=0)
    observation.look()
    replace_file(tmp_path / "rank-0", beat(2))
    observation.look()
    own, other = observation.ranks()
    assert own.alive
    assert (other.silent, other.beat) == (True, None)


def test_a_rank_is_alive_if_its_count_changes_while_it_is_watched(tmp_path: Path) -> None:
    observation = Observation(tmp_path, start_of(6), interval=0)
    for rank in range(5):
        replace_file(tmp_path / f"rank-{rank}", beat(10))
    observation.look()
    replace_file(tmp_path / "rank-1", beat(11))
    replace_file(tmp_path / "rank-2", beat(3))  # also back: what counts is the change
    replace_file(tmp_path / "rank-3", beat(10, ended=True))
    (tmp_path / "rank-4").unlink()
    replace_file(tmp_path / "rank-5", beat(1))  # came late
    observation.look()
    assert [status.alive for status in observation.ranks()] == [False, True, True, False, False, True]
    assert [status.silent for status in observation.ranks()] == [True, False, False, False, True, False]
    assert observation.pending() == [0, 1, 2, 4, 5]
    replace_file(tmp_path / "rank-1", beat(12, stacks=True))
    (tmp_path / "rank-2").write_text("garbage")  # later damage does not make a living rank silent
    observation.look()
    assert observation.pending() == [0, 2, 4, 5]
    assert not observation.ranks()[2].silent


def test_a_rank_that_was_not_watched_for_long_enough_is_not_called_silent(tmp_path: Path) -> None:
    """After a first look that a slow file system delayed, say."""
    observation = Observation(tmp_path, start_of(2), interval=3600)
    replace_file(tmp_path / "rank-0", beat())
    assert not any(status.silent for status in observation.ranks())
    observation.look()
    observation.look()
    assert not any(status.silent for status in observation.ranks())
    assert observation.pending() == [0, 1]


# -- what is said ------------------------------------------------------------------------------------------------------


def ranks_of(count: int, per_host: int = 1, **by_rank: dict[str, Any]) -> list[RankStatus]:
    """Ranks that are alive at step 5, but for those given as r1={...}; `beat` holds changes of the heartbeat."""
    found = []
    for member in start_of(count, per_host).members:
        changes = by_rank.get(f"r{member.rank}", {})
        last = None if changes.get("unread") else beat(**changes.get("beat", {}))
        found.append(RankStatus(member, last, changes.get("alive", not changes.get("unread"))))
    return found


SILENT, UNREAD, CUT_OFF = {"alive": False}, {"unread": True}, {"beat": {"reaches_rank0": False}}


@pytest.mark.parametrize(
    ("ranks", "said", "nodes"),
    [
        (ranks_of(3), "all other ranks are alive and at step 5 too: a collective, the network or a file system", []),
        (ranks_of(3, r1=SILENT), "no heartbeat for 9 s from: rank 1 on h1 (process 101), last at step 5", ["h1"]),
        (ranks_of(3, r1=UNREAD), "no heartbeat for 9 s from: rank 1 on h1 (process 101), no heartbeat at all", ["h1"]),
        # A process is gone, its host is there.
        (ranks_of(8, 2, r3=SILENT), "no heartbeat for 9 s from: rank 3 on h1 (process 103)", []),
        (ranks_of(8, 2, r2=SILENT, r3=SILENT), "rank 2 on h1 (process 102), last at step 5; rank 3 on h1", ["h1"]),
        # Most hosts are gone: the fault may be on this side.
        (ranks_of(4, r1=SILENT, r2=SILENT), "no heartbeat for 9 s from: rank 1 on h1", []),
        (ranks_of(2, r1=SILENT), "no heartbeat for 9 s from: rank 1 on h1", []),
        # It has said that it ends: whoever looks later must not take it for dead.
        (ranks_of(3, r1={"alive": False, "beat": {"ended": True}}), "all other ranks are alive", []),
        (
            ranks_of(4, r1={"beat": {"step": 4, "idle": 33.0}}, r2={"beat": {"step": 6}}),
            "behind: rank 1 on h1 (process 101), at step 4 for 33 s; ahead: rank 2 on h2 (process 102), at step 6",
            [],
        ),
        (ranks_of(3, r2=CUT_OFF), "no connection to the host of rank 0 from: rank 2 on h2 (process 102)", ["h2"]),
        (ranks_of(3, r1=CUT_OFF, r2=CUT_OFF), "no connection to the host of rank 0 from: rank 1 on h1", ["h0"]),
        (ranks_of(4, r1=CUT_OFF, r2=CUT_OFF), "no connection to the host of rank 0 from: rank 1 on h1", []),
        (ranks_of(2, r1=CUT_OFF), "no connection to the host of rank 0 from: rank 1 on h1", []),
        (ranks_of(4, r1=SILENT, r2=CUT_OFF), "no heartbeat for 9 s from: rank 1", ["h1"]),
        (ranks_of(40, **{f"r{rank}": SILENT for rank in range(1, 40)}), "and 23 more", []),
    ],
)  # fmt: skip
def test_which_ranks_and_hosts_are_at_fault(ranks: list[RankStatus], said: str, nodes: list[str]) -> None:
    assert said in describe_failure(ranks, 0, 5, 9.0)
    assert failing_hosts(ranks) == nodes


# -- what is published -------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Publisher:
    """A rank's heartbeat, a hundred times a second, and what was asked of it."""

    heartbeat: Heartbeat
    path: Path
    dumps: list[float]
    error: Exception | None = None

    def dump(self) -> None:
        self.dumps.append(time.monotonic())
        if self.error is not None:
            raise self.error

    @property
    def beat(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.path.read_bytes()))
        except OSError:
            return {"count": 0, "stacks": False}

    def goes_on(self) -> None:
        """Wait for another heartbeat."""
        count = self.beat["count"]
        until(lambda: self.beat["count"] > count)


@pytest.fixture
def publisher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Publisher]:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    folder = tmp_path / "heartbeat"
    prepare(folder, ID)
    made = Publisher(None, folder / "rank-1", [])  # type: ignore[arg-type]
    made.heartbeat = Heartbeat(folder, start_of(2), 1, interval=0.01, progress=lambda: (3, 1.26), dump=made.dump)
    yield made
    made.heartbeat.close()


def test_a_heartbeat_is_published_again_and_again_and_the_last_one_says_so(publisher: Publisher) -> None:
    publisher.goes_on()
    found = publisher.beat
    assert (found["step"], found["idle"], found["host"], found["pid"]) == (3, 1.3, "h1", 101)
    assert not found["ended"]
    publisher.heartbeat.close()
    assert publisher.beat["ended"]
    assert {path.name for path in publisher.path.parent.iterdir()} == {"rank-1", "stacks"}
    assert publisher.path.stat().st_size < MAX_BYTES // 2


def test_stacks_are_written_once_for_a_request_of_this_start(publisher: Publisher) -> None:
    request = publisher.path.with_name("stacks")
    publisher.goes_on()
    assert not publisher.dumps  # a request of nobody
    for content in (b"", b"\xff garbage", b"[" * 100_000, b'{"start": "x", "rank": 0}', b'{"rank": 0}'):
        request.write_bytes(content)
        publisher.goes_on()
    assert not publisher.dumps
    replace_file(request, Request(ID, 0))
    until(lambda: publisher.beat["stacks"])
    replace_file(request, Request(ID, 5))
    publisher.goes_on()
    publisher.goes_on()
    assert len(publisher.dumps) == 1


def test_stacks_that_cannot_be_written_do_not_silence_a_rank(publisher: Publisher) -> None:
    publisher.error = OSError(28, "No space left on device")
    replace_file(publisher.path.with_name("stacks"), Request(ID, 0))
    until(lambda: publisher.beat["stacks"])
    publisher.goes_on()


def test_a_rank_that_asks_writes_its_own_stacks_itself(publisher: Publisher) -> None:
    publisher.heartbeat.ask_for_stacks()
    until(lambda: publisher.beat["stacks"])
    assert json.loads(publisher.path.with_name("stacks").read_bytes()) == {"start": ID, "rank": 1}
    assert not publisher.dumps


def exchange(path: Path, make: Callable[[Path], object]) -> None:
    """Put something in the place of a path that the thread may make again meanwhile."""
    moved = (path.with_name(f"moved-{number}") for number in itertools.count())

    def succeeds() -> bool:
        with contextlib.suppress(FileNotFoundError):
            path.rename(next(aside for aside in moved if not aside.exists()))
        try:
            make(path)
        except FileExistsError:
            return False
        return True

    until(succeeds)


def test_whatever_happens_to_the_folder_heartbeats_go_on(publisher: Publisher) -> None:
    path, folder = publisher.path, publisher.path.parent
    publisher.goes_on()
    folder.rename(folder.with_name("elsewhere"))
    until(path.exists)  # made again
    publisher.goes_on()
    exchange(path, Path.mkdir)
    until(lambda: publisher.heartbeat.failure)
    path.rmdir()
    publisher.goes_on()
    exchange(path, lambda path: path.symlink_to("/dev/full"))
    until(lambda: path.is_file() and not path.is_symlink())  # replaced, not followed
    publisher.goes_on()
    exchange(folder, lambda path: path.open("x").close())
    until(lambda: publisher.heartbeat.failure)
    folder.unlink()
    until(path.exists)
    publisher.goes_on()
    until(lambda: not publisher.heartbeat.failure)


def test_any_exception_leaves_the_thread_alive(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> tuple[int, float]:
        raise MemoryError

    publisher.goes_on()
    working = publisher.heartbeat._progress
    monkeypatch.setattr(publisher.heartbeat, "_progress", broken)
    until(lambda: publisher.heartbeat.failure == "MemoryError")
    monkeypatch.setattr(publisher.heartbeat, "_progress", working)
    publisher.goes_on()


def test_what_still_runs_of_an_earlier_start_stops_writing_when_a_later_one_begins(publisher: Publisher) -> None:
    publisher.goes_on()
    prepare(publisher.path.parent, EARLIER)
    until(lambda: "a later start of this run" in publisher.heartbeat.failure)
    publisher.path.unlink(missing_ok=True)
    publisher.heartbeat.close()
    assert not publisher.path.exists()


def test_a_start_removes_what_an_earlier_one_left_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "heartbeat"
    folder.mkdir()
    outside = tmp_path / "outside"
    outside.write_text("mine")
    old = ("rank-0", "rank-1023", ".rank-7.00c0ffee00c0ffee.tmp", ".stacks.00c0ffee00c0ffee.tmp")
    foreign = ("rank-x", "rank-1.txt", "notes.txt", ".rank-7.tmp")
    for name in (*old, *foreign):
        (folder / name).write_text("old")
    (folder / "rank-2").symlink_to(outside)
    (folder / "rank-3").mkdir()
    (folder / "stacks").symlink_to(outside)
    prepare(folder, ID)
    assert {path.name for path in folder.iterdir()} == {*foreign, "rank-3", "stacks"}
    assert outside.read_text() == "mine"
    assert json.loads((folder / "stacks").read_text()) == {"start": ID, "rank": None}


def test_many_ranks_do_not_crowd_shared_storage() -> None:
    for ranks in (2, 64, 1000, 10_000):
        for timeout in (6.0, 300.0, 3600.0):
            interval = beat_interval(timeout, ranks)
            assert WATCHED_INTERVALS * interval <= timeout / 4
        assert ranks / beat_interval(3600.0, ranks) <= BEATS_PER_SECOND
        observers = [rank for rank in range(ranks) if is_observer(rank, ranks)]
        assert len(observers) == min(ranks, OBSERVERS)
        assert len({rank // 8 for rank in observers}) == min(-(-ranks // 8), OBSERVERS)  # on as many hosts as possible
    assert beat_interval(300.0, 8) == 5.0


# -- the network -------------------------------------------------------------------------------------------------------


def test_a_host_that_refuses_a_connection_is_reachable_and_one_that_does_not_answer_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(network, "CONNECT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, contextlib.ExitStack() as connections:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        address = network.rank0_address()
        assert address is not None
        assert network.is_reachable(address)
        for _ in range(4):  # fill the queue of a server that accepts nothing: the next ones get no answer
            connection = connections.enter_context(socket.socket())
            connection.setblocking(False)
            connection.connect_ex(server.getsockname())
        assert not network.is_reachable(address)
    assert network.is_reachable(address)  # nobody listens there any more


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"MASTER_ADDR": "localhost"},
        {"MASTER_ADDR": "no.such.host.invalid", "MASTER_PORT": "1"},
        {"MASTER_ADDR": "x" * 99, "MASTER_PORT": "1"},
    ],
)
def test_without_a_known_address_nothing_is_tried(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert network.rank0_address() is None


def test_no_code_of_ours_listens_on_a_port() -> None:
    """torch and NCCL do, which docs/security.md has a section on; pipeline/feed_process.py uses a socket pair."""
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
