"""The recipes of this project (launch/recipes/): headers, values, and `pipeline recipes`."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from benchmarks.recipe_hours import RECIPES, hours
from launch.cli import main as pipeline
from launch.config.command_line import parse, shipped_recipes
from launch.config.recipe import Recipe
from launch.engine.build import config_of
from launch.optim.schedule import lr_schedule
from launch.recipes.header import read_header

NAMES = tuple(shipped_recipes())


def test_the_recipes_are_there() -> None:
    assert {"digits", "large_batch", *RECIPES} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_recipe_is_valid_and_its_header_has_the_command_that_uses_it(name: str) -> None:
    recipe, header = parse(["--recipe", name]), read_header(shipped_recipes()[name])
    program, *arguments = shlex.split(header.command)
    assert program == "pipeline"
    training = arguments[arguments.index("--") + 1 :]
    assert training[:2] == ["--recipe", name]
    named = parse(training)
    assert dataclasses.replace(named, run=recipe.run, data=recipe.data) == recipe
    assert named.run.out.name == name


@pytest.mark.parametrize("name", RECIPES)
def test_expected_hours_are_those_of_the_measured_rates(name: str) -> None:
    expected, header = hours(parse(["--recipe", name])), read_header(shipped_recipes()[name])
    number, _, conditions = header.hours.partition(" ")
    assert conditions.startswith("on 8 H200 (computed); ")
    assert float(number) == pytest.approx(expected, rel=0.06)


def test_the_recipe_of_the_paper_has_the_default_values() -> None:
    paper, default = parse(["--recipe", "fat_b0_300"]), parse([])
    # Options whose default is None, which stands for these values.
    written_out = {
        "model": {"variant", "drop_path"},
        "data": {"crop_scale", "flip", "rand_augment", "erase", "mixup", "cutmix"},
        "optim": {"lr", "schedule", "warmup_lr", "min_lr", "warmup_epochs"},
    }
    for section, values in paper.to_dict().items():
        others = default.to_dict()[section]
        differing = {name for name, value in values.items() if value != others[name]}
        assert differing == written_out.get(section, set())
        assert all(others[name] is None for name in differing)
    assert meaning(paper) == meaning(default)


def meaning(recipe: Recipe) -> dict[str, Any]:
    """Return what the options of `written_out` mean."""
    rate = lr_schedule(recipe.optim, global_batch=recipe.data.global_batch, steps_per_epoch=10)
    return {
        "model": config_of(recipe, 10),
        "augmentation": recipe.data.augmentation(),
        "rates": [rate(step) for step in range(10 * recipe.optim.epochs)],
    }


def test_recipes_are_listed_with_their_expectations(capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline(["recipes"]) == 0
    shown = capsys.readouterr().out
    rows = [re.split("  +", line) for line in shown.splitlines() if not line.startswith(" ")]
    assert [row[0] for row in rows] == ["recipe", *NAMES]
    assert ["fat_b0_88", "88", "160 to 192, eval 224", "0.27 on 8 H200 (computed)", "not trained yet"] in rows
    for name in NAMES:
        assert read_header(shipped_recipes()[name]).summary in shown


def test_a_recipe_is_printed_with_its_comments(capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline(["recipes", "digits"]) == 0
    assert capsys.readouterr().out == shipped_recipes()["digits"].read_text()
    assert pipeline(["recipes", "digit"]) == 2
    assert "digit: no such recipe; did you mean digits? (expected one of digits, " in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["Source", "Hours", "Accuracy", "Command"])
def test_incomplete_headers_are_rejected(missing: str, tmp_path: Path) -> None:
    lines = shipped_recipes()["digits"].read_text().splitlines()
    path = tmp_path / "recipe.toml"
    path.write_text("\n".join(line for line in lines if not line.startswith(f"# {missing}:")))
    with pytest.raises(ValueError, match="expected a summary and the fields Source, Hours, Accuracy, Command"):
        read_header(path)
