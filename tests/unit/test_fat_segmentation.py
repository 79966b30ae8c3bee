"""examples/segmentation.py trains a segmentation head on the feature maps."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch

import fat

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "segmentation.py"))


def test_a_segmentation_head_learns_on_the_features() -> None:
    losses, iou = EXAMPLE["train"](steps=16, batch=4)
    assert sum(losses[-3:]) < sum(losses[:3]) / 2
    assert iou > 0.5  # all background would give 0.27


def test_the_head_predicts_every_pixel_at_any_image_size() -> None:
    model = EXAMPLE["SemanticFPN"](fat.create_model("fat_b0", features_only=True), 3).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 97, 65)).shape == (1, 3, 97, 65)
