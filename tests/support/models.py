"""Models for `--model tests.support.models:NAME`."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

import fat


def small(num_classes: int, drop_path_rate: float = 0.0) -> nn.Module:
    """Return a small convolutional network."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(drop_path_rate),
        nn.Linear(8, num_classes),
    )


class WithClassifier(nn.Module):
    """A network with timm's method `get_classifier`, and a buffer that is not saved."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = small(8)
        self.fc = nn.Linear(8, num_classes)
        self.register_buffer("mask", torch.ones(8), persistent=False)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.body(images) * self.mask)


with_classifier = WithClassifier


class NeedsValues(nn.Module):
    """A network that reads values of the images on the host, which the meta device does not have."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layers = small(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images / (1 + images.abs().max().item()))


needs_values = NeedsValues


class Broken(nn.Module):
    """A network that ends in `end(logits)`, and has a parameter that it does not use if `idle`."""

    def __init__(self, end: object, num_classes: int, *, idle: bool = False) -> None:
        super().__init__()
        self.layers, self.end = small(num_classes), end
        if idle:
            self.idle = nn.Parameter(torch.zeros(3))

    def forward(self, images: Tensor) -> object:
        return self.end(self.layers(images))


def tuple_of_logits(num_classes: int) -> nn.Module:
    return Broken(lambda logits: (logits,), num_classes)


def too_many_outputs(num_classes: int) -> nn.Module:
    return small(num_classes + 1)


class LikeTorchvision(nn.Module):
    """A network whose classifier has several layers and a usual name, and that lacks timm's methods."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = small(8)
        self.classifier = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


like_torchvision = LikeTorchvision


def feature_map(num_classes: int) -> nn.Module:
    return nn.Conv2d(3, num_classes, 3)


def idle_parameter(num_classes: int) -> nn.Module:
    return Broken(lambda logits: logits, num_classes, idle=True)


def tied_layers(num_classes: int) -> nn.Module:
    layer = nn.Linear(num_classes, num_classes)
    return nn.Sequential(small(num_classes), layer, layer)


def half_precision(num_classes: int) -> nn.Module:
    layers = small(num_classes).bfloat16()
    layers.register_forward_pre_hook(lambda _, images: tuple(image.bfloat16() for image in images))
    return layers


def for_one_size(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, num_classes))


def without_parameters(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool3d((1, 1, num_classes)), nn.Flatten())


def no_module(num_classes: int) -> object:
    return random.Random(num_classes)


def fails(num_classes: int) -> nn.Module:
    raise OSError("no such layer")


def without_drop_path(num_classes: int) -> nn.Module:
    return small(num_classes)


def small_fat(num_classes: int, drop_path_rate: float = 0.1) -> nn.Module:
    """Return a FAT network of 50,000 parameters, with BatchNorm, attention and drop path."""
    config = fat.FATConfig(
        widths=(8, 16, 24, 32), depths=(1, 1, 1, 1), heads=(1, 2, 2, 4), num_classes=num_classes,
        drop_path=drop_path_rate,
    )  # fmt: skip
    return fat.create_model(config, num_classes=num_classes)
