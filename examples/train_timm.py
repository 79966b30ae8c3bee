"""Train a model of timm on a shard set, and evaluate it after every epoch.

    python examples/train_timm.py imagenet-shards --model resnet50 --epochs 90

The program needs timm, but no other library of Hugging Face's training tools, and no DataLoader.
"""

from __future__ import annotations

import argparse

import timm
import torch
import torch.nn.functional as F

from pipeline import EvalLoader, eval_loader, train_loader


def main(options: argparse.Namespace) -> float:
    """Train; return the top-1 accuracy of the last epoch."""
    with (
        train_loader(
            options.data,
            batch_size=options.batch_size,
            size=options.size,
            augment=options.augment,
            label_smoothing=0.1,
            epochs=options.epochs,
        ) as train,
        eval_loader(options.data, batch_size=options.batch_size, size=options.size) as val,
    ):
        model = timm.create_model(options.model, num_classes=train.num_classes).to(train.device)
        model = model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9, weight_decay=5e-5, nesterov=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, options.lr, epochs=options.epochs, steps_per_epoch=len(train)
        )
        accuracy = 0.0
        for epoch in range(options.epochs):
            for batch in train:
                with torch.autocast(train.device.type, torch.bfloat16, enabled=train.device.type == "cuda"):
                    loss = F.cross_entropy(model(batch.images), batch.targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            accuracy = evaluate(model, val)
            print(f"epoch {epoch + 1} of {options.epochs}: top-1 {accuracy:.2%}", flush=True)
        return accuracy


@torch.no_grad()
def evaluate(model: torch.nn.Module, loader: EvalLoader) -> float:
    """Return the top-1 accuracy. Targets are -100 in rows that only fill the last batch."""
    model.eval()
    counts = torch.zeros(2, device=loader.device)
    for batch in loader:
        correct = model(batch.images).argmax(dim=1) == batch.targets
        counts += torch.stack([correct.sum(), batch.mask.sum()])
    model.train()
    return (counts[0] / counts[1]).item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="shard set: a folder or a URL")
    parser.add_argument("--model", default="resnet50", help="a name from timm.list_models()")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--augment", choices=("fat", "light", "none"), default="fat")
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--lr", type=float, default=0.5)
    main(parser.parse_args())
