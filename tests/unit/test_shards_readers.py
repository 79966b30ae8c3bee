"""Other WebDataset readers read every sample's bytes and label once from the tars."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import xxhash

from shards.commands.command_line import SamplePhotos
from shards.commands.index_tars import index_tars
from shards.commands.verify import verify
from shards.convert.convert import convert
from shards.convert.options import Options
from shards.errors import UserError
from shards.format.dataset import ShardSet
from shards.images.rules import ImageRules
from shards.sources.scan import ScanOptions

Sample = tuple[int, int]
"""xxh3-64 of the encoded image, label."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardSet, list[Sample]]:
    """Return a set with several shards, and the sorted samples of its source."""
    root = tmp_path_factory.mktemp("readers")
    SamplePhotos(root / "photos", count=60).run()
    convert(root / "photos", root / "set", Options(shard_bytes=1_000_000, scan=ScanOptions(workers=1)))
    classes = sorted(path.name for path in (root / "photos" / "train").iterdir())
    expected = [
        (xxhash.xxh3_64_intdigest(path.read_bytes()), classes.index(path.parent.name))
        for path in (root / "photos" / "train").rglob("*.JPEG")
    ]
    return ShardSet(root / "set"), sorted(expected)


def tars(shard_set: ShardSet) -> list[Path]:
    return [shard_set.shard_path("train", i) for i in range(len(shard_set.split("train").shards))]


def sample(image: bytes, label: bytes | str | int) -> Sample:
    return xxhash.xxh3_64_intdigest(image), int(label)


def read_by_index(shard_set: ShardSet) -> list[Sample]:
    found = []
    for row in shard_set.index("train"):
        with shard_set.shard_path("train", row["shard"]).open("rb") as file:
            file.seek(int(row["offset"]))
            found.append(sample(file.read(int(row["size"])), row["label"]))
    return found


def read_by_tarfile(shard_set: ShardSet) -> list[Sample]:
    found = []
    for path in tars(shard_set):
        with tarfile.open(path) as tar:
            content = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        found += [sample(content[name], content[name[:-4] + ".cls"]) for name in content if name.endswith(".jpg")]
    return found


def read_by_webdataset(shard_set: ShardSet) -> list[Sample]:
    import webdataset

    dataset = webdataset.WebDataset([str(path) for path in tars(shard_set)], shardshuffle=False).to_tuple("jpg", "cls")
    return [sample(image, label) for image, label in dataset]


def read_by_dali(shard_set: ShardSet) -> list[Sample]:
    from nvidia.dali import fn, pipeline_def

    paths = tars(shard_set)

    @pipeline_def(batch_size=8, num_threads=1, device_id=None)
    def read():
        images, labels = fn.readers.webdataset(
            paths=[str(path) for path in paths],
            index_paths=[str(path.with_suffix(".idx")) for path in paths],
            ext=["jpg", "cls"],
            name="reader",
            missing_component_behavior="error",
        )
        return images, labels

    pipeline = read()
    pipeline.build()
    total = pipeline.epoch_size("reader")
    found: list[Sample] = []
    while len(found) < total:
        images, labels = pipeline.run()
        found += [sample(bytes(images.at(i)), bytes(labels.at(i))) for i in range(len(images))]
    return found[:total]


@pytest.mark.parametrize("read", [read_by_index, read_by_tarfile, read_by_webdataset, read_by_dali])
def test_every_reader_reads_every_sample_once(read, made: tuple[ShardSet, list[Sample]]) -> None:
    shard_set, expected = made
    assert sorted(read(shard_set)) == expected


@pytest.mark.parametrize("read", [read_by_tarfile, read_by_webdataset, read_by_dali])
def test_readers_use_the_order_of_the_index(read, made: tuple[ShardSet, list[Sample]]) -> None:
    shard_set, _ = made
    assert read(shard_set) == read_by_index(shard_set)


def test_gnu_tar_lists_and_extracts_the_tars(made: tuple[ShardSet, list[Sample]], tmp_path: Path) -> None:
    shard_set, expected = made
    for path in tars(shard_set):
        done = subprocess.run(["tar", "xvf", path, "-C", tmp_path], capture_output=True, text=True, check=True)
        assert done.stderr == "", "no warnings"
        assert not any(" " in line for line in done.stdout.splitlines()), "no spaces in names"
    images = list(tmp_path.rglob("*.jpg"))
    assert sorted(sample(path.read_bytes(), path.with_suffix(".cls").read_text()) for path in images) == expected


def test_the_dali_index_equals_that_of_dalis_tool(made: tuple[ShardSet, list[Sample]], tmp_path: Path) -> None:
    shard_set, _ = made
    for path in tars(shard_set):
        theirs = tmp_path / path.with_suffix(".idx").name
        subprocess.run([sys.executable, "-m", "wds2idx", path, theirs], check=True, capture_output=True)
        assert path.with_suffix(".idx").read_text() == theirs.read_text()


def test_existing_tars_are_indexed_in_place(made: tuple[ShardSet, list[Sample]], tmp_path: Path) -> None:
    shard_set, expected = made
    for path in shard_set.path.glob("*.tar"):
        shutil.copy(path, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    manifest = index_tars(sorted(tmp_path.glob("*.tar")), ImageRules(), workers=1)
    indexed = ShardSet(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "no tar was modified"
    assert sorted(read_by_index(indexed)) == expected
    assert np.array_equal(indexed.index("train"), shard_set.index("train")), "the index depends only on the tars"
    assert np.array_equal(indexed.index("val"), shard_set.index("val"))
    assert not manifest.shuffled
    assert 1 <= manifest.made["class_run"]["train"] < 1.5, "these tars are shuffled"
    assert verify(tmp_path, workers=1) == []
    with pytest.raises(UserError, match="is already a shard set"):
        index_tars(sorted(tmp_path.glob("*.tar")), ImageRules())


def test_indexing_reports_tars_that_are_sorted_by_class(made: tuple[ShardSet, list[Sample]], tmp_path: Path) -> None:
    shard_set, _ = made
    tarred: dict[str, bytes] = {}
    for path in tars(shard_set):
        with tarfile.open(path) as tar:
            tarred |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in sorted(tarred):
            (tmp_path / "member").write_bytes(tarred[name])
            tar.add(tmp_path / "member", name)
    manifest = index_tars([tmp_path / "a.tar"], ImageRules(), workers=1)
    classes = len(shard_set.manifest.classes)
    assert manifest.made["class_run"]["train"] == pytest.approx(shard_set.split("train").samples / classes, abs=0.01)


def test_damage_in_indexed_tars_is_reported(made: tuple[ShardSet, list[Sample]], tmp_path: Path) -> None:
    shard_set, _ = made
    shutil.copy(tars(shard_set)[0], tmp_path / "a.tar")
    index_tars([tmp_path / "a.tar"], ImageRules(), workers=1)
    row = ShardSet(tmp_path).index("train")[3]
    data = bytearray((tmp_path / "a.tar").read_bytes())
    for at, complaint in (
        (int(row["offset"]) + 9, f"offset {row['offset']}"),
        (len(data) - 1, "outside its images"),
    ):
        (tmp_path / "a.tar").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        (fault,) = verify(tmp_path, workers=1)
        assert "a.tar" in fault
        assert complaint in fault


def test_tars_in_several_folders_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 folders"):
        index_tars([tmp_path / "a" / "0.tar", tmp_path / "b" / "0.tar"], ImageRules())
    with pytest.raises(UserError, match=r"0\.tar: no such file"):
        index_tars([tmp_path / "0.tar"], ImageRules())
