"""States of the shards of a remote set: which are staged, and how long each has a file descriptor."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pipeline.plan import ShardRequest
from pipeline.storage.cache.partial_file import Busy
from pipeline.storage.remote import shard_table
from pipeline.storage.remote.shard_table import ShardState, ShardTable
from pipeline.storage.remote.staging import StagedFile, whole_file

FILES: list[StagedFile] = [whole_file(f"{number}.tar", 10 * (number + 1), "0" * 16) for number in range(6)]
MAX_BYTES = 80
SHARDS = st.integers(0, len(FILES) - 1)


def lease() -> int:
    return os.open(os.devnull, os.O_RDONLY)


def is_open(handle: int) -> bool:
    try:
        os.fstat(handle)
    except OSError:
        return False
    return True


def table_of(*requests: list[int]) -> ShardTable:
    """Return a table that has accepted one request per step, each for the given shards."""
    table = ShardTable(FILES, max_bytes=MAX_BYTES)
    table.prefetch(ShardRequest(step, step, shards) for step, shards in enumerate(requests))
    for _ in table.look_ahead():
        pass
    return table


def test_shards_are_staged_in_the_order_in_which_they_are_read() -> None:
    table = table_of([2], [0, 2], [1])
    assert [table.next_to_stage(0.0) for _ in range(4)] == [2, 0, 1, None]
    assert table[2].state is ShardState.DOWNLOADING
    assert not table.begin(2), "only one thread stages a shard"


def test_staging_of_a_shard_is_retried_later_if_it_fails() -> None:
    table = table_of([0])
    assert table.next_to_stage(0.0) == 0
    table.end(0, Busy(Path("0.tar"), 0), retry_at=5.0)
    assert table[0].state is ShardState.REMOTE
    assert table.next_to_stage(4.9) is None
    assert table.next_to_stage(5.0) == 0


def test_a_shard_is_local_until_its_last_request_is_done() -> None:
    table = table_of([0], [0])
    table.begin(0)
    table.end(0, handle := lease())
    table.drop_before(1)
    assert table.lease(0) == handle, "requested by step 1"
    table.drop_before(2)
    assert table[0].state is ShardState.REMOTE
    assert not is_open(handle)


def test_a_shard_is_local_until_its_last_reader_is_done() -> None:
    table = table_of([0])
    table.begin(0)
    table.end(0, handle := lease())
    table[0].readers += 1
    table.drop_before(1)
    assert table.lease(0) == handle
    table[0].readers -= 1
    table.release(0)
    assert table[0].state is ShardState.REMOTE
    assert not is_open(handle)


def test_a_shard_that_is_no_longer_requested_is_released_when_it_is_staged() -> None:
    table = table_of([0])
    table.begin(0)
    table.drop_before(1)
    table.end(0, handle := lease())
    assert table[0].state is ShardState.REMOTE
    assert not is_open(handle)


def test_a_request_larger_than_the_limit_is_accepted_alone() -> None:
    table = table_of([3, 4, 5], [0])
    assert [table.next_to_stage(0.0) for _ in range(4)] == [3, 4, 5, None]
    table.drop_before(1)
    assert [None for _ in table.look_ahead()] == [None]
    assert table.next_to_stage(0.0) == 0


def test_further_requests_are_accepted_when_others_are_dropped() -> None:
    table = table_of([0], [3], [2], [1])  # 10 + 40 + 30 bytes fit, 20 more do not
    assert [table[file].requests for file in range(4)] == [1, 0, 1, 1], "all but the last"
    table.drop_before(1)
    assert len(list(table.look_ahead())) == 1
    assert not table[1].requests
    table.drop_before(2)
    assert len(list(table.look_ahead())) == 1
    assert table[1].requests


def test_no_more_shards_are_requested_than_may_be_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_table, "MAX_LOCAL", 2)
    table = table_of([0], [1], [2])
    assert [table.next_to_stage(0.0) for _ in range(3)] == [0, 1, None]


class Table(RuleBasedStateMachine):
    """Calls of readers and staging threads in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.table = ShardTable(FILES, max_bytes=MAX_BYTES)
        self.made: set[int] = set()
        self.readers: list[int] = []
        self.step = 0

    @rule(requests=st.lists(st.lists(SHARDS, min_size=1, max_size=3, unique=True), max_size=8))
    def prefetch(self, requests: list[list[int]]) -> None:
        self.table.prefetch(ShardRequest(self.step + i, self.step + i, shards) for i, shards in enumerate(requests))

    @rule()
    def look_ahead(self) -> None:
        for _ in self.table.look_ahead():
            pass

    @rule(steps=st.integers(0, 3))
    def advance(self, steps: int) -> None:
        self.step += steps
        self.table.drop_before(self.step)

    @rule(file=SHARDS)
    def begin(self, file: int) -> None:
        if self.table.begin(file):
            assert self.table.lease(file) is None

    @rule(file=SHARDS, succeeds=st.booleans())
    def end(self, file: int, succeeds: bool) -> None:
        if self.table[file].state is ShardState.DOWNLOADING:
            handle = lease() if succeeds else None
            if handle is not None:
                self.made.add(handle)
            self.table.end(file, handle)

    @rule(file=SHARDS)
    def read(self, file: int) -> None:
        self.table[file].readers += 1
        self.readers.append(file)

    @rule()
    def finish_reading(self) -> None:
        if self.readers:
            file = self.readers.pop()
            self.table[file].readers -= 1
            self.table.release(file)

    @invariant()
    def a_descriptor_is_open_exactly_while_its_shard_is_local(self) -> None:
        local = {handle for file in range(len(FILES)) if (handle := self.table.lease(file)) is not None}
        assert {handle for handle in self.made if is_open(handle)} == local
        self.made &= local

    @invariant()
    def a_local_shard_is_requested_or_read(self) -> None:
        for file in range(len(FILES)):
            shard = self.table[file]
            assert shard.state is not ShardState.LOCAL or shard.requests or shard.readers

    def teardown(self) -> None:
        while self.readers:
            self.finish_reading()
        self.table.drop_before(float("inf"))
        self.a_descriptor_is_open_exactly_while_its_shard_is_local()
        assert not self.made, "all descriptors are closed"


TestAnyOrder = Table.TestCase
TestAnyOrder.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
