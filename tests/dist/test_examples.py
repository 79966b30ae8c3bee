"""The programs in examples/ that train with the loaders of this project and the training loops of others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.dist.forked import Launcher
from tests.support.launching import ROOT, environment, free_port
from tests.support.small_sets import cats_and_dogs
from tests.support.waiting import wait_until

IMAGES, GLOBAL, EPOCHS = 32, 8, 3  # the global batch divides the number of images, so an epoch omits none
STEPS = IMAGES // GLOBAL
Steps = dict[tuple[int, int], list[int]]
"""Sample ids of the global batch, by epoch and step."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cats_and_dogs(tmp_path_factory.mktemp("images"), train=IMAGES)


def arguments(images: Path, folder: Path) -> list[object]:
    return [images, "--size", 32, "--global-batch", GLOBAL, "--epochs", EPOCHS, "--checkpoint", folder / "checkpoint"]


def recorded(folder: Path, world: int) -> Steps:
    """Return the global batches that every rank has received."""
    texts = [(folder / f"rank-{rank}.jsonl").read_text() for rank in range(world)]
    lines = [[json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()] for text in texts]
    steps: Steps = {}
    for same_step in zip(*lines, strict=False):
        (position,) = {(epoch, step) for epoch, step, _ in same_step}
        steps[position] = [i for *_, ids in same_step for i in ids]
    return steps


def has_received(folder: Path, count: int) -> Callable[[], bool]:
    path = folder / "rank-0.jsonl"
    return lambda: path.exists() and len(path.read_text().splitlines()) >= count


def check_that_epochs_are_complete(first: Steps, second: Steps, checkpoint: tuple[int, int]) -> None:
    """Check the steps that count: those of the killed processes before their last checkpoint, and those after it."""
    counted = {position: ids for position, ids in first.items() if position < checkpoint}
    assert min(second) == checkpoint
    assert all(second[position] == first[position] for position in first.keys() & second.keys())
    counted |= second
    assert sorted(counted) == [(epoch, step) for epoch in range(EPOCHS) for step in range(STEPS)]
    for epoch in range(EPOCHS):
        ids = [i for position, batch in counted.items() if position[0] == epoch for i in batch]
        assert sorted(ids) == list(range(IMAGES)), "each image once"


def test_plain_loop_killed_with_2_processes_and_resumed_with_1_sees_each_image_once_per_epoch(
    launch: Launcher, images: Path, tmp_path: Path
) -> None:
    program = [ROOT / "examples" / "train_plain.py", *arguments(images, tmp_path), "--save-every", 2]
    launch.start("tests.dist.record_example", tmp_path / "first", *program, ranks=2)
    wait_until(has_received(tmp_path / "first", STEPS + 2), "the batches of more than an epoch", seconds=100)
    launch.kill()
    state = torch.load(tmp_path / "checkpoint")["loader"]
    launch("tests.dist.record_example", tmp_path / "second", *program, ranks=1)
    first, second = recorded(tmp_path / "first", 2), recorded(tmp_path / "second", 1)
    check_that_epochs_are_complete(first, second, (state["epoch"], state["step"]))
    last = torch.load(tmp_path / "checkpoint")
    assert last["optimizer"]["state"][0]["step"] == EPOCHS * STEPS


@pytest.mark.slow
def test_plain_loop_under_torchrun(images: Path, tmp_path: Path) -> None:
    def torchrun(world: int, out: Path) -> list[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}"]
        program = ["tests/dist/record_example.py", out, ROOT / "examples" / "train_plain.py"]
        options = [*arguments(images, tmp_path), "--save-every", 2]
        return list(map(str, [*launcher, f"--master-port={free_port()}", *program, *options]))

    settings = {"cwd": ROOT, "env": environment(tmp_path, OMP_NUM_THREADS="1")}
    with subprocess.Popen(torchrun(2, tmp_path / "first"), start_new_session=True, **settings) as process:  # type: ignore[call-overload]
        wait_until(has_received(tmp_path / "first", STEPS + 2), "the batches of more than an epoch", seconds=200)
        workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        assert len(workers) == 2
        for pid in (process.pid, *workers):  # torchrun's workers have sessions of their own
            os.kill(pid, signal.SIGKILL)
    state = torch.load(tmp_path / "checkpoint")["loader"]
    subprocess.run(torchrun(1, tmp_path / "second"), check=True, **settings)  # type: ignore[call-overload]
    first, second = recorded(tmp_path / "first", 2), recorded(tmp_path / "second", 1)
    check_that_epochs_are_complete(first, second, (state["epoch"], state["step"]))


def test_accelerate_resumes_with_the_next_epoch_on_fewer_processes(
    launch: Launcher, images: Path, tmp_path: Path
) -> None:
    example = ROOT / "examples" / "train_accelerate.py"
    for ranks, epochs in ((2, 1), (1, 2)):
        out, program = tmp_path / f"{ranks}", [example, *arguments(images, tmp_path), "--epochs", epochs]
        launch("tests.dist.record_example", out, *program, ranks=ranks, ACCELERATE_USE_CPU="true")
    steps = [recorded(tmp_path / f"{ranks}", ranks) for ranks in (2, 1)]
    for epoch, found in enumerate(steps):
        assert list(found) == [(epoch, step) for step in range(STEPS)]
        assert sorted(i for ids in found.values() for i in ids) == list(range(IMAGES))
