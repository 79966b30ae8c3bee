"""A model for `launch/train.py --model examples.own_model:create` (docs/other-models.md)."""

from __future__ import annotations

from torch import Tensor, nn


class SmallNet(nn.Module):
    """Images, float [B, 3, H, W] -> logits [B, num_classes]."""

    def __init__(self, num_classes: int, widths: tuple[int, ...] = (32, 64, 128, 256)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((3, *widths), widths, strict=False):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(widths[-1], num_classes)

    def get_classifier(self) -> nn.Module:
        """Return the last layer, which fine-tuning replaces if the classes differ."""
        return self.classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean(dim=(2, 3)))


def create(num_classes: int) -> nn.Module:
    return SmallNet(num_classes)
