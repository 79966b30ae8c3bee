"""The work that all loaders do, and where their libraries and data are."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import simplejpeg
import torch
from torch import Tensor

from pipeline.augment.recipe import augment_recipe
from shards.cores import cores
from shards.format.dataset import ShardSet

BATCH, SIZE = 64, 224
# Until the pools of buffers have stopped growing: the first use of a buffer takes longer than to resize pixels into it.
WARM_UP = 48 * BATCH
RECIPE = augment_recipe("light", size=SIZE)
WORKERS = cores()
MANY_EPOCHS = 1000
# `make peers` installs the libraries in folders of their own, because some of them require older versions of others.
FOLDERS = [Path(sys.prefix) / name for name in ("peers", "vision")]


class NotInstalled(Exception):
    """The libraries of a loader cannot be imported; the message gives the reason."""


@dataclass(frozen=True)
class Photos:
    """The same JPEG files in several forms. Loaders of other projects add theirs in folders next to these."""

    files: Path
    """Folder with train/CLASS/*.JPEG."""
    shards: Path
    """Shard set of the files, as tars and, if FFCV is installed, as .beton."""

    @property
    def dataset(self) -> ShardSet:
        return ShardSet(self.shards)

    @property
    def tars(self) -> list[str]:
        dataset = self.dataset
        return [str(dataset.shard_path("train", i)) for i in range(len(dataset.split("train").shards))]

    @property
    def paths(self) -> list[Path]:
        return sorted((self.files / "train").glob("*/*.JPEG"))

    @property
    def labels(self) -> list[int]:
        names = sorted(path.name for path in (self.files / "train").iterdir())
        return [names.index(path.parent.name) for path in self.paths]

    def converted(self, name: str) -> Path:
        """Return the folder of another project's format."""
        return self.files.with_name(f"{self.files.name}-{name}")


def library(name: str) -> Any:
    """Import a module of another project.

    Raises:
        NotInstalled: it, or a library that it needs, is missing.
    """
    for folder in map(str, FOLDERS):
        if folder not in sys.path:
            sys.path.append(folder)  # last, so that libraries of the environment have precedence
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        raise NotInstalled(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error


@cache
def transform() -> Any:
    """Return torchvision's transforms of an image, uint8 [3, H, W] -> float32 [3, 224, 224].

    As torchvision's documentation recommends for speed: version 2, on uint8 tensors, converted to float32 at the end.
    """
    v2 = library("torchvision.transforms.v2")
    return v2.Compose(
        [
            v2.RandomResizedCrop(
                SIZE, RECIPE.scale, RECIPE.ratio, interpolation=v2.InterpolationMode.BICUBIC, antialias=True
            ),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(RECIPE.mean, RECIPE.std),
        ]
    )


def load(encoded: bytes) -> Tensor:
    """Decode a JPEG file with libjpeg-turbo, which torchvision uses too, and transform it."""
    image: Tensor = transform()(torch.from_numpy(simplejpeg.decode_jpeg(encoded)).permute(2, 0, 1))
    return image

