"""Class folders of a few images in all kinds of files, and a small model that tells them apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data as photographs

import fat
from tests.support.tiny_fat import TINY

CLASSES = ("0", "1", "10", "2")
INFO = fat.WeightsInfo(
    classes=fat.ClassList.of(CLASSES, ["crane", "crane", None, "tench"]),
    model="fat_tiny",
    size=64,
    crop_pct=0.875,
    interpolation="bicubic",
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.3, 0.25),
    step=7,
)
KINDS = {".jpg": "RGB", ".jpeg": "L", ".png": "RGB", ".gif": "P"}
RIDGE = 1e-2  # relative to the mean variance of a feature
SIZES = ((300, 200), (64, 64), (40, 330), (97, 150), (33, 50))  # (height, width); the third is resized in part


def write_images(folder: Path) -> Path:
    """Write train/CLASS/* and val/CLASS/*: 4 classes, 5 images each in JPEG, PNG and GIF files."""
    photos = [photographs.chelsea(), photographs.coffee(), photographs.astronaut(), photographs.rocket()]
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, photo in zip(CLASSES, photos, strict=True):
            (folder / split / name).mkdir(parents=True)
            for number, (height, width) in enumerate(SIZES):
                y, x = (random.integers(0, side - crop + 1) for side, crop in zip(photo.shape, SIZES[0], strict=False))
                suffix = list(KINDS)[number % len(KINDS)]
                crop = Image.fromarray(photo[y : y + SIZES[0][0], x : x + SIZES[0][1]]).resize((width, height))
                crop.convert(KINDS[suffix]).save(folder / split / name / f"{number}{suffix}")
    return folder


def write_weights(path: Path, images: Path | None = None, info: fat.WeightsInfo = INFO) -> fat.FAT:
    """Write the weights of a small model; its classifier separates the classes of `images`, but not perfectly."""
    torch.manual_seed(0)
    model = fat.FAT(fat.FATConfig(**TINY.to_dict() | {"num_classes": len(CLASSES)})).eval()
    transform = fat.ImageTransform.of(info)
    if images is not None:
        files = sorted(images.glob("train/*/*"))
        batch = torch.stack([transform(Image.open(file)) for file in files])
        target = torch.tensor([[file.parent.name == name for name in CLASSES] for file in files]).float()
        with torch.no_grad():
            features = model.forward_head(model.forward_features(batch), pre_logits=True)
            center = features.mean(dim=0)
            # Ridge regression: without the penalty, weights are so large that rounding errors decide predictions.
            varied = (features - center).double()
            penalty = RIDGE * varied.square().sum() / varied.shape[1] * torch.eye(varied.shape[1])
            weight = torch.linalg.solve(varied.T @ varied + penalty, varied.T @ target.double()).T.float()
            model.head.weight.copy_(weight)
            model.head.bias.copy_(-(weight @ center))
    fat.save_weights(model, path, info=info)
    return model
