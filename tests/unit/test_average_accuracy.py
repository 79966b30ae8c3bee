"""The best accuracy of a run is that of its weights or of their EMA; log, metrics, curves and status say which."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launch.config.recipe import Recipe
from launch.config.run import RunConfig
from launch.machine.world import World
from launch.monitor import metrics
from launch.monitor.metrics import Metrics
from launch.run.metrics_file import METRICS_NAME
from launch.run.progress import Progress, WeightsKind
from launch.run.status import read_content, write_status
from pipeline.plan import Position

LOSS = {"top5": 1.0, "loss": 1.0, "samples": 3}


Make = Callable[[], Metrics]


@pytest.fixture
def tracking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Return a function that creates the Metrics of a run in `tmp_path`, which print to the current stderr."""
    monkeypatch.setattr(metrics.Roofline, "of", lambda *_: None)
    feed = SimpleNamespace(
        plan=SimpleNamespace(global_batch=4, steps_per_epoch=3, at=lambda step: Position(0, step)),
        last_step=3,
        classes=10,
        phases=[SimpleNamespace(first_step=0, augment=SimpleNamespace(size=32))],
    )
    engine = SimpleNamespace(world=World(0, 1, 0, 1, torch.device("cpu")), description="")
    return lambda: Metrics(Recipe(run=RunConfig(out=tmp_path)), feed, engine, Progress())  # type: ignore[arg-type]


def results(**top1: float) -> dict[WeightsKind, dict[str, float]]:
    return {kind: {"top1": value, **LOSS} for kind, value in top1.items()}  # type: ignore[misc]


@pytest.mark.parametrize(
    ("before", "top1", "expected"),
    [
        (Progress(), {"weights": 0.5, "average": 0.25}, (0.5, "weights", True)),
        (Progress(), {"weights": 0.5, "average": 0.75}, (0.75, "average", True)),
        (Progress(), {"weights": 0.5, "average": 0.5}, (0.5, "weights", True)),
        (Progress(best=0.6, best_of="weights"), {"weights": 0.2, "average": 0.5}, (0.6, "weights", False)),
        (Progress(best=0.6, best_of="average"), {"weights": 0.7, "average": 0.5}, (0.7, "weights", True)),
        (Progress(best=0.6, best_of="average"), {"weights": 0.6}, (0.6, "average", False)),
        (Progress(), {"weights": 0.0}, (0.0, None, False)),
    ],
)
def test_best_is_the_better_of_weights_and_average(
    before: Progress, top1: dict[WeightsKind, float], expected: tuple[float, str | None, bool]
) -> None:
    found = before.evaluated(top1)
    assert (found.best, found.best_of, found.is_best) == expected


def test_progress_after_a_step_keeps_best_but_is_not_best() -> None:
    progress = Progress(step=4, epoch_step=4, best=0.6, best_of="average", is_best=True, seconds=3.0)
    expected = Progress(step=5, epoch=1, epoch_step=0, best=0.6, best_of="average", is_best=False, seconds=3.0)
    assert progress.after(5, Position(1, 0)) == expected


def test_evaluation_clears_pending_evaluation() -> None:
    for top1 in (0.5, 0.7):
        before = Progress(best=0.6, best_of="weights", is_best=True, pending_evaluation=True)
        assert not before.evaluated({"weights": top1}).pending_evaluation
        assert before.evaluated({"weights": top1}).is_best == (top1 > 0.6)


def test_log_and_metrics_have_both_accuracies_and_the_best(
    tracking: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = tracking()
    progress = Progress(step=1).evaluated(tracker.log_evaluation(1, results(weights=0.25, average=0.75)))
    top1 = tracker.log_evaluation(2, results(weights=0.5, average=0.625))
    progress = progress.after(2, Position(0, 2)).evaluated(top1)
    tracker.finish(progress)
    said = [line[len("2026-11-28 23:30:36 ") :] for line in capsys.readouterr().err.splitlines()]
    assert [line.split(", top-5")[0] for line in said[:4]] == [
        "epoch 1, weights: top-1 25.00%",
        "epoch 1, moving average: top-1 75.00%",
        "epoch 1, weights: top-1 50.00%",
        "epoch 1, moving average: top-1 62.50%",
    ]
    assert said[4].endswith(", best top-1 75.00% (moving average); at the end: weights 50.00%, moving average 62.50%")
    lines = [json.loads(line) for line in (tmp_path / METRICS_NAME).read_text().splitlines()]
    assert [(line["kind"], line["step"], line["top1"]) for line in lines if "top1" in line] == [
        ("eval", 1, 0.25),
        ("eval-ema", 1, 0.75),
        ("eval", 2, 0.5),
        ("eval-ema", 2, 0.625),
    ]
    assert (lines[-1]["kind"], lines[-1]["best"], lines[-1]["best_of"]) == ("end", 0.75, "average")


def test_run_without_evaluation_has_no_best(tracking: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = tracking()
    tracker.finish(Progress(step=2))
    assert "best" not in capsys.readouterr().err
    assert json.loads((tmp_path / METRICS_NAME).read_text().splitlines()[-1])["best"] is None


def test_status_contains_the_best(tmp_path: Path) -> None:
    write_status(tmp_path, "finished", step=9, best=(0.75, "average"))
    content = read_content(tmp_path)
    assert content is not None
    assert (content.best, content.best_of) == (0.75, "average")
    write_status(tmp_path, "finished", step=9)
    content = read_content(tmp_path)
    assert content is not None
    assert content.best is None
