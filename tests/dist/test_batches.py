"""Batches of real processes: the same global batches at every world size and after every interruption."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.dist.forked import Launcher
from tests.dist.ranks import Ranks, Record, Sequence
from tests.support.launching import ROOT, environment

WORLDS = (1, 2, 3, 4, 6, 8)
GLOBAL = 96
STEPS = 24  # an epoch has 14
SAMPLES = 360  # of the evaluated split
OPTIONS = (
    *("--size", "32", "--augment", "fat", "--global-batch", str(GLOBAL), "--epochs", "3", "--warmup-epochs", "0"),
    *("--eval-batch", "10", "--shuffle-block-size", "64"),
)


@pytest.fixture(scope="module")
def ranks(launch: Launcher, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(launch, tmp_path_factory.mktemp("ranks"), "--data", digits, *OPTIONS)


@pytest.fixture(scope="module")
def training(ranks: Ranks) -> Sequence:
    """The batches of one uninterrupted process."""
    ranks.start(1, 0, STEPS)
    return ranks.join().steps


@pytest.fixture(scope="module")
def evaluation(ranks: Ranks) -> dict[int, str]:
    """The pixel hash of each sample, from one uninterrupted process."""
    ranks.start(1, 0, kind="eval")
    steps = ranks.join().steps
    return {i: pixels for ids, hashes in steps.values() for i, pixels in zip(ids, hashes, strict=True)}


@pytest.mark.parametrize("world", [2, 4])
def test_same_global_batches_at_every_world_size(ranks: Ranks, training: Sequence, world: int) -> None:
    ranks.start(world, 0, STEPS)
    found = ranks.join()
    assert found.done
    assert sorted(found.steps) == list(range(STEPS))
    assert found.steps == training


def test_micro_batches_are_slices_of_the_same_global_batches(
    launch: Launcher, digits: Path, tmp_path: Path, training: Sequence
) -> None:
    accumulating = Ranks(launch, tmp_path, "--data", digits, *OPTIONS, "--micro-batch", "8")
    accumulating.start(3, 5, 9)
    assert accumulating.join().steps == {step: training[step] for step in range(5, 9)}


def test_same_global_batches_from_feed_processes(
    launch: Launcher, digits: Path, tmp_path: Path, training: Sequence
) -> None:
    ranks = Ranks(launch, tmp_path, "--data", digits, *OPTIONS, "--feed-process", "on")
    ranks.start(2, 0, STEPS, pace=0.1)
    time.sleep(2)
    found = ranks.kill()  # and with them their feed processes
    first = len(found.steps)
    assert found.steps == {step: training[step] for step in range(first)}
    ranks.start(3, first, STEPS)
    found = ranks.join()
    assert found.done
    assert found.steps == {step: training[step] for step in range(first, STEPS)}


def train_through_kills(ranks: Ranks, training: Sequence, draw: random.Random, kills: int) -> None:
    """Kill the ranks at random times, restart after the last complete step at another world size, and compare."""
    position, killed = 0, 0
    while position < STEPS:
        world = draw.choice(WORLDS)
        ranks.start(world, position, STEPS, pace=0.02)
        if killed < kills:
            # Starting takes less than a second: some ranks are killed before their first batch, others much later.
            time.sleep(draw.uniform(0, 0.8 + 0.1 * world))
            found = ranks.kill()
            killed += 1
        else:
            found = ranks.join()
            assert found.done
        assert list(found.steps) == list(range(position, position + len(found.steps)))
        assert found.steps == {step: training[step] for step in found.steps}
        rows = GLOBAL // world
        for (step, rank), (ids, pixels) in found.loose.items():
            mine = slice(rank * rows, (rank + 1) * rows)
            assert (ids, pixels) == (training[step][0][mine], training[step][1][mine])
        position += len(found.steps)
        if position == STEPS and killed < kills:
            position = 0


def evaluate_through_kills(ranks: Ranks, evaluation: dict[int, str], draw: random.Random, kills: int) -> None:
    """Kill an evaluation at random times and resume it at another world size: each sample exactly once."""
    state, seen, killed = {"samples": 0}, {}, 0
    while state["samples"] < SAMPLES:
        world = draw.choice(WORLDS)
        ranks.start(world, state["samples"], kind="eval", pace=0.05)
        if killed < kills:
            time.sleep(draw.uniform(0, 0.5 + 0.1 * world))
            found = ranks.kill()
            killed += 1
        else:
            found = ranks.join()
            assert found.done
        collect(found, seen)
        state = found.state or state
        assert sorted(seen) == list(range(state["samples"]))
    assert seen == evaluation


def collect(found: Record, seen: dict[int, str]) -> None:
    for ids, hashes in found.steps.values():
        for i, pixels in zip(ids, hashes, strict=True):
            assert i not in seen
            seen[i] = pixels


def test_same_batches_after_kills_and_restarts_at_other_world_sizes(ranks: Ranks, training: Sequence) -> None:
    train_through_kills(ranks, training, random.Random(1), kills=4)


def test_a_killed_evaluation_resumes_at_other_world_sizes_with_each_sample_once(
    ranks: Ranks, evaluation: dict[int, str]
) -> None:
    assert sorted(evaluation) == list(range(SAMPLES))
    evaluate_through_kills(ranks, evaluation, random.Random(2), kills=2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(10))
def test_many_kills(ranks: Ranks, training: Sequence, evaluation: dict[int, str], seed: int) -> None:
    train_through_kills(ranks, training, random.Random(100 + seed), kills=20)
    for number in range(5):
        evaluate_through_kills(ranks, evaluation, random.Random(1000 * seed + number), kills=3)


CONSUMER = """
import sys, torch
from pathlib import Path
from pipeline.augment.recipe import augment_recipe
from pipeline.loader import TrainLoader
from pipeline.batch_shape import BatchShape
from pipeline.plan import TrainPlan
from shards.format.dataset import ShardSet
dataset = ShardSet(Path(sys.argv[1]))
plan = TrainPlan(dataset.shard_samples("train"), global_batch=64, seed=0)
recipe = augment_recipe("fat", size=224, mixup=0, cutmix=0)
with TrainLoader(dataset, plan, BatchShape(global_batch=64), recipe, epochs=9999, device=torch.device("cpu")) as loader:
    for number, batch in enumerate(loader.stream()):
        if number == 2:
            print("running", flush=True)
"""


@pytest.mark.timed
def test_ctrl_c_ends_a_loader_within_two_seconds(photos: Path, tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    command = [sys.executable, "-c", CONSUMER, str(photos)]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
    took = time.monotonic() - began
    assert "KeyboardInterrupt" in stderr
    assert process.returncode in (1, 130, -signal.SIGINT)
    assert took < 5  # 2 on an idle machine
    assert set(os.listdir("/dev/shm")) <= before
