"""Batches, faults and prefetching of the sample reader, with generated files (pipeline/storage/reader.py)."""

from __future__ import annotations

import io
import itertools
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from pipeline.plan import ShardRequest
from pipeline.stage_trace import WAIT_FOR_READ, Event, QueueLevel, Span, StageTrace
from pipeline.storage.buffer_pool import BufferPool
from pipeline.storage.files import Interrupted, LocalFiles
from pipeline.storage.placement import Storage
from pipeline.storage.reader import SampleReader
from shards.errors import ShardSetError, StorageFailed
from shards.format.index import INDEX_DTYPE
from tests.support.waiting import wait_until

SAMPLES, PER_SHARD = 40, 20


def content(sample: int) -> bytes:
    return bytes([sample]) * (100 + sample)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """Two files of 20 samples each; sample i has 100 + i bytes of value i."""
    index = np.zeros(SAMPLES, INDEX_DTYPE)
    for shard in range(SAMPLES // PER_SHARD):
        data = b""
        for sample in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
            index[sample]["shard"], index[sample]["offset"], index[sample]["label"] = shard, len(data), sample + 1000
            index[sample]["size"], index[sample]["hash"] = len(content(sample)), xxh3_64_intdigest(content(sample))
            data += content(sample)
        (tmp_path / f"{shard}.bin").write_bytes(data)
    return Storage(index, LocalFiles([tmp_path / "0.bin", tmp_path / "1.bin"]))


def damage(storage: Storage, *samples: int) -> None:
    for sample in samples:
        row = storage.index[sample]
        with open(storage.files.name(int(row["shard"])), "r+b") as file:
            file.seek(int(row["offset"]))
            file.write(b"\xff")


def ids(*samples: int) -> NDArray[np.int64]:
    return np.array(samples, np.int64)


def test_a_batch_has_the_bytes_and_the_index_entries_of_its_samples(storage: Storage) -> None:
    order = [39, 3, 3, 0, 21, *range(10, 30)]
    with SampleReader(storage) as reader:
        for _ in range(2):  # the second time from the page cache
            batch = reader.read(ids(*order))
            assert batch.checked() is batch
            assert batch.ids.tolist() == order
            assert [image.tobytes() for image in batch.images] == [content(sample) for sample in order]
            assert batch.rows["label"].tolist() == [sample + 1000 for sample in order]
            assert (batch.raw.tolist(), batch.faults) == ([False] * 25, [])
        empty = reader.read(ids())
        assert (len(empty.ids), empty.images, empty.faults) == (0, [], [])


def test_samples_in_the_page_cache_are_read_once(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    read, later = storage.files.read, []

    def read_later(file: int, target: NDArray[np.uint8], offset: int) -> None:
        later.append((file, offset))
        read(file, target, offset)

    def read_if_cached(file: int, target: NDArray[np.uint8], offset: int) -> bool:
        read(file, target, offset)
        return offset > 0

    monkeypatch.setattr(storage.files, "read", read_later)
    monkeypatch.setattr(storage.files, "read_if_cached", read_if_cached)
    damage(storage, 25)
    with SampleReader(storage) as reader:
        batch = reader.read(ids(25, 0, 39))
    assert [fault.id for fault in batch.faults] == [25]
    assert [image.tobytes() for image in batch.images[1:]] == [content(0), content(39)]
    locations = [(int(row["shard"]), int(row["offset"])) for row in storage.index[[25, 0, 39]]]
    assert [location in later for location in locations] == [True, True, False], "damaged, not cached, cached"


def test_bad_samples_are_listed_as_faults_and_the_others_are_read(storage: Storage) -> None:
    bad = [*range(12), 25]
    damage(storage, *bad)
    order = [30, *bad, 31, 32, 33, 34, 35]
    with SampleReader(storage, threads=3) as reader:
        for _ in range(2):
            batch = reader.read(ids(*order))
            assert sorted((fault.row, fault.id) for fault in batch.faults) == [
                (row, sample) for row, sample in enumerate(order) if sample in bad
            ]
            good = {row: sample for row, sample in enumerate(order) if sample not in bad}
            assert {row: batch.images[row].tobytes() for row in good} == {r: content(s) for r, s in good.items()}


def test_the_error_names_file_offset_and_sample_of_the_first_bad_row(storage: Storage) -> None:
    damage(storage, 25, 2)
    with SampleReader(storage) as reader, pytest.raises(ShardSetError) as error:
        reader.read(ids(7, 25, 2)).checked()
    assert str(error.value) == (
        f"{storage.files.name(1)}: the 125 bytes at offset 610 are damaged: their hash differs from the index; "
        "run 'pipeline verify' on the set (sample 25)"
    )


def test_the_error_names_the_key_of_a_bad_sample_in_a_tar(tmp_path: Path) -> None:
    member = tarfile.TarInfo("n01/image.7.jpg")
    member.size = 5
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.addfile(member, io.BytesIO(b"bytes"))
    index = np.zeros(1, INDEX_DTYPE)
    index["offset"], index["size"] = 512, 5
    with SampleReader(Storage(index, LocalFiles([tmp_path / "shard.tar"]))) as reader:
        assert str(reader.read(ids(0)).faults[0].error).endswith("(sample 0, key n01/image)")


@pytest.mark.parametrize(("damaged", "faults"), [(1, 0), (2, 1)])
def test_a_sample_with_a_wrong_hash_is_read_a_second_time(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, damaged: int, faults: int
) -> None:
    """Its bytes may have been damaged in transfer only."""
    offsets, read = [], storage.files.read

    def damage_the_first(file: int, target: NDArray[np.uint8], offset: int) -> None:
        read(file, target, offset)
        offsets.append(offset)
        if len(offsets) <= damaged:
            target[0] ^= 1

    monkeypatch.setattr(storage.files, "read", damage_the_first)
    with SampleReader(storage) as reader:
        batch = reader.read(ids(4))
    assert len(batch.faults) == faults
    assert offsets[:2] == [406, 406]
    assert faults or batch.images[0].tobytes() == content(4)


def test_hashes_are_not_verified_if_check_is_false(storage: Storage) -> None:
    damage(storage, 5)
    with SampleReader(storage, check=False) as reader:
        assert reader.read(ids(4, 5)).checked().images[1].tobytes() == b"\xff" + content(5)[1:]


def test_a_missing_file_is_a_fault_of_its_samples(storage: Storage) -> None:
    Path(storage.files.name(1)).unlink()
    with SampleReader(storage) as reader:
        batch = reader.read(ids(30, 1, 20))
    assert sorted((fault.row, fault.id) for fault in batch.faults) == [(0, 30), (2, 20)]
    assert str(batch.faults[0].error).startswith(f"{storage.files.name(1)}: missing; copy the file again")


def test_a_storage_failure_is_raised_and_names_the_sample(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise StorageFailed("stale file handle")

    monkeypatch.setattr(storage.files, "read", failing)
    with SampleReader(storage) as reader, pytest.raises(StorageFailed, match=r"^stale file handle \(sample 33\)$"):
        reader.read(ids(33))


@pytest.mark.parametrize(("ahead", "taken"), [(0, [1, 2, 3, 4, 5, 5]), (2, [3, 4, 5, 5, 5, 5]), (9, [5] * 6)])
def test_batches_are_read_ahead_and_yielded_in_order(storage: Storage, ahead: int, taken: list[int]) -> None:
    begun = []

    def batches() -> Iterator[tuple[NDArray[np.int64], str]]:
        for number in range(5):
            begun.append(number)
            yield ids(number, 30 + number), f"batch {number}"

    found = []
    with SampleReader(storage) as reader:
        for number, (batch, extra) in enumerate(reader.read_ahead(batches(), ahead)):
            assert (batch.ids.tolist(), extra) == ([number, 30 + number], f"batch {number}")
            assert batch.checked().images[1].tobytes() == content(30 + number)
            found.append(len(begun))
    assert [*found, len(begun)] == taken


def test_batches_are_read_by_the_given_number_of_threads(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four batches of one task each, two threads of each kind: every read waits for a read of the other thread."""
    read, attempts, names = storage.files.read, itertools.count(1), set()
    all_taken, all_started = threading.Event(), threading.Event()
    starts, reads = threading.Barrier(2, timeout=30), threading.Barrier(2, timeout=30)

    def batches() -> Iterator[tuple[NDArray[np.int64], None]]:
        for number in range(4):
            if number == 3:
                all_taken.set()
            yield ids(*range(8 * number, 8 * number + 8)), None

    def read_if_cached(_file: int, _target: NDArray[np.uint8], offset: int) -> bool:
        names.add(threading.current_thread().name)
        all_taken.wait(30)
        starts.wait()
        if next(attempts) == 32:
            all_started.set()
        return False

    def read_later(file: int, target: NDArray[np.uint8], offset: int) -> None:
        names.add(threading.current_thread().name)
        all_started.wait(30)
        reads.wait()
        read(file, target, offset)

    monkeypatch.setattr(storage.files, "read_if_cached", read_if_cached)
    monkeypatch.setattr(storage.files, "read", read_later)
    with SampleReader(storage, threads=2) as reader:
        assert [len(batch.checked().ids) for batch, _ in reader.read_ahead(batches(), 3)] == [8] * 4
    assert names == {"batch-reader_0", "batch-reader_1", "shard-reader_0", "shard-reader_1"}


def test_images_are_read_into_buffers_of_the_given_pool(storage: Storage) -> None:
    class Recorded(BufferPool):
        def bytes(self, size: int) -> NDArray[np.uint8]:
            made.append(super().bytes(size))
            return made[-1]

    made: list[NDArray[np.uint8]] = []
    with SampleReader(storage, buffers=Recorded()) as reader:
        images = reader.read(ids(3, 30)).checked().images
    assert [buffer.tobytes() for buffer in made] == [content(3) + content(30)]
    assert all(np.shares_memory(image, made[0]) for image in images)


def test_an_interrupted_reader_raises_and_a_closed_one_has_no_threads(storage: Storage) -> None:
    reader = SampleReader(storage)
    reader.read(ids(0))
    reader.interrupt()
    with pytest.raises(Interrupted):
        reader.read(ids(25))
    reader.close()
    assert storage.files.open_count == 0  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="after shutdown"):
        next(reader.read_ahead([(ids(0), None)], 0))


def test_requests_and_progress_are_passed_to_the_files(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(storage.files, "prefetch", calls.append)
    monkeypatch.setattr(storage.files, "advance", calls.append)
    requests = iter([ShardRequest(0, 3, [1])])
    with SampleReader(storage) as reader:
        reader.prefetch(requests)
        reader.advance(3)
    assert calls == [requests, 3]


def test_file_of_returns_the_file_of_a_shard(storage: Storage, tmp_path: Path) -> None:
    with SampleReader(storage) as reader:
        assert (reader.file_of(0), reader.file_of(1)) == (str(tmp_path / "0.bin"), str(tmp_path / "1.bin"))
        assert reader.random_access()
    one = Storage(storage.index[:PER_SHARD], LocalFiles([tmp_path / "0.bin"]), one_file=True)
    with SampleReader(one) as reader:
        assert reader.file_of(7) == str(tmp_path / "0.bin")


def test_reads_and_waits_are_recorded_with_the_number_of_their_batch(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch 0 is in the page cache, batches 1 and 2 are read by one and by two tasks."""
    batches = [ids(*range(8)), ids(*range(8, 16)), ids(*range(20, 32))]
    cached = {(0, int(storage.index[sample]["offset"])) for sample in range(8)}
    read, second_file = storage.files.read, threading.Event()

    def read_if_cached(file: int, target: NDArray[np.uint8], offset: int) -> bool:
        if (file, offset) in cached:
            read(file, target, offset)
        return (file, offset) in cached

    def read_later(file: int, target: NDArray[np.uint8], offset: int) -> None:
        if file == 1:
            second_file.wait(30)
        read(file, target, offset)

    monkeypatch.setattr(storage.files, "read_if_cached", read_if_cached)
    monkeypatch.setattr(storage.files, "read", read_later)
    trace, events = StageTrace(), list[Event]()

    def levels() -> list[int]:
        events.extend(trace.drain())
        return [event.batches for event in events if isinstance(event, QueueLevel)]

    trace.start()
    with SampleReader(storage, trace=trace) as reader:
        stream = reader.read_ahead([(batch, None) for batch in batches], 2)
        next(stream)
        wait_until(lambda: len(levels()) == 6, "batch 1 is read, batch 2 is started, batch 0 is taken")
        assert reader._count_read() == 1
        second_file.set()
        wait_until(lambda: reader._count_read() == 2 and len(levels()) > 6, "batches 1 and 2 are read")
        taken = len(levels())
        assert len(list(stream)) == 2
        assert 1 in levels()[taken:]
        assert levels()[-1] == 0
    assert {event.queue for event in events if isinstance(event, QueueLevel)} == {"read"}
    spans = Counter(
        (event.stage, event.batch, event.thread.rpartition("_")[0]) for event in events if isinstance(event, Span)
    )
    assert spans == {
        **{("read", batch, "batch-reader"): 1 for batch in range(3)},
        ("read", 1, "shard-reader"): 1,
        ("read", 2, "shard-reader"): 2,
        **{(WAIT_FOR_READ, batch, ""): 1 for batch in range(3)},
    }
