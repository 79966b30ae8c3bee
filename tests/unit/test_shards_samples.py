"""The sample sources: real images, reproducible, with sizes like ImageNet's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from shards.commands.command_line import SampleDigits, SamplePhotos
from shards.errors import UserError


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.JPEG")}


def test_digits_are_complete_and_split_by_class(tmp_path: Path) -> None:
    SampleDigits(tmp_path / "digits").run()
    paths = sorted((tmp_path / "digits").rglob("*.JPEG"))
    digits = load_digits()
    assert sorted(int(path.stem.split("_")[1]) for path in paths) == list(range(len(digits.target)))
    counts = {split: Counter(path.parent.name for path in paths if split in path.parts) for split in ("train", "val")}
    assert {split: sum(count.values()) for split, count in counts.items()} == {"train": 1437, "val": 360}
    for name, total in Counter(path.parent.name for path in paths).items():
        assert abs(counts["val"][name] - total * 360 / 1797) < 1
    for path in paths[::50]:
        number = int(path.stem.split("_")[1])
        assert path.parent.name.startswith(str(digits.target[number]))
        with Image.open(path) as image:
            assert image.size == (64, 64)
            small = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float)
        assert np.corrcoef(small.ravel(), digits.images[number].ravel())[0, 1] > 0.95, "the image shows the same digit"


def test_sample_sources_are_reproducible(tmp_path: Path) -> None:
    for name in ("one", "other"):
        SampleDigits(tmp_path / name / "digits").run()
        SamplePhotos(tmp_path / name / "photos", count=40, seed=3).run()
    assert files(tmp_path / "one") == files(tmp_path / "other")
    SamplePhotos(tmp_path / "third", count=40, seed=4).run()
    assert not set(files(tmp_path / "third").values()) & set(files(tmp_path / "one" / "photos").values())


def test_photos_have_sizes_like_imagenet(tmp_path: Path) -> None:
    SamplePhotos(tmp_path, count=300).run()
    found = files(tmp_path)
    assert len(found) == len(set(found.values())) == 300
    assert sum(name.startswith("val/") for name in found) == 30
    assert 80_000 < np.mean([len(data) for data in found.values()]) < 130_000
    sizes = Counter()
    for path in tmp_path.rglob("*.JPEG"):
        with Image.open(path) as image:
            sizes[max(image.size)] += 1
    assert sizes[500] > 0.7 * 300
    assert len(sizes) > 4


def test_every_class_is_in_both_splits(tmp_path: Path) -> None:
    SamplePhotos(tmp_path, count=26).run()
    classes = [sorted(path.name for path in (tmp_path / split).iterdir()) for split in ("train", "val")]
    assert classes[0] == classes[1]
    with pytest.raises(UserError, match="--count 25: at least 26 images are required"):
        SamplePhotos(tmp_path / "more", count=25).run()


def test_existing_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    for sample in (SampleDigits(tmp_path), SamplePhotos(tmp_path, count=40)):
        with pytest.raises(UserError, match="not empty"):
            sample.run()
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
