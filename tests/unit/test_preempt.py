"""Requests to stop or save (launch/resilience/preempt.py): files that cannot be removed, and clock adjustments."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from launch.config.resilience import PreemptConfig
from launch.machine.world import World
from launch.resilience.preempt import Preemption, StopRequested, deadline

HOUR = 3600.0


@pytest.fixture
def world() -> World:
    return World(0, 1, 0, 1, torch.device("cpu"))


class Clocks:
    """The wall clock, which can be adjusted, and the monotonic clock of a machine."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.wall, self.steady = 1.7e9, 1000.0
        patch.setattr(time, "time", lambda: self.wall)
        patch.setattr(time, "monotonic", lambda: self.steady)

    def advance(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clocks]:
    with monkeypatch.context() as patch:
        yield Clocks(patch)


@pytest.mark.parametrize("jump", [-2 * HOUR, 0.0, 2 * HOUR])
@pytest.mark.parametrize("by", ["time_limit", "slurm"])
def test_adjusting_the_clock_does_not_move_the_deadline(world: World, clocks: Clocks, jump: float, by: str) -> None:
    if by == "slurm":
        config, end = PreemptConfig(preempt_margin=120), clocks.wall + HOUR + 120
    else:
        config, end = PreemptConfig(time_limit=60), clocks.wall
    stop_at = deadline(config, started=clocks.steady, job_end=str(int(end)))
    preemption = Preemption(Path("nowhere"), world, deadline=stop_at)
    clocks.wall += jump
    clocks.advance(HOUR - 5)
    assert not preemption.save_requested()
    clocks.advance(10)
    with pytest.raises(StopRequested, match="the deadline"):
        preemption.save_requested()


@pytest.mark.parametrize("end", ["", "NONE", "-5", "\u00b2", "1e9", "tomorrow"])
def test_an_invalid_job_end_means_no_deadline(end: str) -> None:
    assert deadline(PreemptConfig(), started=0.0, job_end=end) is None


def test_a_request_takes_effect_once(tmp_path: Path, world: World) -> None:
    preemption = Preemption(tmp_path, world, deadline=None)
    (tmp_path / "SAVE").touch()
    assert [preemption.save_requested(), preemption.save_requested()] == [True, False]
    assert not (tmp_path / "SAVE").exists()


@pytest.mark.parametrize("name", ["SAVE", "PREEMPT"])
def test_a_folder_in_place_of_a_request_file_is_ignored_with_one_warning(
    tmp_path: Path, world: World, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    (tmp_path / name).mkdir()
    preemption = Preemption(tmp_path, world, deadline=None)
    with caplog.at_level(logging.WARNING):
        assert not any(preemption.save_requested() for _ in range(3))
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / name}: the request is ignored because the file cannot be removed (Is a directory)"
    ]


def test_an_iteration_ends_when_a_stop_is_requested(tmp_path: Path, world: World) -> None:
    preemption, seen = Preemption(tmp_path, world, deadline=None), []

    def request_stop_at_2() -> None:
        for item in preemption.until_stop(range(5)):
            seen.append(item)
            if item == 2:
                (tmp_path / "PREEMPT").touch()

    with pytest.raises(StopRequested, match="the file PREEMPT"):
        request_stop_at_2()
    assert seen == [0, 1, 2]
    assert list(Preemption(tmp_path, world, deadline=None).until_stop(range(3))) == [0, 1, 2]
