"""Options of progressive resizing: which part of a run gets which image size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fat
from launch.config.command_line import parse
from launch.dry_run import describe_run
from launch.engine.build import build_model
from launch.engine.execution import Execution
from launch.engine.input_shapes import InputShape
from launch.engine.memory import check_batches_fit
from launch.feed import Feed
from launch.machine.world import World
from launch.monitor.view import View
from launch.resume.fingerprint import fingerprint
from launch.run.weights_files import describe_weights
from launch.slurm.job import Submit, SubmitError, fits
from pipeline.batch_shape import PlanError
from shards.errors import UserError

CPU_WORLD = World(0, 1, 0, 1, torch.device("cpu"), cores=2)

SMALL = ("--global-batch", "16", "--epochs", "4", "--warmup-epochs", "0", "--zero", "0")
SCHEDULE = ("--size", "96", "--size-schedule", "0:32,50:64,75:96", "--micro-batch", "4")


def feed(data: Path, *options: str, world: World = CPU_WORLD) -> Feed:
    return Feed.of(parse(["--data", str(data), *SMALL, *options]), world)


def test_the_phases_of_a_run_span_all_epochs(digits: Path) -> None:
    found = feed(digits, *SCHEDULE, "--micro-batch-schedule", "32:16,64:8", "--stop-after", "7")
    total = 4 * (1437 // 16)
    first_steps = [phase.first_step for phase in found.phases]
    assert first_steps == [0, -(-total // 4), -(-total * 5 // 8)]
    assert [phase.augment.size for phase in found.phases] == [32, 64, 96]
    assert [phase.shape.accumulation for phase in found.phases] == [1, 2, 4]
    assert found.input_shapes == (InputShape(16, 32, 1, 0.5), InputShape(8, 64, 2, 0.75), InputShape(4, 96, 4, 1.0))
    assert found.phase_at(total - 1).augment == found.augment
    assert found.last_step == 7


def test_without_a_schedule_all_steps_have_the_same_size(digits: Path) -> None:
    found = feed(digits, "--size", "64", "--min-strength", "0.1")
    assert len(found.phases) == 1
    assert (found.phase_at(100).augment, found.phase_at(100).shape) == (found.augment, found.shape)
    assert found.input_shapes == (InputShape(16, 64, 1, 1.0),)


def test_training_and_evaluation_have_their_own_sizes(digits: Path) -> None:
    found = feed(digits, *SCHEDULE, "--eval-size", "128")
    with found.train_loader(step=0, dtype=torch.float32) as train, found.eval_loader(dtype=torch.float32) as val:
        assert val is not None
        assert next(train).images.shape == (4, 3, 32, 32)
        assert next(iter(val)).images.shape == (16, 3, 128, 128)
    step = found.phases[1].first_step
    with found.train_loader(step=step, dtype=torch.float32) as train:
        assert next(train).images.shape == (4, 3, 64, 64)


def test_predictions_use_the_size_of_evaluation(digits: Path) -> None:
    larger = feed(digits, "--size", "64", "--eval-size", "96")
    assert describe_weights(larger.recipe, larger).size == 96
    usual = feed(digits, *SCHEDULE)
    assert describe_weights(usual.recipe, usual).size == 96
    assert fat.ImageTransform.of(describe_weights(larger.recipe, larger)).size == 96


def test_a_run_cannot_resume_with_another_schedule_but_with_another_evaluation(digits: Path) -> None:
    def of(*options: str) -> Any:
        found = feed(digits, "--size", "96", *options)
        return fingerprint(found.recipe, found, teacher=None)

    one = of("--size-schedule", "0:32,50:64,75:96")
    assert of("--size-schedule", " 0:32,50.0:64,75:96").fixed == one.fixed
    for other in (
        of(),
        of("--size-schedule", "0:32,50:64,80:96"),
        of("--size-schedule", "0:32,50:64,75:96", "--min-strength", "0.4"),
    ):
        assert other.fixed != one.fixed
    assert of("--min-strength", "0.4").fixed == of().fixed, "without a schedule it has no effect"
    assert of("--micro-batch", "4").fixed == of().fixed
    larger = of("--eval-size", "128")
    assert larger.fixed == of().fixed
    assert larger.free != of().free


@pytest.mark.parametrize(
    "options",
    [
        ("--betas", "0.9", "0.99"),
        ("--eps", "1e-6"),
        ("--warmup-lr", "1e-5"),
        ("--drop-path", "0"),
        ("--freeze-bn",),
        ("--recalibrate-bn", "3"),
    ],
)
def test_options_that_change_the_results_of_a_resumed_run_are_compared(digits: Path, options: tuple[str, ...]) -> None:
    one, other = (feed(digits, "--size", "32", *each) for each in ((), options))
    before, now = (fingerprint(each.recipe, each, teacher=None) for each in (one, other))
    assert now.fixed == before.fixed
    assert len([name for name, value in now.free.items() if before.free[name] != value]) == 1
    assert json.loads(json.dumps(now.free)) == now.free, "as a checkpoint stores it"


def test_the_size_of_a_memory_cache_is_compared_if_its_images_are_shrunk(digits: Path) -> None:
    def free(*options: str) -> Any:
        found = feed(digits, "--size", "32", *options)
        return fingerprint(found.recipe, found, teacher=None).free

    assert free("--memory-cache", "1") == free("--memory-cache", "2") == free()
    shrunk = ("--memory-cache-short-side", "6")
    assert free("--memory-cache", "1", *shrunk) != free("--memory-cache", "2", *shrunk)
    assert free("--memory-cache", "1", *shrunk) != free("--memory-cache", "1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--size-schedule", "0:128,85:192"),
            "--size-schedule 0:128,85:192: ends with images of 192 pixels, but --size is 224; use --size 192, or",
        ),
        (("--size-schedule", "0-128"), "size schedule '0-128': '0-128' is not a point"),
        (("--micro-batch-schedule", "128:8"), "--micro-batch-schedule 128:8: requires --size-schedule"),
        (("--size-schedule", "0:128,85:224", "--micro-batch-schedule", "96:8"), "images never have 96 pixels"),
        (("--min-strength", "1.5"), "--min-strength 1.5: expected a number from 0 to 1"),
        (("--eval-size", "16"), "--eval-size 16: expected a whole number from 32"),
    ],
)
def test_contradictory_options_are_rejected(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(["--data", "x", *options])


def test_a_schedule_that_does_not_fit_the_run_is_rejected(digits: Path) -> None:
    with pytest.raises(UserError, match="16e:96 is beyond the last of the 4 epochs"):
        feed(digits, "--size", "96", "--size-schedule", "0e:32,16e:96")
    with pytest.raises(PlanError, match="images of 64 pixels: micro-batch 5 does not divide the 16 rows of a rank"):
        feed(digits, *SCHEDULE, "--micro-batch-schedule", "64:5")


def test_a_last_size_that_no_step_has_is_a_warning(digits: Path) -> None:
    found = feed(digits, "--size", "96", "--size-schedule", "0:32,100:32,100:96")
    assert any("no step has images of --size 96; the last ones have 32 pixels" in line for line in found.advice())
    assert not any("no step has" in line for line in feed(digits, *SCHEDULE).advice())


def test_memory_is_checked_for_the_largest_batches(digits: Path) -> None:
    check_batches_fit(feed(digits, *SCHEDULE))
    huge = ("--size", "96", "--size-schedule", "0:32,50:8192,75:96")
    with pytest.raises(UserError, match="--size 8192: 1,024 images per rank"):
        check_batches_fit(feed(digits, *huge, "--global-batch", "1024"))
    with pytest.raises(UserError, match="evaluation step"):
        check_batches_fit(feed(digits, "--size", "96", "--eval-size", "8192", "--eval-batch", "1024"))


def test_submitted_jobs_use_processes_that_every_micro_batch_allows() -> None:
    recipe = parse(["--data", "x", "--global-batch", "64", *SCHEDULE, "--micro-batch-schedule", "32:32"])
    assert fits(recipe, Submit(nodes="1-2", gpus_per_node=2)) == [(1, 1, 2), (2, 1, 2)]
    with pytest.raises(SubmitError, match="images of 32 pixels: micro-batch 32 does not divide the 16 rows of a rank"):
        fits(recipe, Submit(nodes="2", gpus_per_node=2))


def test_the_dry_run_lists_sizes_steps_and_micro_batches(digits: Path, tmp_path: Path) -> None:
    schedule = (*SCHEDULE, "--micro-batch-schedule", "32:16", "--eval-size", "128", "--out", str(tmp_path))
    found = feed(digits, *schedule)
    run = {"kind": "train", "time": 1.0, "step": 1, "epoch": 1, "lr": 0.1, "steps": 1, "seconds": 1.0, "data_wait": 0.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(run | {"images_per_second": 360.0, "size": 64}) + "\n")
    execution = Execution.of(found.recipe, CPU_WORLD.device, accumulation=4, ranks=1)
    table = describe_run(found, build_model(found.recipe, found.classes), execution)
    shown = " ".join(table.replace("│", " ").split())
    assert "32 pixels: steps 1 to 89, 1 x 16 images per rank, strength 0.50" in shown
    assert "64 pixels: steps 90 to 223, 4 x 4 images per rank, strength 0.75" in shown
    assert "96 pixels: steps 224 to 356, 4 x 4 images per rank, strength 1.00" in shown
    assert "images of 128 pixels" in shown
    assert "G per image of 32 pixels" in shown
    # 89 steps of a quarter, 134 of the measured and 133 of 2.25 times the pixels, each of 16 images
    hours = (89 / 4 + 134 + 133 * 2.25) * 16 / 360 / 3600
    assert f"{4 / hours:.2f} epochs per hour" in shown
    assert "at the last measured throughput of 360 images/s of 64 pixels" in shown


def test_the_eta_counts_the_pixels_of_the_remaining_steps() -> None:
    line = {
        **dict.fromkeys(("loss", "grad_norm", "images_per_second", "data_wait", "memory_bytes", "skipped"), 0),
        **{"replaced": 0, "lr": 0.1, "first_step_seconds": None, "steps": 10, "seconds": 10.0},
    }
    view = View(total_steps=100, sizes=((0, 32), (50, 64)), step=10)
    view.update(line, 16)
    assert view.eta == pytest.approx(40 + 50 * 4)
    assert "32 pixels" in view.line()
    view.step = 60
    view.update(line | {"seconds": 40.0}, 16)
    assert view.eta == pytest.approx(40 * 4)
    assert "64 pixels" in view.line()
    plain = View(total_steps=100, step=10)
    plain.update(line, 16)
    assert plain.eta == pytest.approx(90)
    assert "pixels" not in plain.line()
