"""Train a model with Lightning: a `LightningDataModule` of a shard set.

    python examples/lightning_datamodule.py imagenet-shards --epochs 90

A checkpoint of the Trainer contains the loader's position, so `trainer.fit(..., ckpt_path=...)` resumes with the next
batch.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F

import fat
from pipeline import Batch, EvalLoader, TrainLoader, eval_loader, open_set, train_loader


class ShardSetModule(lightning.LightningDataModule):
    """The training and validation batches of a shard set. The batches are already on the device of their process.

    Args:
        data: folder or URL of the shard set.
        batch_size: images per process and step.
        size: side of the images in pixels.
        augment: augmentation: fat, light or none.
        label_smoothing: label smoothing of the training targets.
    """

    def __init__(
        self, data: Path | str, *, batch_size: int, size: int = 224, augment: str = "fat", label_smoothing: float = 0.1
    ) -> None:
        super().__init__()
        self.data, self.batch_size, self.size = open_set(data), batch_size, size
        self.augment, self.label_smoothing = augment, label_smoothing
        self.num_classes = len(self.data.manifest.classes)

    def train_dataloader(self) -> TrainLoader:
        return train_loader(
            self.data,
            batch_size=self.batch_size,
            size=self.size,
            augment=self.augment,
            label_smoothing=self.label_smoothing,
            **self._process(),
        )

    def val_dataloader(self) -> EvalLoader:
        return eval_loader(self.data, batch_size=self.batch_size, size=self.size, **self._process())

    def _process(self) -> dict[str, Any]:
        trainer = self.trainer
        assert trainer is not None
        return {"rank": trainer.global_rank, "world": trainer.world_size, "device": trainer.strategy.root_device}

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch


class Classifier(lightning.LightningModule):
    """A model that maps images to logits, its loss and its accuracy."""

    def __init__(self, model: torch.nn.Module, lr: float = 1e-3) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch: Batch) -> torch.Tensor:
        loss = F.cross_entropy(self.model(batch.images), batch.targets)
        self.log("loss", loss, prog_bar=True, batch_size=len(batch.labels))
        return loss

    def on_validation_epoch_start(self) -> None:
        self.hits = torch.zeros(2, device=self.device)

    def validation_step(self, batch: Batch) -> None:
        correct = self.model(batch.images).argmax(dim=1) == batch.targets  # False where the mask is False
        self.hits += torch.stack([correct.sum(), batch.mask.sum()])

    def on_validation_epoch_end(self) -> None:
        hits = self.all_gather(self.hits).view(-1, 2).sum(dim=0)  # each image counts once, over all processes
        self.log("top1", hits[0] / hits[1], prog_bar=True, rank_zero_only=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.05)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="shard set: a folder or a URL")
    parser.add_argument("--model", choices=fat.list_models(), default="fat_b0")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=128, help="images per process and step")
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--resume", type=Path, help="checkpoint of an interrupted training")
    options = parser.parse_args()
    data = ShardSetModule(options.data, batch_size=options.batch_size, size=options.size)
    model = Classifier(fat.create_model(options.model, num_classes=data.num_classes))
    lightning.Trainer(max_epochs=options.epochs).fit(model, datamodule=data, ckpt_path=options.resume)
