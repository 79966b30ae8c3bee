"""Train a model with Hugging Face accelerate.

    accelerate launch --num_processes 8 examples/train_accelerate.py imagenet-shards --epochs 90

`accelerator.prepare` gets the model and the optimizer, but not the loader, which already delivers this process's part
of each batch on its device. `register_for_checkpointing` makes `save_state` and `load_state` include its position.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator

import fat
from pipeline import train_loader


def main(options: argparse.Namespace) -> None:
    accelerator = Accelerator()
    with train_loader(
        options.data,
        global_batch=options.global_batch,
        size=options.size,
        augment="fat",
        label_smoothing=0.1,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        device=accelerator.device,
    ) as loader:
        model = fat.create_model(options.model, num_classes=loader.num_classes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.05)
        model, optimizer = accelerator.prepare(model, optimizer)
        accelerator.register_for_checkpointing(loader)
        if options.checkpoint.exists():
            accelerator.load_state(options.checkpoint)
        for epoch in range(loader.epoch, options.epochs):
            for batch in loader:
                with accelerator.autocast():
                    loss = F.cross_entropy(model(batch.images), batch.targets)
                optimizer.zero_grad()
                accelerator.backward(loss)
                optimizer.step()
            accelerator.save_state(options.checkpoint)
            accelerator.print(f"epoch {epoch + 1} of {options.epochs}: loss {loss.item():.3f}", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="shard set: a folder or a URL")
    parser.add_argument("--model", choices=fat.list_models(), default="fat_b0")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--global-batch", type=int, default=1024, help="images per step, over all processes")
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoint"), help="folder")
    main(parser.parse_args())
