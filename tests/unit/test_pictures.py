"""Pictures of a run: thumbnails and contact sheets, whose failures never end a run."""

from __future__ import annotations

import io
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from launch.config.command_line import parse
from launch.engine.loss import SampleResults, evaluate_batches
from launch.feed import Feed
from launch.machine.world import World
from launch.monitor.pictures import (
    FIRST_BATCH_NAME,
    HARDEST_NAME,
    batch_captions,
    save_evaluation,
    save_first_batch,
    thumbnails,
)
from launch.run.evaluation_record import RECORD_NAME, EvaluationInfo, read_evaluation
from shards.format.dataset import ShardSet
from tests.support.commands import run_pipeline
from tests.support.damage import flip_a_bit

INFO = EvaluationInfo(step=1, weights="weights", outputs=10)


@dataclass
class Run:
    """A run folder, and what `save_evaluation` needs."""

    path: Path
    feed: Feed

    def evaluate(self, *, last: bool = True) -> list[str]:
        """Write the record of a model that always predicts class 3; return warnings."""
        samples = SampleResults()
        with self.feed.eval_loader(dtype=torch.float32) as loader:
            assert loader is not None
            for _ in evaluate_batches(
                lambda images: torch.eye(10)[3].expand(len(images), 10) * 9,
                loader,
                device=torch.device("cpu"),
                precision="fp32",
                samples=samples,
            ):
                pass
        return save_evaluation(self.path, self.feed, samples, INFO, last=last)


def run_of(data: Path, folder: Path, *options: str) -> Run:
    recipe = parse(["--data", str(data), "--size", "32", "--global-batch", "64", "--out", str(folder), *options])
    return Run(folder, Feed.of(recipe, World(0, 1, 0, 1, torch.device("cpu"))))


def picture(jpeg: bytes | None) -> Image.Image:
    assert jpeg is not None
    return Image.open(io.BytesIO(jpeg))


def test_record_and_pictures_of_an_evaluation(digits: Path, tmp_path: Path) -> None:
    run = run_of(digits, tmp_path)
    assert run.evaluate() == []
    record = read_evaluation(tmp_path)
    assert record is not None
    assert record.ids.tolist() == list(range(360))
    assert record.labels.tolist() == ShardSet(digits).index("val")["label"].tolist()
    assert set(record.predictions.tolist()) == {3}
    assert all(picture(image.jpeg).size == (64, 64) for image in record.hardest)
    assert len(record.thumbnails) == 24
    assert Image.open(tmp_path / HARDEST_NAME).width > 640


def test_thumbnail_shows_the_sample(photos: Path) -> None:
    dataset = ShardSet(photos)
    rows = dataset.index("train")
    for sample, jpeg in thumbnails(dataset, "train", [5, 0, 17]).items():
        size, found = (int(rows["width"][sample]), int(rows["height"][sample])), picture(jpeg)
        assert min(found.size) <= 96
        assert max(found.size) <= 192
        assert found.width / found.height == pytest.approx(size[0] / size[1], rel=0.05)
        with (dataset.path / dataset.split("train").shards[int(rows["shard"][sample])].name).open("rb") as file:
            file.seek(int(rows["offset"][sample]))
            source = Image.open(io.BytesIO(file.read(int(rows["size"][sample])))).convert("RGB").resize(found.size)
        assert np.abs(np.asarray(source, float) - np.asarray(found, float)).mean() < 6  # levels: the filters differ


@pytest.mark.parametrize("mode", ["raw", "jpg"])
def test_thumbnails_of_a_beton_file(mode: str, digits: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    for split in ("train", "val"):
        for name in ("a", "b"):
            (images / split / name).mkdir(parents=True)
            Image.new("RGB", (40, 20), (200, 100, 0)).save(images / split / name / "x.jpg", quality=95)
    run_pipeline("shard", images, "--out", tmp_path / "set", "--format", "ffcv", "--write-mode", mode)
    found = picture(thumbnails(ShardSet(tmp_path / "set"), "val", [1])[1])
    assert found.size == (40, 20)
    assert np.abs(np.asarray(found, float) - (200, 100, 0)).max() < 8


def test_bad_sample_has_no_thumbnail(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "set")
    flip_a_bit(tmp_path / "set", 7, "val")
    assert thumbnails(ShardSet(tmp_path / "set"), "val", [6, 7, 8]).keys() == {6, 8}


def test_failures_are_warnings(digits: Path, tmp_path: Path) -> None:
    run = run_of(digits, tmp_path)
    (tmp_path / RECORD_NAME).mkdir()
    (warning,) = run.evaluate()
    assert warning.startswith(f"warning: {tmp_path / RECORD_NAME}: not written (")
    (tmp_path / FIRST_BATCH_NAME).mkdir()
    with run.feed.train_loader(step=0, dtype=torch.float32) as loader:
        (warning,) = save_first_batch(tmp_path, run.feed, next(loader))
    assert warning.startswith(f"warning: {tmp_path / FIRST_BATCH_NAME}: not written (")


def test_evaluation_without_a_sheet_removes_that_of_an_earlier_one(digits: Path, tmp_path: Path) -> None:
    for options, last, drawn in (((), False, 24), (("--loader", "synthetic"), True, 0)):
        (tmp_path / HARDEST_NAME).touch()
        assert run_of(digits, tmp_path, *options).evaluate(last=last) == []
        record = read_evaluation(tmp_path)
        assert record is not None
        assert len(record.ids) == 360
        assert len(record.thumbnails) == drawn
        assert not (tmp_path / HARDEST_NAME).exists()


def test_first_batch_shows_the_mixed_images_and_is_not_drawn_for_synthetic_ones(digits: Path, tmp_path: Path) -> None:
    run = run_of(digits, tmp_path, "--augment", "fat")
    with run.feed.train_loader(step=0, dtype=torch.float32) as loader:
        batch = next(loader)
    assert batch.lam is not None
    lam = torch.tensor([1.0, 1.0, 0.7, 0.3])
    few = replace(batch, labels=torch.tensor([0, 1, 0, 2]), lam=lam)
    assert batch_captions(few, ["ant", "bee"]) == ["ant", "bee", "70% ant, 30% output 2", "30% output 2, 70% ant"]
    assert batch_captions(replace(few, lam=None), ["ant", "bee"]) == ["ant", "bee", "ant", "output 2"]
    assert save_first_batch(tmp_path, run.feed, batch) == []
    assert Image.open(tmp_path / FIRST_BATCH_NAME).width > 4 * 128
    (tmp_path / FIRST_BATCH_NAME).unlink()
    assert save_first_batch(tmp_path, run.feed.with_loader(loader="synthetic"), batch) == []
    assert not (tmp_path / FIRST_BATCH_NAME).exists()
