"""FAT as the backbone of object detection: torchvision's RetinaNet on `features_only`, trained on generated images.

    python examples/detection.py [--variant fat_b0] [--steps 100] [--weights FILE]

Prints the loss every 10 steps, and finally the fraction of the objects in new images that are found: about 0.7 after
one minute on a CPU, from random weights. Needs torchvision. To train on your own data set, replace `draw`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, box_iou
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import fat

CLASSES = ("background", "disc", "square")  # torchvision reserves label 0 for the background
Objects = dict[str, Tensor]
"""Of one image: `boxes`, float [objects, 4], as x1, y1, x2, y2 in pixels, and `labels`, int64 [objects]."""


class FATPyramid(nn.Module):
    """Feature pyramid of RetinaNet (arXiv 1708.02002): the maps of strides 8, 16 and 32, and two coarser ones.

    Maps images, float [B, 3, H, W], to a dict of five feature maps with `out_channels` channels.

    freeze_bn: let BatchNorm keep the running statistics of the loaded weights, since a detector's batches are small.
    """

    def __init__(self, backbone: fat.FATFeatures, out_channels: int = 128, freeze_bn: bool = False) -> None:
        super().__init__()
        self.backbone, self.out_channels, self.freeze_bn = backbone, out_channels, freeze_bn
        coarser = LastLevelP6P7(out_channels, out_channels)
        self.pyramid = FeaturePyramidNetwork(backbone.feature_info.channels(), out_channels, coarser)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.pyramid({f"stage{i}": x for i, x in enumerate(self.backbone(images))})

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.backbone.modules():
            if self.freeze_bn and isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def build(variant: str = "fat_b0", weights: Path | None = None, size: int = 96) -> RetinaNet:
    """Return a detector for images of about `size` pixels, float [3, H, W] with values from 0 to 1."""
    backbone = fat.create_model(variant, features_only=True, out_indices=(1, 2, 3), weights=weights)
    sides = [stride * 4 for stride in (8, 16, 32, 64, 128)]
    anchors = AnchorGenerator(tuple((a, int(a * 1.26), int(a * 1.59)) for a in sides), ((0.5, 1.0, 2.0),) * len(sides))
    mean, std = (backbone.pretrained_cfg[name] for name in ("mean", "std"))
    return RetinaNet(
        FATPyramid(backbone, freeze_bn=weights is not None),
        num_classes=len(CLASSES),
        anchor_generator=anchors,
        min_size=size,
        max_size=2 * size,
        image_mean=mean,
        image_std=std,
    )


def train(
    variant: str = "fat_b0", steps: int = 100, size: int = 96, batch: int = 4, weights: Path | None = None
) -> tuple[list[float], float]:
    """Train from `weights`, or from scratch. Return the loss of every step and the recall on 32 new images."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(variant, weights, size).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(steps):
        images, objects = draw(batch, size, generator)
        targets = [{name: t.to(device) for name, t in one.items()} for one in objects]
        loss = sum(model([image.to(device) for image in images], targets).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 9:
            print(f"step {step + 1}: loss {losses[-1]:.3f}", flush=True)
    return losses, recall(model.eval(), *draw(32, size, generator))


def draw(count: int, size: int, generator: torch.Generator) -> tuple[list[Tensor], list[Objects]]:
    """Draw one disc and one square per image, each in the color of its class, on a background of noise."""
    colors = torch.tensor([[0.9, 0.5, 0.3], [0.3, 0.6, 0.9]])
    images = (0.5 + 0.1 * torch.randn(count, 3, size, size, generator=generator)).clamp(0, 1)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    objects = []
    for image in images:
        radii = size * (0.12 + 0.13 * torch.rand(2, generator=generator))
        centers = radii[:, None] + torch.rand(2, 2, generator=generator) * (size - 2 * radii[:, None])
        for label, (radius, (cx, cy), color) in enumerate(zip(radii, centers, colors, strict=True), start=1):
            dx, dy = (x - cx).abs(), (y - cy).abs()
            inside = dx**2 + dy**2 < radius**2 if label == 1 else torch.maximum(dx, dy) < radius
            image[:, inside] = color[:, None]
        boxes = torch.cat([centers - radii[:, None], centers + radii[:, None]], dim=1)
        objects.append({"boxes": boxes, "labels": torch.tensor([1, 2])})
    return list(images), objects


@torch.no_grad()
def recall(model: nn.Module, images: list[Tensor], objects: list[Objects]) -> float:
    """Return the fraction of objects whose class's best detection in the image overlaps them by an IoU above 0.5."""
    device, found = next(model.parameters()).device, 0
    for image, truth in zip(images, objects, strict=True):
        (detected,) = model([image.to(device)])
        for box, label in zip(truth["boxes"], truth["labels"], strict=True):
            best = detected["boxes"][detected["labels"] == label.item()][:1].cpu()  # sorted by score
            found += len(best) > 0 and box_iou(best, box[None]).item() > 0.5
    return found / sum(len(truth["labels"]) for truth in objects)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=fat.list_models(), default="fat_b0")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--weights", type=Path, help="checkpoint of the variant, from which the backbone is loaded")
    options = parser.parse_args()
    _, found = train(options.variant, options.steps, weights=options.weights)
    print(f"{found:.0%} of the objects were found")
