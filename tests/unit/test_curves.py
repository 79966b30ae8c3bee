"""The curves of a run: which panels are drawn, what is in them, and how long curves are shortened."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from launch.monitor.curves import draw_curves, figure
from launch.monitor.panels import MAX_POINTS, PANELS, Timeline, downsampled, has_data, means, time_unit
from launch.run.metrics_file import METRICS_NAME, read_metrics
from launch.run.status import read_content
from shards.errors import UserError
from tests.support.run_folders import DOWN_SECONDS, STEP_SECONDS, write_run

LOSS, TOP1, *_ = PANELS


def timeline(run: Path) -> Timeline:
    return Timeline(run.name, read_metrics(run))


def texts(run: Path) -> list[str]:
    """Return the texts of the figure; matplotlib writes each as a comment of the SVG file."""
    return re.findall(r"<!-- (.+) -->", draw_curves(run, run / "curves.svg").read_text())


def test_title_has_the_best_accuracy_of_weights_and_ema(tmp_path: Path) -> None:
    run = write_run(tmp_path, ema=True)
    drawn = texts(run)
    assert "Top-1 accuracy, best 95.00% (moving average)" in drawn
    assert {"weights", "moving average (EMA)", "validation, moving average (EMA)"} <= set(drawn)
    content = read_content(run)
    assert content is not None
    assert timeline(run).best() == (content.best, content.best_of)


def test_title_of_a_run_without_ema_does_not_say_whose_accuracy_it_is(tmp_path: Path) -> None:
    drawn = texts(write_run(tmp_path))
    assert "Top-1 accuracy, best 90.00%" in drawn
    assert not [text for text in drawn if "average" in text]


def test_of_equal_accuracies_the_first_one_is_the_best(tmp_path: Path) -> None:
    """As in `Progress.evaluated`, whose result is in RUN/status."""
    evaluations = [(1, "eval", 0.5), (1, "eval-ema", 0.75), (2, "eval", 0.75), (2, "eval-ema", 0.75)]
    run = Timeline("run", [{"kind": kind, "time": 0.0, "step": step, "top1": top1} for step, kind, top1 in evaluations])
    assert run.best() == (0.75, "average")
    assert Timeline("run", run.lines[2:]).best() == (0.75, "weights")


def test_accuracy_of_lost_steps_is_not_the_best(tmp_path: Path) -> None:
    run = write_run(tmp_path, crash=(60, 40))
    lines = read_metrics(run)
    lost = next(line for line in lines if line["kind"] == "eval" and line["step"] == 50)
    lost["top1"] = 0.99
    assert Timeline("run", lines).best() == (0.9, "weights")


def test_panels_without_data_are_left_out(tmp_path: Path) -> None:
    drawn = texts(write_run(tmp_path, evaluations=False))
    assert "Loss" in drawn
    assert not [text for text in drawn if "accuracy" in text or "GPU" in text or "validation" in text]


def test_panels_of_gpus_are_drawn_if_a_gpu_was_used(tmp_path: Path) -> None:
    lines = read_metrics(write_run(tmp_path))
    gpu = [line | {"memory_bytes": 2**30, "mfu": 0.25} if line["kind"] == "train" else line for line in lines]
    cpu = [line | {"memory_bytes": 0, "mfu": 0.25} if line["kind"] == "train" else line for line in lines]
    names = [{panel.title for panel in PANELS if has_data(panel, [Timeline("run", found)])} for found in (gpu, cpu)]
    assert names[0] - names[1] == {"GPU memory of rank 0", "Model FLOPs utilization"}


def test_top5_accuracy_is_left_out_if_it_is_always_complete(tmp_path: Path) -> None:
    lines = read_metrics(write_run(tmp_path))
    few_classes = [line | {"top5": 1.0} if line["kind"] == "eval" else line for line in lines]
    shown = [
        [panel.title for panel in PANELS if has_data(panel, [Timeline("run", found)])] for found in (lines, few_classes)
    ]
    assert set(shown[0]) - set(shown[1]) == {"Top-5 accuracy"}


def test_curve_over_steps_has_every_step_once_and_lost_steps_apart(tmp_path: Path) -> None:
    run = timeline(write_run(tmp_path, crash=(60, 40)))
    training = LOSS.series[0]
    steps, values = run.points(training, "steps")
    assert steps.tolist() == list(range(10, 101, 10))
    assert np.isfinite(values).all()
    lost, values = run.points(training, "steps", lost=True)
    assert lost[np.isfinite(values)].tolist() == [50, 60]
    epochs, _ = run.points(training, "epochs")
    assert epochs.tolist() == [step / 25 for step in steps]


def test_curve_over_time_is_interrupted_while_the_run_was_down(tmp_path: Path) -> None:
    run = timeline(write_run(tmp_path, crash=(60, 60)))
    seconds, values = run.points(LOSS.series[0], "time")
    (gap,) = np.flatnonzero(np.isnan(values[1:]))
    assert seconds[gap + 2] - seconds[gap] == DOWN_SECONDS + 5 + 10 * STEP_SECONDS
    assert run.interruptions("time", 1.0) == [seconds[gap] + DOWN_SECONDS]
    assert run.interruptions("steps", 1.0) == [60]


def test_time_has_a_unit_in_which_it_is_readable(tmp_path: Path) -> None:
    def unit(seconds: float) -> str:
        return time_unit([Timeline("run", [{"kind": "end", "time": moment} for moment in (0.0, seconds)])])[0]

    assert [unit(seconds) for seconds in (60, 600, 20_000, 200_000)] == ["seconds", "minutes", "hours", "days"]


def test_long_curve_keeps_its_extremes_and_its_interruptions() -> None:
    values = np.sin(np.arange(100_000.0))
    values[[70_001, 70_005]] = 5, -5
    values[50_000] = np.nan
    places, kept = downsampled((np.arange(100_000.0), values))
    assert len(places) <= MAX_POINTS + 3
    assert {70_001.0, 70_005.0, 50_000.0, 0.0, 99_999.0} <= set(places.tolist())
    assert np.isnan(kept).sum() == 1
    assert (np.diff(places) > 0).all()
    assert (values[places.astype(int)] == kept)[~np.isnan(kept)].all()


def test_mean_of_a_curve_ignores_missing_values() -> None:
    values = np.array([1.0, 3.0, np.nan, 5.0, 7.0])
    places, mean = means((np.arange(5.0), values), 2)
    assert (places.tolist(), mean.tolist()) == ([0.5, 3.5], [2.0, 6.0])


def test_several_runs_are_named_in_the_figure(tmp_path: Path) -> None:
    runs = [timeline(write_run(tmp_path / name, classes=10)) for name in ("first$_run$", "second")]
    drawn = figure(runs, "svg").decode()
    assert "<!-- first$_run$ -->" in drawn
    assert "<!-- second -->" in drawn
    assert "best" not in drawn


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_figure_of_a_single_evaluation_and_step_is_drawn(tmp_path: Path, suffix: str) -> None:
    run = write_run(tmp_path, steps=10, epochs=1)
    assert draw_curves(run, run / f"c{suffix}").stat().st_size > 1000


def test_curves_require_metrics(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"contains no metrics\.jsonl"):
        draw_curves(tmp_path)


def test_loss_that_is_not_finite_interrupts_the_curve(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    lines = [json.loads(line) for line in (run / METRICS_NAME).read_text().splitlines()]
    for line in lines:
        if line["kind"] == "train" and line["step"] == 50:
            line["loss"] = None
    _, values = Timeline("run", lines).points(LOSS.series[0], "steps")
    assert np.flatnonzero(np.isnan(values)).tolist() == [4]


def test_evaluations_are_connected_over_interruptions(tmp_path: Path) -> None:
    run = timeline(write_run(tmp_path, crash=(60, 60)))
    _, values = run.points(TOP1.series[0], "time")
    assert len(values) == 2
    assert np.isfinite(values).all()
