"""Fixtures and loaders for remote sets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.augment.recipe import augment_recipe
from pipeline.batch_shape import BatchShape
from pipeline.loader import Batch, EvalLoader, LoaderOptions, TrainLoader
from pipeline.plan import EvalPlan, TrainPlan
from pipeline.storage.cache.cache import Cache
from pipeline.storage.cache.partial_file import PartialFile
from pipeline.storage.remote import client as remote
from pipeline.storage.remote import staged_files
from shards.format.dataset import ShardSet
from tests.support.cached import cached
from tests.support.serving import Site, serve
from tests.support.waiting import wait_until

CPU = torch.device("cpu")
RECIPE = augment_recipe("light", size=32)
GLOBAL = 24


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(staged_files, "FULL_CACHE_SECONDS", 0.2)


@pytest.fixture
def site(photos: Path) -> Iterator[Site]:
    with serve(photos) as site:
        yield site


def train(dataset: ShardSet, *, world: int = 1, rank: int = 0, epochs: int = 2, **options: object) -> TrainLoader:
    plan = TrainPlan(dataset.shard_samples("train"), global_batch=GLOBAL, seed=5, shuffle_block_size=16)
    shape = BatchShape(global_batch=GLOBAL, world=world, rank=rank)
    chosen = LoaderOptions(**options)  # type: ignore[arg-type]
    return TrainLoader(dataset, plan, shape, RECIPE, epochs=epochs, device=CPU, options=chosen)


def evaluation(dataset: ShardSet) -> EvalLoader:
    samples = dataset.split("val").samples
    plan = EvalPlan(samples, batch=5)
    return EvalLoader(dataset, plan, size=32, mean=RECIPE.mean, std=RECIPE.std, device=CPU)


def batches_of(loader: TrainLoader | EvalLoader) -> list[Batch]:
    with loader:
        return list(loader.stream())


def same(found: list[Batch], expected: list[Batch]) -> bool:
    return len(found) == len(expected) and all(
        np.array_equal(a.ids, b.ids) and torch.equal(a.labels, b.labels) and torch.equal(a.images, b.images)
        for a, b in zip(found, expected, strict=True)
    )


def wait_until_staged(cache: Path, files: int) -> None:
    """Wait until the cache contains this number of complete tars."""
    wait_until(lambda: len(cached(cache, "*.tar")) >= files)


def size_of(cache: Path) -> int:
    return sum(path.stat().st_size for path in cached(cache))


def shards_of(path: Path, split: str = "train") -> list[str]:
    return [shard.name for shard in ShardSet(path).split(split).shards]


def put(cache: Cache, name: str, size: int) -> int:
    """Add a file of zeros to the cache; return a lease of it."""
    part = cache.begin(cache.folder / "set" / name, size)
    assert isinstance(part, PartialFile)
    with part:
        part.append(bytes(size))
        return part.finish()
