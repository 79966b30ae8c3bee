"""Options that select samples and normalize them, from the command line to the batches of a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fat
from launch.config.command_line import parse
from launch.evaluated_model import load_model
from launch.feed import Feed
from launch.machine.world import World
from launch.resume.fingerprint import fingerprint
from shards.convert.convert import convert
from shards.convert.options import Options
from shards.errors import UserError
from shards.format.dataset import ShardSet
from tests.support.commands import run_pipeline
from tests.support.launching import TRAIN, lines, python
from tests.support.sources import class_folders
from tests.support.tiny_fat import TINY

CPU = World(0, 1, 0, 1, torch.device("cpu"))
TWO = ("--classes-subset", "3_three,8_eight")
SMALL = ("--size", "32", "--global-batch", "16", "--augment", "none")


def feed(data: Path, *options: str) -> Feed:
    return Feed.of(parse(["--data", str(data), *SMALL, *options]), CPU)


def test_training_and_evaluation_normalize_with_the_mean_and_std_of_the_recipe(digits: Path) -> None:
    usual = feed(digits)
    other = feed(digits, "--mean", "0.5", "0.25", "0", "--std", "0.5", "0.25", "1")
    for make in (
        lambda feed: feed.train_loader(step=0, dtype=torch.float32),
        lambda feed: feed.eval_loader(dtype=torch.float32),
    ):
        images = []
        for each in (usual, other):
            with make(each) as loader:
                images.append(next(iter(loader)).images)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (usual.augment.mean, usual.augment.std))
        levels = images[0] * std + mean
        expected = (levels - torch.tensor([0.5, 0.25, 0]).view(3, 1, 1)) / torch.tensor([0.5, 0.25, 1]).view(3, 1, 1)
        torch.testing.assert_close(images[1], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        ("--mean", "0.5", "0.5", "1.5"),
        ("--std", "0", "0.5", "0.5"),
        ("--fraction", "0"),
        ("--fraction", "1.5"),
        ("--class-balance", "2"),
    ],
)
def test_values_out_of_range_are_rejected(options: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=f"{options[0]} .*: expected "):
        parse(["--data", "x", *options])


def test_a_run_cannot_resume_with_other_samples(digits: Path) -> None:
    """The classes are compared too, by name (`check_classes`)."""
    options = [
        (),
        ("--fraction", "0.5"),
        ("--class-balance", "1"),
        ("--class-balance", "0.5"),
        ("--mean", "0", "0", "0"),
    ]
    found = [fingerprint(each.recipe, each, teacher=None).fixed for each in (feed(digits, *each) for each in options)]
    assert all(one != other for i, one in enumerate(found) for other in found[:i])


def test_the_log_says_which_samples_are_used(digits: Path) -> None:
    assert feed(digits).advice() == []
    selected, balance = feed(digits, *TWO, "--fraction", "0.5", "--class-balance", "1").advice()
    assert selected == "selected 2 of 10 classes and 143 of 1,437 training images"
    assert balance.startswith("class balance 1: an epoch has 143 draws; an image is drawn 0.9")


def test_a_number_of_classes_smaller_than_a_global_batch_is_compared_with_the_selected_images(digits: Path) -> None:
    with pytest.raises(UserError, match="29 training images are fewer than one global batch of 64"):
        Feed.of(parse(["--data", str(digits), *TWO, "--fraction", "0.1", "--global-batch", "64"]), CPU)


@pytest.mark.slow
def test_a_run_of_two_classes_has_two_outputs_and_their_names(tmp_path: Path, digits: Path) -> None:
    run = tmp_path / "run"
    recipe = ("--recipe", "digits", *SMALL, *TWO, "--fraction", "0.25", "--class-balance", "0.5")
    command = (TRAIN, *recipe, "--data", digits, "--out", run, "--epochs", "2", "--warmup-epochs", "0.2")
    done = python(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    classes = load_model(run / "weights-last.safetensors").info.classes
    assert classes is not None
    assert classes.folders == ("3_three", "8_eight")
    assert json.loads((run / "recipe.json").read_text())["recipe"]["data"]["classes_subset"] == TWO[1]
    assert [line["samples"] for line in lines(run, "eval")] == [72, 72]
    refused = python(tmp_path, *command, "--classes-subset", "3_three,9_nine")
    assert refused.returncode == 2
    assert "saved by a run with other classes" in refused.stderr


@pytest.mark.slow
def test_a_test_split_is_kept_verified_shown_and_evaluated(tmp_path: Path) -> None:
    for number, (split, images) in enumerate({"train": 4, "valid": 3, "test": 2}.items()):
        class_folders(tmp_path / "in" / split, {"cat": images, "dog": images}, first=5000 * number)
    assert convert(tmp_path / "in", tmp_path / "set", Options()) is not None
    splits = {name: split.samples for name, split in ShardSet(tmp_path / "set").manifest.splits.items()}
    assert splits == {"train": 8, "val": 6, "test": 4}
    run_pipeline("verify", tmp_path / "set")
    run_pipeline("look", tmp_path / "set", "--split", "test", "--count", "2", "--out", tmp_path / "look.png")
    model = fat.create_model(replace(TINY, num_classes=2))
    classes = fat.ClassList.of(["cat", "dog"], [None, None])
    info = fat.WeightsInfo(config=model.config, classes=classes, size=32, crop_pct=0.875)
    fat.save_weights(model, tmp_path / "w.safetensors", info=info)
    done = python(
        tmp_path, "launch/evaluate.py", tmp_path / "w.safetensors", "--data", tmp_path / "set", "--split", "test"
    )
    assert done.returncode == 0, done.stderr
    assert "over 4 images" in done.stdout
