"""RUN/recipe.json: validation, and options that a resumed run inherits if they are not set (saved_recipe.py)."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.config.command_line import parse
from launch.config.recipe import Recipe
from launch.machine.world import World
from launch.run.saved_recipe import SavedRun, inherit_options, read_previous_start, read_saved_run
from shards.errors import UserError

HERE, CORES = "a GPU", 8
GIVEN = ("--compile", "off", "--optimizer-impl", "foreach", "--read-threads", "7", "--preallocate-width", "640")


def saved(folder: Path, *options: str, device: str = HERE, cores: int = CORES) -> SavedRun:
    engine = {"zero": 0, "precision": "fp32", "world": 1, "device": device, "cores": cores}
    content = {"recipe": parse([*options, "--data", "x"]).to_dict(), "engine": engine}
    (folder / "recipe.json").write_text(json.dumps(content))
    return read_saved_run(folder)


def performance(recipe: Recipe) -> tuple[object, ...]:
    loader = recipe.data.loader
    return recipe.compile.compile, recipe.compile.optimizer_impl, loader.read_threads, loader.dali.preallocate_width


def test_unset_options_are_inherited(tmp_path: Path) -> None:
    recipe, messages = inherit_options(parse([]), saved(tmp_path, *GIVEN), HERE, CORES)
    assert performance(recipe) == ("off", "foreach", 7, 640)
    assert messages == [
        "from the run's recipe.json: --compile off, --optimizer-impl foreach, --read-threads 7, --preallocate-width 640"
    ]


def test_options_that_are_set_are_kept(tmp_path: Path) -> None:
    given = parse(["--compile", "cudagraphs", "--read-threads", "3"])
    recipe, messages = inherit_options(given, saved(tmp_path, *GIVEN), HERE, CORES)
    assert performance(recipe) == ("cudagraphs", "foreach", 3, 640)
    assert messages == ["from the run's recipe.json: --optimizer-impl foreach, --preallocate-width 640"]


def test_options_unset_in_both_stay_unset(tmp_path: Path) -> None:
    recipe = parse([])
    assert inherit_options(recipe, saved(tmp_path), HERE, CORES) == (recipe, [])


def test_other_options_are_not_inherited(tmp_path: Path) -> None:
    options = ("--lr", "1", "--stop-after", "3", "--save-every", "2", "--drop-path", "0.5", "--hw-decoder-load", "0.5")
    recipe = parse([])
    assert inherit_options(recipe, saved(tmp_path, *options), HERE, CORES) == (recipe, [])


@pytest.mark.parametrize(
    ("device", "cores", "expected"),
    [("another", CORES, (None, None, None, None)), (HERE, 4, ("off", "foreach", None, None))],
)
def test_options_of_another_machine_are_not_inherited(
    tmp_path: Path, device: str, cores: int, expected: tuple[object, ...]
) -> None:
    before = saved(tmp_path, *GIVEN, device=device, cores=cores)
    recipe, messages = inherit_options(parse([]), before, HERE, CORES)
    assert performance(recipe) == expected
    if device != HERE:
        assert messages == [
            "note: the run began on another; its recipe.json is ignored for --compile off, --optimizer-impl foreach"
        ]


def test_damaged_recipe_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{}")
    found, messages = read_previous_start(tmp_path, World(0, 1, 0, 1, torch.device("cpu")))
    assert found is None
    assert len(messages) == 1
    assert messages[0].startswith(f"warning: {tmp_path}/recipe.json: invalid recipe")


DESCRIPTION: dict[str, Any] = {
    "recipe": Recipe().to_dict(),
    "engine": {"zero": 0, "precision": "fp32", "world": 1, "device": "cpu", "cores": 2},
}


def changed(*path: str, value: Any) -> str:
    content = copy.deepcopy(DESCRIPTION)
    section = content
    for name in path[:-1]:
        section = section[name]
    section[path[-1]] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        ("{}", "Field required"),
        ("[]", "should be an object"),
        ("", "Invalid JSON"),
        ("{" * 100_000, "Invalid JSON"),
        ("x" * (2 << 20), "more than the 1,048,576"),
        (changed("recipe", "model", "variant", value="b9"), "recipe.model.variant: Input should be 'b0'"),
        (changed("recipe", "data", "size", value=-3), "recipe.data.size: Input should be greater than or equal to 32"),
        (changed("recipe", "data", "size", value=1e300), "recipe.data.size"),
        (changed("recipe", "data", "crop_pct", value="x"), "recipe.data.crop_pct"),
        (changed("recipe", "optim", "warmup_epochs", value=300), "--warmup-epochs 300: must be less than --epochs 300"),
        (changed("recipe", "run", "extra", value=1), "recipe.run.extra"),
    ],
)
def test_invalid_recipe_json_is_rejected_in_one_line(tmp_path: Path, content: str, fact: str) -> None:
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(UserError) as refused:
        read_saved_run(tmp_path)
    shown = str(refused.value)
    assert fact in shown
    assert shown.startswith(f"{tmp_path}/recipe.json: invalid recipe (")
    assert "\n" not in shown


def test_folder_without_recipe_json_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recipe\.json: cannot be read \(No such file.*\); use a run folder"):
        read_saved_run(tmp_path)


@pytest.mark.parametrize("options", [("--memory-cache", "2"), ("--decode", "window")])
def test_a_cache_on_the_gpu_is_not_inherited_if_the_options_contradict_it(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    cached = ("--gpu-cache", "3", "--decode", "whole")
    recipe, _ = inherit_options(parse([*options]), saved(tmp_path, *cached), HERE, CORES)
    assert recipe == parse([*options])
    recipe, messages = inherit_options(parse([]), saved(tmp_path, *cached), HERE, CORES)
    assert recipe.data.loader.dali.gpu_cache == 3
    assert messages == ["from the run's recipe.json: --gpu-cache 3.0"]
