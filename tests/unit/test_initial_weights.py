"""`--weights` takes a run or a file, and the log says what was loaded (launch/engine/build.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fat
from launch.config.model import ModelConfig
from launch.config.recipe import Recipe
from launch.engine.build import build_model
from launch.engine.initial_weights import load_initial_weights
from launch.run.weights_files import best_weights_file
from shards.errors import UserError

FOLDERS = ["cat", "dog", "owl"]
TENSORS = 487  # of fat_b0


def write(path: Path, value: float, *, folders: list[str] = FOLDERS, **facts: object) -> None:
    """Write weights of fat_b0 whose classifier has a constant bias."""
    model = fat.create_model("fat_b0", num_classes=len(folders))
    torch.nn.init.constant_(model.head.bias, value)
    fat.save_weights(model, path, info=fat.WeightsInfo(classes=fat.ClassList.of(folders), **facts))


def loaded(path: Path, **options: object) -> tuple[float, list[str]]:
    """Return the classifier's bias after loading, and the messages."""
    recipe = Recipe(model=ModelConfig(weights=path, **options))
    model = build_model(recipe, len(FOLDERS))
    messages = load_initial_weights(model, recipe, fat.ClassList.of(FOLDERS), file_of_run=best_weights_file)
    return model.head.bias[0].item(), messages


def test_run_folder_stands_for_its_most_accurate_weights(tmp_path: Path) -> None:
    write(tmp_path / "weights-last.safetensors", 1.0, step=40)
    assert loaded(tmp_path)[0] == 1.0
    write(tmp_path / "weights-best.safetensors", 2.0, step=20, top1=0.75)
    write(tmp_path / "weights-ema-last.safetensors", 3.0, step=40, top1=0.95, ema=True)
    assert loaded(tmp_path)[0] == 2.0
    write(tmp_path / "weights-ema-best.safetensors", 4.0, step=1000, top1=0.875, ema=True)
    bias, messages = loaded(tmp_path)
    assert bias == 4.0
    assert messages == [
        f"loaded {TENSORS} of {TENSORS} tensors from {tmp_path / 'weights-ema-best.safetensors'} (step 1,000, top-1 "
        "87.50%, moving average (EMA))",
        f"{tmp_path / 'weights-ema-best.safetensors'}: classifier: kept; the 3 classes are the same",
    ]


def test_messages_name_what_was_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    write(path, 1.0, folders=["cat", "cow"])
    bias, (first, second) = loaded(path)
    assert bias != 1.0
    assert first == f"loaded {TENSORS - 2} of {TENSORS} tensors from {path}; not loaded: head.weight, head.bias"
    assert "classifier: newly initialized, because the weights have other classes" in second


def test_random_backbone_that_is_not_trained_is_warned_about() -> None:
    recipe = Recipe(model=ModelConfig(freeze_backbone=True))
    (message,) = load_initial_weights(
        build_model(recipe, 3), recipe, fat.ClassList.of(FOLDERS), file_of_run=best_weights_file
    )
    assert message == "warning: --freeze-backbone without --weights: the backbone keeps its random weights"


@pytest.mark.parametrize("kind", ["missing", "empty folder", "no weights", "other model"])
def test_invalid_weights_are_rejected_in_one_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    if kind == "empty folder":
        path = tmp_path
    elif kind == "no weights":
        path.write_text("text")
    elif kind == "other model":
        fat.save_weights(fat.create_model("fat_b1", num_classes=3), path)
    with pytest.raises(UserError) as refused:
        loaded(path)
    assert str(refused.value).startswith("--weights")
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)
