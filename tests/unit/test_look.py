"""`pipeline look`: sources beside what the model gets, with words, and PIL's opinion."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.cli import main as pipeline
from pipeline import look
from pipeline.look import Cell, Look, contact_sheet
from shards.format.dataset import ShardSet
from tests.support.serving import serve


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """What is drawn."""
    drawn: list[Cell] = []

    def note(found: list[Cell]) -> Image.Image:
        drawn.extend(found)
        return contact_sheet(found)

    monkeypatch.setattr(look, "contact_sheet", note)
    return drawn


def test_each_sample_is_shown_before_and_after_with_what_was_done(
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
    assert {word for cell in cells for word in re.findall(r"flip|erase|[A-Z]\w+", cell.done)} > {"flip", "erase"}
    with Image.open(out) as sheet:
        assert 0.5 < sheet.width / sheet.height < 2
        assert sheet.width >= 2 * 96


def test_pils_result_stands_beside_ours_and_is_close(photos: Path, tmp_path: Path, cells: list[Cell]) -> None:
    out = str(tmp_path / "sheet.png")
    assert (
        pipeline(["look", str(photos), "--augment", "fat", "--size", "96", "--count", "12", "--diff", "--out", out])
        == 0
    )
    for cell in cells:
        _, ours, pils = cell.panels
        mean, most = re.findall(r"([\d.]+) levels away, (\d+) at most", cell.title)[0]
        away = np.abs(ours.astype(int) - pils)
        assert float(mean) == pytest.approx(away.mean(), abs=0.01)
        assert int(most) == away.max()
    # Equalize and AutoContrast stretch what decoders differ by; most samples see neither.
    assert np.median([np.abs(cell.panels[1].astype(int) - cell.panels[2]).mean() for cell in cells]) < 1


def test_the_crop_window_is_drawn_into_the_source(photos: Path, tmp_path: Path, cells: list[Cell]) -> None:
    Look(str(photos), out=tmp_path / "sheet.png", size=96, count=4).run()
    for cell in cells:
        before = cell.panels[0].reshape(-1, 3)
        assert (before == look.WINDOW_COLOUR).all(axis=1).sum() > 4 * 10


def test_captions_are_wrapped_into_their_cells() -> None:
    panel = np.zeros((96, 96, 3), np.uint8)
    short, long = Cell([panel] * 2, "cat #1", "plain"), Cell([panel] * 2, "cat #1", "Rotate -26.4°, " * 8)
    assert contact_sheet([long] * 4).width == contact_sheet([short] * 4).width
    assert contact_sheet([long] * 4).height > contact_sheet([short] * 4).height


def test_a_set_on_a_server_can_be_looked_at(digits: Path, tmp_path: Path, cells: list[Cell]) -> None:
    with serve(digits) as site:
        Look(site.url, out=tmp_path / "sheet.png", size=64, count=4, cache=tmp_path / "cache").run()
    assert len(cells) == 4


def test_no_images_is_refused(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline(["look", str(digits), "--count", "0"]) == 2
    assert "--count 0" in capsys.readouterr().err
