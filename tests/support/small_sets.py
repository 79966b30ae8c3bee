"""Shard sets of a few small images."""

from __future__ import annotations

from pathlib import Path

from tests.support.commands import run_pipeline
from tests.support.sources import class_folders


def cats_and_dogs(folder: Path, *, train: int, val: int = 10) -> Path:
    """Create a shard set of two classes, with these even numbers of training and validation images of 40 pixels."""
    class_folders(folder / "images" / "train", {"cat": train // 2, "dog": train // 2})
    class_folders(folder / "images" / "val", {"cat": val // 2, "dog": val // 2}, first=100_000)
    run_pipeline("shard", folder / "images", "--out", folder / "set")
    return folder / "set"
