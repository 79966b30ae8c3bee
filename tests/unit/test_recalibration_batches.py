"""The batches of --recalibrate-bn: those after the last epoch, without another cache of decoded images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from launch.config.command_line import parse
from launch.feed import Feed
from launch.machine.world import World
from pipeline import background
from pipeline.batch import Batch

CPU = World(0, 1, 0, 1, torch.device("cpu"), cores=2)
OPTIONS = (
    *("--size", "64", "--size-schedule", "0:32,50:64", "--augment", "light", "--global-batch", "16"),
    *("--epochs", "2", "--warmup-epochs", "0", "--fraction", "0.05", "--recalibrate-bn", "6"),
)


def feed_of(data: Path, *options: str) -> Feed:
    return Feed.of(parse(["--data", str(data), *OPTIONS, *options]), CPU)


def memory_caches() -> int:
    """Number of memory caches that this process has open, each with several file descriptors."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            if "memfd:decoded-images" in os.readlink(path := f"/proc/self/fd/{name}"):
                found.add(os.stat(path).st_ino)
    return len(found)


def assert_equal(found: Iterator[Batch], expected: list[Batch]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert torch.equal(one.images, other.images)


@pytest.mark.parametrize("short_side", [(), ("--memory-cache-short-side", "7")])
def test_they_use_the_memory_cache_of_the_training(digits: Path, short_side: tuple[str, ...]) -> None:
    """A node that has the memory for one cache may not have it for two."""
    feed = feed_of(digits, "--memory-cache", "0.1", *short_side)
    with feed.train_loader(step=0, dtype=torch.float32, epochs=4) as training:
        following = [each for each in training.stream() if each.position.epoch >= 2][:6]
        cache = training.memory_cache
        assert cache is not None
        before = cache.used()
        with feed.recalibration_batches(dtype=torch.float32, memory_cache=cache) as batches:
            assert memory_caches() == 1
            assert_equal(batches, following)
        assert cache.used() == before, "every image was in the cache"
    assert memory_caches() == 0


def test_they_need_no_second_cache_in_the_memory_of_a_gpu(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budgets: list[float] = []
    real = background.make_cache

    def make_cache(gib: float, device: torch.device) -> object:
        budgets.append(gib)
        return real(gib, device)

    monkeypatch.setattr(background, "make_cache", make_cache)
    feed = feed_of(digits, "--gpu-cache", "0.1")
    with feed.train_loader(step=0, dtype=torch.float32, epochs=4) as training:
        following = [each for each in training.stream() if each.position.epoch >= 2][:6]
        with feed.recalibration_batches(dtype=torch.float32, memory_cache=None) as batches:
            assert_equal(batches, following)
    assert budgets == [0.1, 0.0]
