"""How close the plan's order is to a full shuffle (figures: docs/input-pipeline.md), and how large a set may be."""

from __future__ import annotations

import dataclasses
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.plan import Position, TrainPlan
from pipeline.storage.files import MAX_OPEN
from pipeline.storage.placement import open_storage
from pipeline.storage.quick_check import SHARDS_AT_ONCE, quick_check
from pipeline.storage.reader import SampleReader
from shards.format.dataset import ShardSet
from shards.format.index import write_index
from shards.format.manifest import Manifest

SAMPLES, SHARDS, GLOBAL = 204_800, 100, 256


@pytest.fixture(scope="module")
def plan() -> TrainPlan:
    return TrainPlan(np.full(SHARDS, SAMPLES // SHARDS), global_batch=GLOBAL, seed=3)


def batches(plan: TrainPlan, epoch: int) -> np.ndarray:
    """int64 [steps, GLOBAL]."""
    return np.stack([plan.ids(Position(epoch, step)) for step in range(plan.steps_per_epoch)])


def test_a_batch_is_spread_over_the_whole_set(plan: TrainPlan) -> None:
    draw = np.random.default_rng(0)
    rows = draw.permuted(batches(plan, 0), axis=1)
    distance = np.abs(np.diff(rows, axis=1)).mean()
    assert distance == pytest.approx(SAMPLES / 3, rel=0.02), "the same as in a full shuffle"
    shards = [len(np.unique(batch // (SAMPLES // SHARDS))) for batch in rows]
    assert np.mean(shards) > 0.75 * SHARDS * (1 - (1 - 1 / SHARDS) ** GLOBAL)


def test_pairs_of_samples_share_a_batch_again_about_as_rarely_as_in_a_full_shuffle(plan: TrainPlan) -> None:
    step_of = np.full(SAMPLES, -1)
    step_of[batches(plan, 1)] = np.arange(plan.steps_per_epoch)[:, None]
    again = sum(int((np.bincount(step_of[batch]) ** 2).sum()) - GLOBAL for batch in batches(plan, 0))
    pairs = plan.steps_per_epoch * GLOBAL * (GLOBAL - 1)
    assert again / pairs < 1.1 / plan.steps_per_epoch


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("shards", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_set_with_more_shards_than_file_descriptors_opens_and_reads(
    digits: Path, tmp_path: Path, few_descriptors: None, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    source, real_open = ShardSet(digits), os.open
    entry = dataclasses.replace(source.split("train").shards[0], samples=2)
    rows = np.array(source.index("train")[:2])
    names = [f"train-{number:06d}.tar" for number in range(shards)]
    for name in names:
        (tmp_path / name).symlink_to(digits / entry.name)
    split = dataclasses.replace(
        source.split("train"),
        samples=2 * shards,
        shards=tuple(dataclasses.replace(entry, name=name) for name in names),
        index_hash=write_index(tmp_path / "train.index.npy", 2 * shards, (rows.copy() for _ in names)),
    )
    Manifest(classes=source.manifest.classes, splits={"train": split}).save(tmp_path)
    dataset = ShardSet(tmp_path)
    storage = open_storage(dataset, "train")
    expected = [
        SampleReader(open_storage(source, "train")).read(np.arange(2)).checked().images[i].tobytes() for i in (0, 1)
    ]
    opened: list[Path] = []
    monkeypatch.setattr(os, "open", lambda path, *args: (opened.append(path), real_open(path, *args))[1])
    with SampleReader(storage) as reader:
        assert quick_check(dataset, "train", reader, seconds=0.0) == SHARDS_AT_ONCE
        assert len(opened) == SHARDS_AT_ONCE
        opened.clear()
        ids = np.random.default_rng(0).permutation(2 * shards)[:2000]
        found = reader.read(ids).checked().images
        assert storage.files.open_count <= MAX_OPEN  # type: ignore[attr-defined]
    assert set(opened) <= {tmp_path / names[shard] for shard in (ids // 2).tolist()}
    assert len(opened) <= len(ids)
    assert [image.tobytes() for image in found] == [expected[i % 2] for i in ids.tolist()]
