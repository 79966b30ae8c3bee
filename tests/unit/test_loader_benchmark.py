"""benchmarks/loader.py: missing libraries, and the work that all loaders have in common."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import loader
from benchmarks.loaders import threads, torch_workers, work
from tests.support.vision_libraries import vision_libraries  # noqa: F401 - a fixture

JPEG = Path(__file__).parents[1] / "data" / "one.jpg"


@pytest.fixture
def photos(tmp_path: Path) -> work.Photos:
    folder = tmp_path / "photos" / "train" / "class"
    folder.mkdir(parents=True)
    (folder / "one.JPEG").write_bytes(JPEG.read_bytes())
    return work.Photos(tmp_path / "photos", tmp_path / "photos-shards")


OTHERS = (
    *(threads.spdl_ffmpeg, threads.grain, torch_workers.mosaicml, torch_workers.litdata, torch_workers.webdataset),
    torch_workers.torchvision,
)


@pytest.mark.parametrize("start", OTHERS)
def test_a_loader_whose_library_is_missing_is_a_row_with_the_reason(
    photos: work.Photos, monkeypatch: pytest.MonkeyPatch, start: loader.Maker
) -> None:
    monkeypatch.setattr(work, "FOLDERS", [])
    for name in ("spdl.io", "grain", "streaming", "litdata", "webdataset", "torchvision.transforms.v2"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed

    def ones() -> Iterator[int]:
        yield 1

    found, missing = loader.installed({"present": ones, "missing": partial(start, photos)})
    assert found == {"present": ones}
    assert missing["missing"].startswith("ModuleNotFoundError: import of ")


def test_missing_rows_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"rate": 1000.0, "cpu": 0.001}
    result = {"machine": {"cpu": "some CPU", "cores": 2, "load": 0.0}, "medians": {"ours, DALI": figures}}
    loader.show(result | {"not_installed": {"Grain": "no module"}})
    shown = capsys.readouterr().out
    assert "ours, DALI                  1000 images/s    1000 us of CPU per image" in shown
    assert "Grain                    not installed (no module)" in shown


@pytest.mark.usefixtures("vision_libraries")
def test_python_loaders_return_normalized_images() -> None:
    work.transform.cache_clear()
    image = work.load(JPEG.read_bytes())
    work.transform.cache_clear()
    assert (image.shape, image.dtype) == ((3, work.SIZE, work.SIZE), torch.float32)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (work.RECIPE.mean, work.RECIPE.std))
    pixels = (image * std + mean) * 255
    torch.testing.assert_close(pixels, pixels.round().clamp(0, 255), rtol=0, atol=1e-3)


def test_every_photo_has_the_label_of_its_folder(photos: work.Photos) -> None:
    other = photos.files / "train" / "a"
    other.mkdir()
    (other / "two.JPEG").write_bytes(b"")
    assert [path.name for path in photos.paths] == ["two.JPEG", "one.JPEG"]
    assert photos.labels == [0, 1]
