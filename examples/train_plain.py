"""Train a model with a plain PyTorch loop, on any number of processes.

    torchrun --nproc-per-node 8 examples/train_plain.py imagenet-shards --epochs 90

The same command resumes an interrupted training from its last checkpoint with the next batch, also on another number of
processes: every epoch contains each image once.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import fat
from pipeline import train_loader


def main(options: argparse.Namespace) -> None:
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    with train_loader(
        options.data, global_batch=options.global_batch, size=options.size, augment="fat", label_smoothing=0.1
    ) as loader:
        if loader.device.type == "cuda":
            torch.cuda.set_device(loader.device)
        model = fat.create_model(options.model, num_classes=loader.num_classes)
        model = DistributedDataParallel(model.to(loader.device, memory_format=torch.channels_last))
        optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.05)
        parts = {"model": model.module, "optimizer": optimizer, "loader": loader}
        if options.checkpoint.exists():
            saved = torch.load(options.checkpoint, map_location=loader.device)
            for name, part in parts.items():
                part.load_state_dict(saved[name])
        for epoch in range(loader.epoch, options.epochs):
            for batch in loader:
                loss = F.cross_entropy(model(batch.images), batch.targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                last = batch.position.step == len(loader) - 1
                if last or batch.position.step % options.save_every == options.save_every - 1:
                    save(options.checkpoint, parts)
            if loader.rank == 0:
                print(f"epoch {epoch + 1} of {options.epochs}: loss {loss.item():.3f}", flush=True)
    dist.destroy_process_group()


def save(path: Path, parts: dict) -> None:
    """Write the states of all parts on rank 0. An interrupted write leaves the previous checkpoint."""
    if dist.get_rank() == 0:
        unfinished = path.with_suffix(".unfinished")
        torch.save({name: part.state_dict() for name, part in parts.items()}, unfinished)
        os.replace(unfinished, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="shard set: a folder or a URL")
    parser.add_argument("--model", choices=fat.list_models(), default="fat_b0")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--global-batch", type=int, default=1024, help="images per step, over all processes")
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--save-every", type=int, default=500, help="steps")
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoint.pt"))
    main(parser.parse_args())
