"""`pipeline look`: the contact sheet of sources, augmented images, captions and PIL's reference images."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from launch.cli import main as pipeline
from pipeline import look
from pipeline.augment.recipe import augment_recipe
from pipeline.decode.job import DecodeError
from pipeline.loader import EvalLoader
from pipeline.look import Cell, Look, contact_sheet, source_image
from pipeline.plan import EvalPlan
from pipeline.storage.placement import open_storage
from pipeline.storage.reader import SampleReader
from shards.format.dataset import ShardSet
from tests.support.serving import serve

CPU = torch.device("cpu")


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """The cells of the contact sheets that the test draws."""
    drawn: list[Cell] = []

    def record(cells: list[Cell]) -> Image.Image:
        drawn.extend(cells)
        return contact_sheet(cells)

    monkeypatch.setattr(look, "contact_sheet", record)
    return drawn


def test_each_cell_shows_source_and_augmented_image_and_names_the_operations(
    photos: Path, tmp_path: Path, cells: list[Cell]
) -> None:
    out = tmp_path / "sheet.png"
    assert pipeline(["look", str(photos), "--augment", "fat", "--size", "96", "--count", "8", "--out", str(out)]) == 0
    assert len(cells) == 8
    classes = {entry.title for entry in ShardSet(photos).manifest.classes}
    for cell in cells:
        assert [panel.shape for panel in cell.panels] == [(96, 96, 3)] * 2
        name, _, sample = cell.title.partition(" #")
        assert name in classes
        assert sample.isdigit()
        assert not np.array_equal(*cell.panels)
    assert {word for cell in cells for word in re.findall(r"flip|erase|[A-Z]\w+", cell.operations)} > {"flip", "erase"}
    with Image.open(out) as sheet:
        assert 0.5 < sheet.width / sheet.height < 2
        assert sheet.width >= 2 * 96


def test_diff_shows_the_pil_reference_and_its_difference(photos: Path, tmp_path: Path, cells: list[Cell]) -> None:
    out = str(tmp_path / "sheet.png")
    assert (
        pipeline(["look", str(photos), "--augment", "fat", "--size", "96", "--count", "12", "--diff", "--out", out])
        == 0
    )
    for cell in cells:
        _, ours, reference = cell.panels
        mean, most = re.findall(r"differs by ([\d.]+) levels on average, (\d+) at most", cell.title)[0]
        error = np.abs(ours.astype(int) - reference)
        assert float(mean) == pytest.approx(error.mean(), abs=0.01)
        assert int(most) == error.max()
    # The median, because Equalize and AutoContrast (applied to a minority) amplify the difference between decoders.
    assert np.median([np.abs(cell.panels[1].astype(int) - cell.panels[2]).mean() for cell in cells]) < 1


def test_the_crop_window_is_drawn_into_the_source(photos: Path, tmp_path: Path, cells: list[Cell]) -> None:
    Look(str(photos), out=tmp_path / "sheet.png", size=96, count=4).run()
    for cell in cells:
        before = cell.panels[0].reshape(-1, 3)
        assert (before == look.WINDOW_COLOR).all(axis=1).sum() > 4 * 10


def test_images_of_another_split_are_those_of_an_evaluation(photos: Path, tmp_path: Path, cells: list[Cell]) -> None:
    out = str(tmp_path / "sheet.png")
    arguments = ["look", str(photos), "--split", "val", "--size", "64", "--crop-pct", "0.5", "--count", "5"]
    assert pipeline([*arguments, "--out", out]) == 0
    dataset = ShardSet(photos)
    count = min(5, dataset.split("val").samples)
    assert len(cells) == count
    normal = augment_recipe("none", size=64)
    with EvalLoader(
        dataset, EvalPlan(count, batch=count), size=64, crop_pct=0.5, mean=normal.mean, std=normal.std, device=CPU
    ) as loader:
        expected = look.denormalized(next(iter(loader)).images.numpy(), normal)
    for cell, pixels in zip(cells, expected, strict=True):
        assert np.array_equal(cell.panels[1], pixels)
        assert cell.operations == "center crop"
        drawn = np.argwhere((cell.panels[0] == look.WINDOW_COLOR).all(axis=-1))
        top, left, bottom, right = *drawn.min(axis=0), *drawn.max(axis=0)
        assert abs(top + bottom - 63) <= 2, "the window is centered"
        assert abs(left + right - 63) <= 2
        assert abs((bottom - top) - (right - left)) <= 2, "and square"


def test_only_training_images_can_be_compared_with_pil(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sheet.png"
    assert pipeline(["look", str(photos), "--split", "val", "--diff", "--out", str(out)]) == 2
    assert "--diff with --split val: only training images are augmented; omit --diff" in capsys.readouterr().err
    assert not out.exists()


def test_long_captions_are_wrapped_to_the_width_of_their_cell() -> None:
    panel = np.zeros((96, 96, 3), np.uint8)
    short, long = Cell([panel] * 2, "cat #1", "plain"), Cell([panel] * 2, "cat #1", "Rotate -26.4°, " * 8)
    assert contact_sheet([long] * 4).width == contact_sheet([short] * 4).width
    assert contact_sheet([long] * 4).height > contact_sheet([short] * 4).height


def test_look_works_on_a_remote_set(digits: Path, tmp_path: Path, cells: list[Cell]) -> None:
    with serve(digits) as site:
        Look(site.url, out=tmp_path / "sheet.png", size=64, count=4, cache=tmp_path / "cache").run()
    assert len(cells) == 4


def test_only_jpegs_are_given_to_pillow(photos: Path) -> None:
    """Pillow would call other programs for some formats: Ghostscript for EPS."""
    dataset = ShardSet(photos)
    with SampleReader(open_storage(dataset, "train")) as reader:
        encoded = reader.read(np.arange(2))
    assert source_image(encoded, 0).mode == "RGB"
    for content in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", b"", b"GIF89a"):
        encoded.images[1] = np.frombuffer(content, np.uint8)
        with pytest.raises(DecodeError, match="sample 1 could not be decoded"):
            source_image(encoded, 1)


def test_a_count_of_zero_is_rejected(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline(["look", str(digits), "--count", "0"]) == 2
    assert "--count 0" in capsys.readouterr().err
