"""The recipe and its command line (launch/config/recipe.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.config.command_line import parse
from launch.config.errors import RecipeError
from launch.config.model import ModelConfig
from launch.config.recipe import Recipe
from launch.resilience.watchdog import LAST_RESORT_SECONDS
from shards.errors import UserError


def test_defaults_are_the_paper_s_recipe() -> None:
    recipe = parse(["--variant", "b3"])
    assert recipe == Recipe(model=ModelConfig(variant="b3"))
    augment = recipe.data.augmentation()
    assert (augment.rand_augment, augment.erase, augment.mixup, augment.cutmix) == (
        "rand-m9-mstd0.5-inc1", 0.25, 0.8, 1.0,
    )  # fmt: skip
    assert recipe.optim.epochs == 300
    assert recipe.optim.rates(recipe.data.global_batch) == pytest.approx((1e-6, 1e-3, 1e-5))


def test_options_override_the_file_and_the_file_overrides_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text(
        "[data]\nglobal_batch = 96\nflip = 0\n[optim]\nepochs = 7\nwarmup_epochs = 1\n[parallel]\nzero = 2\n"
    )
    recipe = parse(["--recipe", str(file), "--variant", "b2", "--global-batch", "48"])
    assert recipe.model.variant == "b2"
    assert (recipe.data.global_batch, recipe.data.flip, recipe.optim.epochs, recipe.parallel.zero) == (48, 0.0, 7, 2)


def test_later_recipe_files_override_earlier_ones(tmp_path: Path) -> None:
    first, second = tmp_path / "base.toml", tmp_path / "tuned.toml"
    first.write_text("[data.loader]\nread_threads = 8\nread_ahead = 6\n[compile]\ncompile = 'off'\n")
    second.write_text("[data.loader]\nread_threads = 16\n[compile]\noptimizer_impl = 'foreach'\n")
    recipe = parse(["--recipe", str(first), "--recipe", str(second), "--read-ahead", "3"])
    assert (recipe.data.loader.read_threads, recipe.data.loader.read_ahead) == (16, 3)
    assert (recipe.compile.compile, recipe.compile.optimizer_impl) == ("off", "foreach")


def test_recipe_is_serializable_as_json() -> None:
    recipe = parse(["--data", "x", "--crop-scale", "0.1", "0.5"]).to_dict()
    written = json.loads(json.dumps(recipe))
    assert written["data"]["data"] == "x"
    assert written["data"]["crop_scale"] == [0.1, 0.5]
    assert written.keys() == recipe.keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[data]\nglobal_batsh = 3", "data.global_batsh: Unexpected keyword argument, found 3; --help lists"),
        ("data = 3", "data: .* found 3; --help lists the options of each section"),
        ("[data]\nglobal_batch = 'many'", "global_batch: Input should be a valid integer, found 'many'"),
        ("[optim]\nepochs = 5\nwarmup_epochs = 9", "warmup-epochs 9: must be less than --epochs 5"),
        ("[data", "not a readable TOML"),
    ],
)
def test_invalid_recipe_file_is_rejected_with_the_reason(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "r.toml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=message):
        parse(["--recipe", str(file)])


def test_missing_recipe_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe file"):
        parse(["--recipe", str(tmp_path / "none.toml")])


@pytest.mark.parametrize("args", [["--zero", "7"], ["--variant", "b9"], ["--epochs", "x"]])
def test_invalid_values_end_with_status_2(args: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        parse(args)
    assert error.value.code == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [(["--flip", "2"], "flip"), (["--rand-augment", "rand-m99"], "rand-m99"), (["--crop-scale", "1", "0.5"], "scale")],
)
def test_invalid_augmentation_is_rejected(args: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(args).data.augmentation()


def test_help_shows_the_fields_docstrings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        parse(["--help"])
    assert error.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Images per optimizer step, over all ranks." in shown
    assert "--recipe" in shown
    assert "(default: 5e-4 x global batch / 512)" in shown
    assert "None = " not in shown
    assert "(default: None)" not in shown


def test_data_falls_back_to_the_environment_then_to_the_default_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FAT_DATA", raising=False)
    with pytest.raises(RecipeError, match=r"neither --data nor FAT_DATA is set, and .* does not exist; use --data SET"):
        parse([]).data.location()
    (tmp_path / "imagenet-shards").mkdir()
    assert parse([]).data.location() == Path("imagenet-shards")
    monkeypatch.setenv("FAT_DATA", "/elsewhere")
    assert parse([]).data.location() == Path("/elsewhere")
    assert parse(["--data", "here"]).data.location() == Path("here")


@pytest.mark.parametrize(
    ("options", "seconds"),
    [([], 420), (["--hang-timeout", "60"], 180), (["--hang-timeout", "7200"], 1740), (["--lock-wait", "0"], 0)],
)
def test_default_lock_wait(options: list[str], seconds: float) -> None:
    recipe = parse(options)
    assert recipe.checkpoint.lock_seconds(recipe.watchdog.hang_timeout) == seconds


@pytest.mark.parametrize("options", [[], ["--hang-timeout", "60"]])
def test_lock_wait_is_longer_than_the_watchdog_of_a_hanging_trainer(options: list[str]) -> None:
    recipe = parse(options)
    timeout = recipe.watchdog.hang_timeout
    assert recipe.checkpoint.lock_seconds(timeout) > timeout + LAST_RESORT_SECONDS
