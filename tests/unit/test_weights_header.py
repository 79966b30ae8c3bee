"""The metadata in the header of a weights file: every field is stored, and checked when it is read."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import nn, zeros

import fat
from fat.weights.header import CLASSES_KEY, CONFIG_KEY, TRAINING_KEY, WeightsInfo

CONFIG = fat.FATConfig(widths=(16, 16, 16, 16), depths=(1, 1, 1, 1), heads=(1, 1, 1, 1), num_classes=3, drop_path=0.0)
COMPLETE = WeightsInfo(
    config=CONFIG,
    classes=fat.ClassList.of(["0", "1", "10"], ["crane", "crane", None]),
    model="fat_b0",
    size=64,
    crop_pct=0.9,
    interpolation="bicubic",
    mean=(0.5, 0.4, 0.3),
    std=(0.1, 0.2, 0.3),
    step=400,
    top1=0.75,
    ema=True,
    recipe="0123456789abcdef",
    version="fat-pipeline 0.1.0",
)


def test_every_field_is_stored(tmp_path: Path) -> None:
    assert all(getattr(COMPLETE, field.name) is not None for field in dataclasses.fields(WeightsInfo))
    fat.save_weights(fat.FAT(CONFIG), tmp_path / "a.safetensors", info=COMPLETE)
    assert fat.read_info(tmp_path / "a.safetensors") == COMPLETE


def test_a_model_that_is_not_a_fat_has_no_config(tmp_path: Path) -> None:
    info = dataclasses.replace(COMPLETE, model="timm/resnet18")
    fat.save_weights(nn.Linear(2, 3), tmp_path / "a.safetensors", info=info)
    assert fat.read_info(tmp_path / "a.safetensors") == dataclasses.replace(info, config=None)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("model", ("", "a\nb", "x" * 301, 3)),
        ("size", (31, 8193, 64.0, True, "64")),
        ("crop_pct", (0, 1.1, float("nan"), True, "0.9")),
        ("interpolation", ("", 2)),
        ("mean", (0.5, [0.5, 0.5], [0.5, 0.5, "0.5"], [0.5, 0.5, float("inf")], [0.5, 0.5, 1e9], {"r": 1})),
        ("std", ([0.2, 0.2, 0.0], [0.2, -0.2, 0.2], [0.2] * 4)),
        ("step", (-1, 1.5, 10**16, True)),
        ("top1", (-0.1, 1.5, float("nan"))),
        ("ema", (0, "true")),
        ("recipe", ("\x1b[2J", 5)),
        ("version", ("", ["fat"])),
        ("unknown", (1,)),
    ],
)
def test_an_invalid_field_is_named(tmp_path: Path, name: str, values: tuple[object, ...]) -> None:
    path = tmp_path / "a.safetensors"
    shown = "top1" if name == "unknown" else name  # of an unknown field, the known ones are listed
    for value in values:
        save_file({"x": zeros(1)}, path, {TRAINING_KEY: json.dumps({name: value})})
        with pytest.raises(ValueError, match=rf"a\.safetensors: {TRAINING_KEY} .*{shown}"):
            fat.read_info(path)


@pytest.mark.parametrize("key", [CONFIG_KEY, CLASSES_KEY, TRAINING_KEY])
@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000])
def test_text_that_is_not_the_expected_json_is_refused(tmp_path: Path, key: str, text: str) -> None:
    save_file({"x": zeros(1)}, tmp_path / "a.safetensors", {key: text})
    with pytest.raises(ValueError, match=key):
        fat.read_info(tmp_path / "a.safetensors")


def test_permissions_are_those_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        fat.save_weights(nn.Linear(2, 3), tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640
