"""Metrics (launch/monitor/metrics.py): write errors lose no line and do not end the run."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launch.config.recipe import Recipe
from launch.config.run import RunConfig
from launch.engine.engine import StepResult
from launch.machine.world import World
from launch.monitor import metrics
from launch.monitor.curves import draw_curves
from launch.run.metrics_file import METRICS_NAME, MetricsLog, check_metrics, read_metrics
from launch.run.progress import Progress
from pipeline.plan import Position
from shards.errors import UserError
from tests.support.disks import fill, small_disk

TRAIN = {"epoch": 1, "loss": 2.5, "lr": 1e-3, "images_per_second": 100.0, "steps": 1, "seconds": 2.0, "data_wait": 0.1}


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / METRICS_NAME).read_text().splitlines()]


def test_lines_kept_while_the_disk_is_full_are_written_in_order_later(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        log = MetricsLog(disk)
        log.write("train", step=1, **TRAIN)
        assert log.messages() == []
        filler = fill(disk)
        for step in range(2, 102):  # more than fits into the rest of the file's last page
            log.write("train", step=step, **TRAIN)
        (warning,) = log.messages()
        assert "cannot be written (No space left on device); lines are kept in memory" in warning
        content = (disk / METRICS_NAME).read_bytes()
        assert content.endswith(b"}\n")  # the incomplete line was truncated
        filler.unlink()
        log.write("train", step=102, **TRAIN)
        (note,) = log.messages()
        assert "lines that were kept in memory have been written" in note
        assert log.close() == []
        assert steps_of(disk) == list(range(1, 103))
        assert [line["step"] for line in read_metrics(disk)] == list(range(1, 103))


def test_unwritten_lines_are_reported_on_close(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "gone")
    for step in range(3):
        log.write("train", step=step, **TRAIN)
    (first,) = log.messages()
    assert "cannot be written (No such file or directory)" in first
    (last,) = log.close()
    assert "3 lines could not be written (No such file or directory)" in last


def test_file_is_opened_as_soon_as_its_folder_exists(tmp_path: Path) -> None:
    run = tmp_path / "run"
    log = MetricsLog(run)
    for step in range(6):
        log.write("train", step=step, **TRAIN)
    assert len(log.messages()) == 1
    run.mkdir()
    log.write("train", step=6, **TRAIN)
    (note,) = log.messages()
    assert note.endswith(": 7 lines that were kept in memory have been written")
    assert log.close() == []
    assert steps_of(run) == list(range(7))


def test_removed_file_is_created_again(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write("train", step=1, **TRAIN)
    (tmp_path / METRICS_NAME).unlink()
    log.write("train", step=2, **TRAIN)
    assert log.close() == []
    assert steps_of(tmp_path) == [2]


def test_truncated_line_does_not_damage_later_lines(tmp_path: Path) -> None:
    (tmp_path / METRICS_NAME).write_text('{"kind": "train", "step": 1, "epo')
    log = MetricsLog(tmp_path)
    log.write("train", step=2, **TRAIN)
    assert log.close() == []
    warnings: list[str] = []
    assert [line["step"] for line in read_metrics(tmp_path, warnings.append)] == [2]
    assert warnings == [f"{tmp_path / METRICS_NAME}: skipped 1 damaged line"]


VALID = b'"kind": "train", "time": 1.0, "step": 3, "steps": 1, "seconds": 1.0, "epoch": 1, "data_wait": 0.5'
DAMAGED = [
    b'{"kind": "train", "st\xff\xfe',
    bytes(500),
    b"17",
    b"[]",
    b'{"time": 1.0, "step": 3}',
    b'{"kind": 5, "time": 1.0, "step": 3}',
    b'{"kind": ["train"], "time": 1.0, "step": 3}',
    b"{" + VALID + b', "lr": null, "images_per_second": 1, "loss": "y"}',
    b"{" + VALID + b', "lr": NaN, "images_per_second": 1, "loss": 1}',
    b"{" + VALID + b', "lr": 1, "images_per_second": 1, "loss": Infinity}',
    b"{" + VALID + b', "lr": 1, "images_per_second": 1, "loss": 1, "time": 1e300}',
    b'{"kind": "eval", "time": 1.0, "step": 3, "epoch": 1, "top1": true, "top5": 1, "loss": 1, "samples": 1}',
    b'{"kind": "end", "time": 1.0, "step": [3], "seconds": 1.0, "best": null}',
    b"[" * 100_000,
    b"x" * (1 << 21),
]


@pytest.mark.parametrize("damage", DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_line_is_skipped_with_a_warning(tmp_path: Path, damage: bytes) -> None:
    log = MetricsLog(tmp_path)
    log.write("train", step=1, **TRAIN)
    log.close()
    with (tmp_path / METRICS_NAME).open("ab") as file:
        file.write(damage)
    before = (tmp_path / METRICS_NAME).read_bytes()
    log = MetricsLog(tmp_path)
    log.write("train", step=2, **TRAIN)
    log.write("train", step=3, **TRAIN | {"loss": None})  # every step was skipped
    log.write("eval", step=3, epoch=1, top1=0.5, top5=0.9, loss=1.0, samples=3)
    assert log.close() == []
    assert (tmp_path / METRICS_NAME).read_bytes().startswith(before)
    warnings: list[str] = []
    assert draw_curves(tmp_path, warn=warnings.append).stat().st_size > 1000
    assert len(warnings) == 1
    lines = read_metrics(tmp_path, warnings.append)
    assert [(line["kind"], line["step"]) for line in lines] == [("train", 1), ("train", 2), ("train", 3), ("eval", 3)]


def test_line_of_which_damaged_ones_are_made_is_valid(tmp_path: Path) -> None:
    (tmp_path / METRICS_NAME).write_bytes(b"{" + VALID + b', "lr": 1, "images_per_second": 1, "loss": 1}')
    assert len(read_metrics(tmp_path)) == 1


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_metrics_path_that_is_not_a_regular_file_is_rejected(tmp_path: Path, make) -> None:
    make(tmp_path / METRICS_NAME)
    with pytest.raises(UserError, match=r"metrics\.jsonl: not a regular file; move it away") as refused:
        check_metrics(tmp_path)
    assert refused.value.exit_code == 2
    with pytest.raises(UserError, match="not a regular file"):
        draw_curves(tmp_path)


def test_data_wait_is_the_waiting_time_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host always waits for the loader, but the device waits only a quarter of a second."""
    at = iter([0.0, 0.0, 1.0, 2.0, 3.0])  # times in seconds at which the queued work of the stream ends
    moment = partial(SimpleNamespace, query=lambda: True)

    def mark(_: torch.device) -> SimpleNamespace:
        start = next(at)
        return moment(at=start, elapsed_time=lambda end: 1000 * (end.at - start))

    monkeypatch.setattr("pipeline.data_wait.timed_event", mark)
    world = World(0, 1, 0, 1, torch.device("cpu"))
    phase = SimpleNamespace(first_step=0, augment=SimpleNamespace(size=32))
    feed = SimpleNamespace(
        plan=SimpleNamespace(global_batch=4, steps_per_epoch=3, at=lambda step: Position(0, step)),
        last_step=3,
        classes=10,
        phases=[phase],
        phase_at=lambda _: phase,
    )
    engine = SimpleNamespace(world=world, description="")
    clock = iter(range(100))
    monkeypatch.setattr("launch.monitor.metrics.time.perf_counter", lambda: float(next(clock)))
    result = StepResult(loss=torch.tensor(1.0), grad_norm=torch.tensor(1.0))
    batches = iter([SimpleNamespace(ready=moment(at=ready)) for ready in (0.0, 1.25, 1.5)])
    with metrics.Metrics(Recipe(run=RunConfig(out=tmp_path)), feed, engine, Progress()) as tracker:
        for step in range(3):
            tracker.next_batches(batches, 1)
            tracker.add_step(step, 1e-3, result)
        before = tracker._interval_started
        at = iter([4.0])
        tracker.log_interval(skipped=0, replaced=0)
    seconds = tracker._interval_started - before - 1
    (line,) = [line for line in read_metrics(tmp_path) if line["kind"] == "train"]
    assert line["data_wait"] == pytest.approx(0.25 / seconds, abs=1e-3)
