"""A small source, and the sets made for speed that are converted from it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.storage.placement import open_storage
from pipeline.storage.reader import SampleReader
from shards.commands.command_line import SamplePhotos
from shards.convert.convert import convert
from shards.convert.options import Format, Options
from shards.format.beton import BetonOptions
from shards.format.dataset import ShardSet
from shards.images.rules import ImageRules
from shards.sources.scan import ScanOptions

SHORT_SIDE = 256
MADE_FOR_SPEED = {
    "shrunk": ImageRules(short_side=SHORT_SIDE),
    "pixels": ImageRules(pixels=True),
    "shrunk pixels": ImageRules(short_side=SHORT_SIDE, pixels=True),
}


def options(rules: ImageRules, form: Format = "tar", workers: int = 1) -> Options:
    return Options(
        shard_bytes=1_000_000,
        rules=rules,
        format=form,
        beton=BetonOptions(mode="raw"),
        scan=ScanOptions(workers=workers),
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "photos"
    SamplePhotos(folder, count=40).run()
    (folder / "train" / "cat" / "image.png").write_bytes(encoded(Image.new("RGB", (90, 60), (200, 90, 30)), "PNG"))
    return folder


@pytest.fixture(scope="module")
def sets(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same source as JPEGs of the original size, and as sets made for speed."""
    root = tmp_path_factory.mktemp("sets")
    for name, rules in {"original": ImageRules(), **MADE_FOR_SPEED}.items():
        convert(photos, root / name, options(rules))
    return {path.name: path for path in root.iterdir()}


def encoded(image: Image.Image, kind: str, **how: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stored(path: Path, split: str = "train", *, beton: bool = False) -> list[NDArray[np.uint8]]:
    """Return the stored bytes of all samples of a split."""
    shard_set = ShardSet(path)
    with SampleReader(open_storage(shard_set, split, beton=beton)) as reader:
        return reader.read(np.arange(shard_set.split(split).samples)).checked().images


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))
