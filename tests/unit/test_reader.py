"""Reading samples: right bytes, few file descriptors, errors that name files, same replacements on all ranks."""

from __future__ import annotations

import io
import logging
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.augment.recipe import augment_recipe
from pipeline.batch_shape import BatchShape
from pipeline.loader import Batch, EvalLoader, LoaderOptions, TrainLoader
from pipeline.plan import NO_SAMPLE, EvalPlan, TrainPlan
from pipeline.storage.bad_samples import BadSamples
from pipeline.storage.files import LocalFiles
from pipeline.storage.placement import open_storage, tar_key
from pipeline.storage.quick_check import quick_check
from pipeline.storage.reader import SampleReader
from shards.errors import ShardSetError, UserError
from shards.format.dataset import ShardSet
from tests.support.damage import flip_a_bit, shard_of

CPU = torch.device("cpu")
GLOBAL = 12
RECIPE = augment_recipe("light", size=32)


@pytest.fixture
def copied(photos: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(photos, tmp_path / "set"))


def truncate(path: Path) -> str:
    shard = ShardSet(path).shard_path("train", 1)
    os.truncate(shard, shard.stat().st_size - 4096)
    return f"{shard.name}.*truncated"


def lose(path: Path) -> str:
    shard = ShardSet(path).shard_path("train", 1)
    shard.unlink()
    return f"{shard.name}.*missing"


def swap(path: Path) -> str:
    """Swap two shards and keep the sizes of the files."""
    dataset = ShardSet(path)
    one, other = (dataset.shard_path("train", i) for i in (1, 2))
    size = min(one.stat().st_size, other.stat().st_size)
    contents = one.read_bytes(), other.read_bytes()
    for shard, content in ((one, contents[1]), (other, contents[0])):
        shard.write_bytes(content[:size].ljust(shard.stat().st_size, b"\0"))
    return f"{one.name}: neither the first nor the last sample matches.*outdated or belongs to another shard"


def train(path: Path, *, bad_samples: str, world: int = 1, rank: int = 0) -> TrainLoader:
    dataset = ShardSet(path)
    plan = TrainPlan(dataset.shard_samples("train"), global_batch=GLOBAL, seed=5, shuffle_block_size=16)
    shape = BatchShape(global_batch=GLOBAL, world=world, rank=rank)
    options = LoaderOptions(bad_samples=bad_samples)
    return TrainLoader(dataset, plan, shape, RECIPE, epochs=2, device=CPU, options=options)


def batches_of(loader: TrainLoader) -> list[Batch]:
    with loader:
        return list(loader.stream())


def test_the_bytes_are_those_of_the_tars_in_the_requested_order(photos: Path) -> None:
    dataset = ShardSet(photos)
    ids = np.array([5, 60, 5, 0, 33])
    with SampleReader(open_storage(dataset, "train")) as reader:
        found = reader.read(ids).checked()
    for sample, image in zip(ids.tolist(), found.images, strict=True):
        shard, offset, size = shard_of(photos, sample)
        assert image.tobytes() == shard.read_bytes()[offset : offset + size]
    assert found.rows["label"].tolist() == dataset.index("train")["label"][ids].tolist()


def test_a_set_of_many_shards_is_read_with_few_file_descriptors(photos: Path) -> None:
    dataset = ShardSet(photos)
    ids = np.roll(np.arange(dataset.split("train").samples), 17)
    storage = open_storage(dataset, "train", max_open=2)
    assert len(dataset.split("train").shards) > 2
    assert isinstance(storage.files, LocalFiles)
    with SampleReader(storage, threads=2) as few, SampleReader(open_storage(dataset, "train")) as free:
        for _ in range(3):
            images = few.read(ids).checked().images
            assert storage.files.open_count <= 2
        assert all(np.array_equal(a, b) for a, b in zip(images, free.read(ids).checked().images, strict=True))


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, lose])
def test_damage_is_raised_in_the_consumer_with_the_file_name_and_ends_the_loader(
    copied: Path, damage: Callable[[Path], str]
) -> None:
    message = damage(copied)
    with pytest.raises(ShardSetError, match=message):  # noqa: PT012 - found at opening or while reading
        loader = train(copied, bad_samples="raise")
        with loader:
            for _ in loader.stream():
                pass
    if damage is flip_a_bit:
        with pytest.raises(ShardSetError, match=message):
            next(loader._prefetcher or loader)


@pytest.mark.parametrize("damage", [truncate, lose, swap])
@pytest.mark.parametrize("bad_samples", ["raise", "skip:9999"])
def test_files_that_do_not_match_the_set_are_rejected_before_training(
    copied: Path, damage: Callable[[Path], str], bad_samples: str
) -> None:
    message = damage(copied)
    with pytest.raises(ShardSetError, match=message):
        train(copied, bad_samples=bad_samples)


def test_the_quick_check_is_bounded_and_starts_at_another_shard_on_another_rank(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = ShardSet(copied)
    shards = len(dataset.split("train").shards)
    assert shards >= 3
    monkeypatch.setattr("pipeline.storage.quick_check.SHARDS_AT_ONCE", 1)
    with SampleReader(open_storage(dataset, "train")) as reader:
        assert quick_check(dataset, "train", reader) == shards
        swap(copied)
        assert quick_check(dataset, "train", reader, seconds=0) == 1, "shard 0 is good"
        with pytest.raises(ShardSetError, match="outdated"):
            quick_check(dataset, "train", reader, rank=1, world=shards, seconds=0)


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("n01440764/n01440764_10026.JPEG", "n01440764/n01440764_10026"),
        ("deep/" * 40 + "a.b.jpg", "deep/" * 40 + "a"),
        ("plain.jpg", "plain"),
    ],
)
def test_the_key_of_a_sample_is_found_in_tars_of_other_tools(tmp_path: Path, style: int, name: str, key: str) -> None:
    path = tmp_path / "foreign.tar"
    with tarfile.open(path, "w", format=style) as tar:
        for member in ("first.jpg", name):
            info = tarfile.TarInfo(member)
            info.size = 1000
            tar.addfile(info, io.BytesIO(bytes(1000)))
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[1].offset_data
    files = LocalFiles([path])
    assert tar_key(files, 0, offset) == key
    assert tar_key(files, 0, 1200) is None  # in the second block of an image
    files.close()


def test_a_bad_sample_is_replaced_and_logged(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    undamaged = batches_of(train(copied, bad_samples="raise"))
    flip_a_bit(copied)
    loader = train(copied, bad_samples="skip:1")
    with caplog.at_level(logging.WARNING):
        damaged = batches_of(loader)
    assert loader.bad_samples == 1
    assert "(sample 11, " in caplog.text
    replaced = []
    for before, after in zip(undamaged, damaged, strict=True):
        assert after.planned.tolist() == before.ids.tolist()
        for row, (planned, sample) in enumerate(zip(after.planned.tolist(), after.ids.tolist(), strict=True)):
            if planned != 11:
                assert sample == planned
                assert torch.equal(after.images[row], before.images[row])
                continue
            assert sample != 11
            assert after.labels[row] == ShardSet(copied).index("train")["label"][sample]
            replaced.append(sample)
    assert len(replaced) >= 1


def test_a_replacement_sample_has_the_class_of_the_bad_sample_if_possible(copied: Path) -> None:
    labels = ShardSet(copied).index("train")["label"]
    label = labels[11]
    flip_a_bit(copied)
    with SampleReader(open_storage(ShardSet(copied), "train")) as reader:
        batch = reader.read(np.array([11, 12]))
        bad = BadSamples(budget=10_000, samples=len(labels), seed=0)
        found = [bad.replace_bad_samples(batch, reader, epoch=epoch).ids[0] for epoch in range(20)]
        assert labels[found].tolist() == [label] * 20
        assert 11 not in found
        assert len(set(found)) > 2
    for sample in np.flatnonzero(labels == label).tolist():
        if sample != 11:
            flip_a_bit(copied, sample)
    with SampleReader(open_storage(ShardSet(copied), "train")) as reader:
        bad = BadSamples(budget=10_000, samples=len(labels), seed=0)
        replaced = bad.replace_bad_samples(reader.read(np.array([11, 12])), reader, epoch=0)
    assert labels[replaced.ids[0]] != label
    assert replaced.ids[1] == 12


def test_replacement_samples_are_the_same_at_every_world_size(copied: Path) -> None:
    for sample in (3, 11, 40, 41):
        flip_a_bit(copied, sample)

    def sequence(world: int) -> list[list[int]]:
        ranks = [batches_of(train(copied, bad_samples="skip:4", world=world, rank=rank)) for rank in range(world)]
        return [[i for batch in step for i in batch.ids.tolist()] for step in zip(*ranks, strict=True)]

    alone = sequence(1)
    assert not {3, 11, 40, 41} & {i for step in alone for i in step}
    assert sequence(3) == alone
    assert sequence(4) == alone


def test_the_run_stops_when_more_samples_are_bad_than_the_budget_allows(copied: Path) -> None:
    for sample in (3, 11, 40):
        flip_a_bit(copied, sample)
    with pytest.raises(ShardSetError, match=r"3 bad samples, more than --bad-samples skip:2 allows.*offset \d+"):
        batches_of(train(copied, bad_samples="skip:2"))


def test_an_evaluation_omits_a_bad_sample(copied: Path) -> None:
    dataset = ShardSet(copied)
    flip_a_bit(copied, 4, "val")
    samples = dataset.split("val").samples
    with EvalLoader(
        dataset,
        EvalPlan(samples, batch=5),
        size=32,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        device=CPU,
        options=LoaderOptions(bad_samples="skip:1"),
    ) as loader:
        batches = list(loader)
    ids = np.concatenate([batch.ids for batch in batches])
    assert ids[ids != NO_SAMPLE].tolist() == [i for i in range(samples) if i != 4]
    assert all(((batch.ids != NO_SAMPLE) == batch.mask.numpy()).all() for batch in batches)


@pytest.mark.parametrize("text", ["skip", "skip:", "skip:-1", "ignore", "raise:3"])
def test_an_invalid_policy_for_bad_samples_is_rejected(text: str) -> None:
    with pytest.raises(UserError, match="--bad-samples"):
        LoaderOptions(bad_samples=text)
