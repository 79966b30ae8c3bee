"""Small sources for tests: folders and tars of different JPEGs."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def jpeg(seed: int, size: int = 40) -> bytes:
    """Return a JPEG of coarse noise, which is neither black nor of a single color."""
    noise = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return encoded(Image.fromarray(noise).resize((size, size), Image.Resampling.NEAREST))


def encoded(image: Image.Image, kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def class_folders(root: Path, classes: Mapping[str, int], first: int = 0) -> Path:
    """Write CLASS/N.jpg for N below the number of images of each class; another `first` gives other images."""
    for c, (name, images) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for i in range(images):
            (root / name / f"{i}.jpg").write_bytes(jpeg(first + 1000 * c + i))
    return root


def labeled_tar(path: Path, labels: list[int], others: Mapping[str, bytes] | None = None) -> Path:
    """Write a tar with one sample per label, and additional members."""
    members = {f"{i}.{suffix}": data for i, label in enumerate(labels) for suffix, data in _sample(i, label)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in (members | dict(others or {})).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def _sample(number: int, label: int) -> list[tuple[str, bytes]]:
    return [("jpg", jpeg(number)), ("cls", b"%d" % label)]


def folders(root: Path) -> Path:
    """Write two classes with three images each into train/."""
    return class_folders(root / "train", {"cat": 3, "dog": 3}).parent


def tars(root: Path) -> Path:
    """Write two tars with five labeled images in total."""
    labeled_tar(root / "a.tar", [0, 1, 1])
    return labeled_tar(root / "b.tar", [1, 0]).parent
