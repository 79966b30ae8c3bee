"""Values that error messages suggest are valid: a user who follows a message gets no second error."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from launch.config.command_line import parse
from launch.engine.execution import Execution
from launch.engine.sync_batchnorm import check_values_per_channel, convert_sync_batchnorm
from launch.feed import Feed
from launch.machine.world import World
from launch.optim.schedule import lr_schedule
from pipeline.batch_shape import BatchShape, PlanError, check_enough_samples
from shards.errors import UserError

IMAGES = 37
LIGHT = ("--augment", "light")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 37 training images, without a validation split."""
    from PIL import Image

    from shards.convert.convert import convert
    from shards.convert.options import Options

    folder = tmp_path_factory.mktemp("tiny")
    for number in range(IMAGES):
        path = folder / "source" / "train" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number, 9, 9)).save(path)
    convert(folder / "source", folder / "set", Options())
    return folder / "set"


def checked(data: Path, options: Sequence[str], ranks: int) -> None:
    """Run all checks, except that of memory, that training runs before it creates the run folder."""
    recipe = parse(["--data", str(data), "--size", "64", *options])
    world = World(0, ranks, 0, ranks, torch.device("cpu"))
    feed = Feed.of(recipe, world)
    check_values_per_channel(recipe, recipe.data.size, feed.shape.micro_rows, world)
    Execution.of(recipe, world.device, accumulation=feed.shape.accumulation, ranks=ranks)


def replaced(options: Sequence[str], name: str, *values: str) -> list[str]:
    """Return the options with another value of one of them."""
    left = list(options)
    if name in left:
        at = left.index(name)
        del left[at : at + 2]
    return [*left, name, *values]


# Options, number of ranks, pattern that finds the suggested value in the error message, option of that value.
BATCH, MICRO, LANES = "--global-batch", "--micro-batch", "--lanes"
ADVICE = [
    ((), 1, r"global batch of at most (\d+)", BATCH),
    ((), 4, r"global batch of at most (\d+)", BATCH),
    (LIGHT, 1, r"global batch of at most (\d+)", BATCH),
    (LIGHT, 5, r"global batch of at most (\d+)", BATCH),
    ((MICRO, "6"), 2, r"global batch of at most (\d+)", BATCH),
    ((LANES, "7"), 1, r"global batch of at most (\d+)", BATCH),
    ((LANES, "5", *LIGHT), 2, r"global batch of at most (\d+)", BATCH),
    ((BATCH, "37"), 1, r"nearest valid size: (\d+)", BATCH),
    ((BATCH, "31"), 4, r"nearest valid size: (\d+)", BATCH),
    ((BATCH, "1"), 2, r"nearest valid size: (\d+)", BATCH),
    ((BATCH, "36", MICRO, "5"), 1, r"nearest that do: (\d+)", MICRO),
    ((BATCH, "36", MICRO, "5"), 1, r"nearest that do: \d+ and (\d+)", MICRO),
    ((BATCH, "36", LANES, "4"), 1, r"nearest that do: (\d+)", LANES),
    ((BATCH, "36", LANES, "4"), 1, r"nearest that do: \d+ and (\d+)", LANES),
    ((*LIGHT, BATCH, "1", "--size", "32"), 1, r"--size (\d+) or more", "--size"),
    ((BATCH, "4", "--epochs", "3", "--warmup-epochs", "5"), 1, r"use at most ([\d.]+)", "--warmup-epochs"),
    ((BATCH, "4", "--lock-wait", "9999"), 1, r"at most (\d+)", "--lock-wait"),
    ((BATCH, "4", "--classes", "1"), 1, r"use at least (\d+)", "--classes"),
    ((BATCH, "4", "--zero", "1", "--memory-format", "channels-last"), 1, r"use --zero (\d)", "--zero"),
    ((BATCH, "4", "--zero", "3", "--compile", "default"), 1, r"use --zero (\d)", "--zero"),
    ((BATCH, "4", "--zero", "3", "--compile", "default"), 1, r"or --compile (\w+)", "--compile"),
    ((BATCH, "4", "--compile", "cudagraphs"), 1, r"use --compile (\w+)", "--compile"),
    ((BATCH, "4", "--bad-samples", "skip"), 1, r"such as (skip:\d+)", "--bad-samples"),
    ((BATCH, "4", "--rand-augment", "m9"), 1, r"as in (rand-[\w.-]+)", "--rand-augment"),
]


@pytest.mark.parametrize(("options", "ranks", "pattern", "option"), ADVICE)
def test_values_suggested_by_an_error_are_valid(
    tiny: Path, options: tuple[str, ...], ranks: int, pattern: str, option: str
) -> None:
    with pytest.raises(UserError) as refused:
        checked(tiny, options, ranks)
    found = re.search(pattern, str(refused.value))
    assert found, refused.value
    checked(tiny, replaced(options, option, found[1]), ranks)


@pytest.mark.parametrize(("micro", "wanted"), [(None, "2 and 4"), (8, "2 and 4"), (16, "2 and 4"), (32, "2")])
def test_suggested_world_sizes_also_fit_the_micro_batch(micro: int | None, wanted: str) -> None:
    with pytest.raises(PlanError, match=f"nearest world sizes that do: {wanted}$") as refused:
        BatchShape(global_batch=64, world=3, micro_batch=micro)
    for world in re.findall(r"\d+", str(refused.value).rpartition(":")[2]):
        BatchShape(global_batch=64, world=int(world), micro_batch=micro)


def test_error_if_no_global_batch_is_valid() -> None:
    with pytest.raises(PlanError, match="multiple of 64, so use more images, fewer ranks"):
        check_enough_samples(IMAGES, 128, world=32, pairs=True)


@pytest.mark.parametrize("world", [6, 8])
def test_suggested_group_sizes_divide_the_world_size(world: int) -> None:
    ranks = World(0, world, 0, world, torch.device("cpu"))
    with pytest.raises(UserError, match="nearest that do") as refused:
        convert_sync_batchnorm(torch.nn.Identity(), "group:5", ranks)
    for size in re.findall(r"\d+", str(refused.value).rpartition(":")[2]):
        assert world % int(size) == 0


# -- short trainings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [1, 3, 30, 100, 200, 300, 1000])
def test_default_warmup_is_valid_for_any_number_of_epochs(tiny: Path, epochs: int) -> None:
    recipe = parse(["--data", str(tiny), "--global-batch", "2", "--epochs", str(epochs)])
    assert recipe.optim.warmup == (20 if epochs >= 300 else pytest.approx(epochs / 20))
    steps = 18
    rate = lr_schedule(recipe.optim, global_batch=recipe.data.global_batch, steps_per_epoch=steps)
    peak = recipe.optim.rates(recipe.data.global_batch)[1]
    # Exactly the peak, except with the schedule of the released code.
    expected = pytest.approx(peak, rel=0.02) if epochs == 300 else peak
    assert max(rate(step) for step in range(epochs * steps)) == expected


def test_long_warmup_is_warned_about(tiny: Path) -> None:
    world = World(0, 1, 0, 1, torch.device("cpu"))
    paper = ("--schedule", "cosine-from-start", "--epochs", "30")

    def lines(*options: str) -> list[str]:
        return Feed.of(parse(["--data", str(tiny), "--global-batch", "4", *options]), world).advice()

    (found,) = [line for line in lines(*paper, "--warmup-epochs", "20") if "--warmup-epochs" in line]
    assert "drops to 25% of --lr after warm-up; use at most 3, or --schedule cosine" in found
    for options in (paper, (*paper, "--warmup-epochs", "3"), ("--epochs", "30", "--warmup-epochs", "20"), ()):
        assert not [line for line in lines(*options) if "--warmup-epochs" in line]


def test_missing_validation_split_is_warned_about(tiny: Path, digits: Path) -> None:
    world = World(0, 1, 0, 1, torch.device("cpu"))
    for data, warned in ((tiny, True), (digits, False)):
        lines = Feed.of(parse(["--data", str(data), "--global-batch", "4"]), world).advice()
        assert any("has no validation split: nothing is evaluated" in line for line in lines) is warned
