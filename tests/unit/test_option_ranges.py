"""Every numeric option has a range, and values outside of it are rejected in one line."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro
from pydantic import TypeAdapter, ValidationError

from launch.cli import Bench, Tune
from launch.cli import main as pipeline
from launch.config.command_line import parse
from launch.config.recipe import Recipe
from launch.engine.memory import check_batches_fit
from launch.engine.sync_batchnorm import check_values_per_channel
from launch.evaluate import Evaluate
from launch.evaluate import main as evaluate
from launch.feed import Feed
from launch.machine.world import World, connect
from launch.slurm.job import Submit
from launch.submit import main as submit
from launch.train import main as train
from pipeline.look import Look
from shards import memory
from shards.errors import UserError
from shards.memory import check_memory, machine_memory
from shards.ranges import check_ranges, ranges_of

ABSURD = (math.nan, math.inf, -math.inf, -1, -0.5, 0, 1e300, 10**30, -(10**30))
PATH = Path("x")


def sections(options: Any) -> Iterator[Any]:
    """Yield a dataclass of options and, recursively, the dataclasses in its fields."""
    yield options
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            yield from sections(value)


COMMANDS = (Recipe(), Evaluate(PATH), Submit(), Look("x"), Bench("x"), Tune("x"))
SECTIONS = {type(section): section for command in COMMANDS for section in sections(command)}
NUMBERS = [
    pytest.param(section, field.name, id=f"{kind.__name__}.{field.name}")
    for kind, section in SECTIONS.items()
    for field in dataclasses.fields(kind)
    if list(ranges_of(typing.get_type_hints(kind, include_extras=True)[field.name]))
]


def hint_of(section: Any, name: str) -> Any:
    return typing.get_type_hints(type(section), include_extras=True)[name]


def test_all_sections_are_tested() -> None:
    assert len(NUMBERS) > 60
    assert {"RunConfig", "OptimConfig", "DataConfig", "ModelConfig", "LoaderOptions", "DaliOptions"} < {
        kind.__name__ for kind in SECTIONS
    }


@pytest.mark.parametrize(("section", "name"), NUMBERS)
def test_every_number_has_a_lower_and_an_upper_bound(section: Any, name: str) -> None:
    for _, interval in ranges_of(hint_of(section, name)):
        assert interval is not None
        assert interval.ge is not None or interval.gt is not None
        assert interval.le is not None or interval.lt is not None


@pytest.mark.parametrize(("section", "name"), NUMBERS)
def test_numbers_out_of_range_are_rejected_with_the_option_s_name(section: Any, name: str) -> None:
    hint = hint_of(section, name)
    pair = isinstance(getattr(section, name), tuple) or "tuple" in str(hint)
    for number in ABSURD:
        value = (number, number) if pair else number
        changed, refused = section, ""
        try:
            changed = dataclasses.replace(section, **{name: value})
        except UserError as error:
            refused = f"status {error.exit_code}: {error}"
        if refused:
            # A value in range may still contradict other options, for example too few epochs for the warm-up.
            assert f"--{name.replace('_', '-')}" in refused or "augmentation: " in refused
            assert refused.startswith("status 2: ")
            assert "\n" not in refused
        else:
            assert math.isfinite(number)
            assert getattr(changed, name) == value
            check_ranges(changed)


@pytest.mark.parametrize(("section", "name"), NUMBERS)
def test_pydantic_checks_the_same_ranges(section: Any, name: str) -> None:
    """Pydantic parses recipe.json and TOML files."""
    adapter, hint = TypeAdapter(hint_of(section, name)), hint_of(section, name)
    kinds = [kind for kind, _ in ranges_of(hint)]
    for number in ABSURD:
        text = json.dumps([number] * len(kinds) if len(kinds) > 1 else number)
        try:
            value = adapter.validate_json(text, strict=True)
        except ValidationError:
            continue
        assert math.isfinite(number)
        assert value == (number if len(kinds) == 1 else (number,) * len(kinds))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--lr nan", "--lr nan: expected a number from 0 to 100"),
        ("--betas 2 3", "--betas 2 3: expected each a number from 0 and below 1"),
        ("--betas -1 0", "--betas -1 0: expected each a number from 0 and below 1"),
        ("--eps 0", "--eps 0: expected a number above 0 to 1"),
        ("--drop-path 1", "--drop-path 1: expected a number from 0 and below 1"),
        ("--seed -1", "--seed -1: expected a whole number from 0 and below 9,223,372,036,854,775,808"),
        ("--global-batch 10000000000", "--global-batch 10000000000: expected a whole number from 1 to 1,000,000"),
        ("--classes 0", "--classes 0: expected a whole number from 1 to 1,000,000"),
        ("--crop-scale 2 1", "--crop-scale 2 1: expected each a number from 1e-06 to 1"),
        ("--crop-scale 0.9 0.1", "augmentation: scale is (0.9, 0.1); expected 0 < low <= high <= 1"),
        ("--read-threads 100000", "--read-threads 100000: expected a whole number from 1 to 1,024"),
        ("--decode-threads 5000", "--decode-threads 5000: expected a whole number from 1 to 512"),
        ("--preallocate-width 65535 --preallocate-height 65535", "--preallocate-width 65535, --preallocate-h"),
        ("--cache-size nan", "--cache-size nan: expected a number above 0 to 1,000,000,000"),
        ("--sync-bn group:1000000000000", "--sync-bn group:1000000000000: expected auto, on, off or group"),
        ("--bad-samples skip:99999999999999999999", "--bad-samples skip:99999999999999999999: expected raise, or"),
        ("--rand-augment rand-m9-n100000", "RandAugment 'rand-m9-n100000': expected m up to 10, n up to 16, p up to 1"),
        ("--log-every " + "9" * 1000, "--log-every " + "9" * 60 + "...: expected a whole number from 1 to 100,000"),
    ],
)  # fmt: skip
def test_training_rejects_options_in_one_line_before_it_writes(
    options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *options.split(), "--out", str(tmp_path / "run"), "--data", "none"])
    assert train() == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {message}")
    assert shown.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "args", "message"),
    [
        (pipeline, "look SET --count 100000", "--count 100000: expected a whole number from 1 to 10,000"),
        (pipeline, "look SET --flip nan", "--flip nan: expected a number from 0 to 1"),
        (pipeline, "bench SET --steps 0", "--steps 0: expected a whole number from 1 to 1,000,000"),
        (pipeline, "tune SET --seconds inf", "--seconds inf: expected a number above 0 to 1,000,000"),
        (submit, "--warn-seconds 99999", "--warn-seconds 99999: expected a whole number from 0 to 65,535"),
        (submit, "--nodes 1-100000", "--nodes 1-100000: expected a number such as 4, or a range such as 2-8, of at"),
        (submit, "--time soon", "--time soon: expected a time as in sbatch, such as 24:00:00 or 2-12"),
        (evaluate, "w --limit 0", "--limit 0: expected a whole number from 1 to 1,000,000,000,000"),
        (evaluate, "w --size 16", "--size 16: expected a whole number from 32 to 8,192"),
        (evaluate, "w --crop-pct nan", "--crop-pct nan: expected a number from 0.1 to 1"),
    ],
)
def test_every_command_rejects_options_in_one_line(
    command: Any, args: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *args.split()])
    assert command() == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {message}")
    assert shown.count("\n") == 1


def test_recipe_file_is_checked_against_the_same_ranges(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    for text, message in (
        ("[optim]\nlr = nan", r"r.toml: optim.lr: Input should be .* found nan"),
        ("[data]\nglobal_batch = 10000000000", r"r.toml: data.global_batch: Input should be less than or equal to"),
        ("[data.loader]\nread_threads = 1.5", r"read_threads: Input should be a valid integer.*, found 1.5"),
        ("[optim]\nepochs = 5\nwarmup_epochs = 20", r"r.toml: --warmup-epochs 20: must be less than --epochs 5"),
        (
            "[preempt]\ntime_limit = 1979-05-27",
            r"preempt.time_limit: Input should be a valid number, found .1979-05-27",
        ),
        ("x = " + "[" * 5000, "not a readable TOML file"),
        ("x = " + "9" * 5000, "not a readable TOML file"),
        ("#" * (2 << 20), "2,097,152 bytes, more than the 1,048,576 bytes that are allowed"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            parse(["--recipe", str(file)])


def test_help_shows_plain_number_types(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(Evaluate, args=["--help"])
    assert "--batch INT" in capsys.readouterr().out


def test_one_value_per_channel_is_rejected() -> None:
    world = connect()

    def check(rows: int, *options: str) -> None:
        recipe = parse(["--size", "32", *options])
        check_values_per_channel(recipe, recipe.data.size, rows, world)

    with pytest.raises(UserError, match="--size 32: one image per forward pass gives BatchNorm one value per channel"):
        check(1)
    check(2)
    check(1, "--size", "33")
    check(1, "--freeze-bn")


# -- memory ------------------------------------------------------------------------------------------------------


def feed(data: Path, *options: str, world: World | None = None) -> Feed:
    recipe = parse(["--data", str(data), "--augment", "light", "--lanes", "1", *options])
    made = Feed.of(recipe, world or connect())
    check_batches_fit(made)
    return made


def test_batches_larger_than_the_machine_s_memory_are_rejected(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "machine_memory", lambda: 1 << 30)
    sizes = ("--size", "64", "--global-batch", "64")
    assert feed(digits, *sizes).shape.rank_rows == 64
    for more in (
        ("--size", "2048"),
        ("--size", "512", "--global-batch", "1024"),
        ("--eval-batch", "9000"),
        ("--eval-batch", "4000", "--ready", "64"),
        ("--eval-batch", "4000", "--decode-ahead", "64"),
    ):
        with pytest.raises(UserError, match=r"needs at least [\d.]+ GiB of memory, but this machine has 1.0 GiB; use"):
            feed(digits, *sizes, *more)
    # A step needs memory for the images of all its micro-batches, but for the activations of only one at a time.
    accumulated = ("--global-batch", "1024", "--micro-batch", "2", "--eval-batch", "2")
    assert feed(digits, *accumulated, "--size", "256")
    with pytest.raises(UserError, match="GiB of memory, "):
        feed(digits, *accumulated, "--size", "512")


def test_dry_run_only_warns_about_memory(
    digits: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "machine_memory", lambda: 1 << 30)
    options = ("--data", str(digits), "--augment", "light", "--size", "128", "--dry-run")
    monkeypatch.setattr(sys, "argv", ["train.py", *options])
    assert train() == 0
    assert (
        "warning: too large for this machine: --global-batch 1024, --size 128: 1,024 images per rank"
        in capsys.readouterr().out
    )


def test_memory_check_counts_all_ranks_of_the_machine(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "machine_memory", lambda: 1 << 30)
    sizes = ("--size", "256", "--global-batch", "64", "--micro-batch", "8", "--eval-batch", "8")
    one = connect()
    assert feed(digits, *sizes)
    with pytest.raises(UserError, match="GiB of memory, "):
        feed(digits, *sizes, world=dataclasses.replace(one, size=8, local_size=8))


def test_contact_sheet_larger_than_memory_is_rejected(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    huge = ("--count", "10000", "--size", "8192", "--out", str(tmp_path / "x.png"))
    assert pipeline(["look", str(digits), *huge]) == 2
    assert "--count 10000, --size 8192: needs at least 11,250.0 GiB of memory" in capsys.readouterr().err


def test_memory_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = machine_memory()
    limit = tmp_path / "memory.max"
    for text, expected in (("max\n", whole), ("1048576\n", 1 << 20)):
        limit.write_text(text)
        monkeypatch.setattr(memory, "_CGROUP_LIMITS", (tmp_path / "none", limit))
        assert machine_memory() == expected
    with pytest.raises(
        UserError, match=r"--a 3: needs at least 3\.0 GiB of memory, but this machine has 0\.0 GiB; use less"
    ):
        check_memory("--a 3", 3 << 30, "use less")
