"""The examples that train with Lightning and with timm's models."""

from __future__ import annotations

import argparse
import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from pipeline import Batch, train_loader
from tests.support.small_sets import cats_and_dogs
from tests.support.vision_libraries import vision_libraries  # noqa: F401

EXAMPLES = Path(__file__).parents[2] / "examples"
IMAGES, BATCH = 32, 8
STEPS = IMAGES // BATCH


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cats_and_dogs(tmp_path_factory.mktemp("images"), train=IMAGES)


@pytest.fixture(scope="module")
def lightning() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("lightning")


def fit(lightning: Any, images: Path, folder: Path, *, epochs: int, resume: Path | None = None) -> tuple[list, Any]:
    """Train with the example's modules; return position and ids of each batch, and the trainer."""
    example = runpy.run_path(str(EXAMPLES / "lightning_datamodule.py"))
    seen = []

    class Recorder(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
            seen.append((batch.position, batch.ids.tolist()))

    every_step = lightning.pytorch.callbacks.ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
    data = example["ShardSetModule"](images, batch_size=BATCH, size=32)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, data.num_classes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the number of workers of a DataLoader, among others
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            devices=1,
            callbacks=[Recorder(), every_step],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(example["Classifier"](model), datamodule=data, ckpt_path=resume)
    return seen, trainer


def test_lightning_resumes_with_the_next_batch(lightning: Any, images: Path, tmp_path: Path) -> None:
    with train_loader(images, batch_size=BATCH, size=32, epochs=2) as loader:
        expected = [(batch.position, batch.ids.tolist()) for batch in loader.stream()]
    seen, trainer = fit(lightning, images, tmp_path, epochs=2)
    assert seen == expected
    assert trainer.callback_metrics["top1"] in [pytest.approx(hits / 10) for hits in range(11)]
    for stopped in (STEPS + 2, STEPS):  # within an epoch, and after the last step of one
        seen, trainer = fit(lightning, images, tmp_path / "resumed", epochs=2, resume=tmp_path / f"step={stopped}.ckpt")
        assert seen == expected[stopped:]
        assert trainer.global_step == 2 * STEPS


@pytest.mark.usefixtures("vision_libraries")
def test_a_timm_model_is_trained_and_evaluated(images: Path) -> None:
    example = runpy.run_path(str(EXAMPLES / "train_timm.py"))
    options = {"model": "resnet10t", "size": 32, "batch_size": BATCH, "augment": "fat", "epochs": 1, "lr": 0.05}
    accuracy = example["main"](argparse.Namespace(data=images, **options))
    assert accuracy in [pytest.approx(hits / 10) for hits in range(11)], "each of the 10 validation images counts once"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("vision_libraries")
def test_a_timm_model_learns_the_digits(digits: Path) -> None:
    example = runpy.run_path(str(EXAMPLES / "train_timm.py"))
    options = {"model": "resnet10t", "size": 32, "batch_size": 48, "augment": "none", "epochs": 2, "lr": 0.05}
    assert example["main"](argparse.Namespace(data=digits, **options)) > 0.6
