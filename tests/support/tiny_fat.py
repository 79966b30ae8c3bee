"""A small FAT model for tests, and images for it."""

from __future__ import annotations

import torch

import fat

TINY = fat.FATConfig(widths=(16, 32, 48, 64), depths=(1, 2, 2, 1), heads=(2, 4, 6, 8), num_classes=10)
PARAMETERS = {"fat_b0": 4_494_488, "fat_b1": 7_819_720, "fat_b2": 13_466_728, "fat_b3": 29_196_264}
"""Number of parameters of the published variants."""


def images(batch: int = 2, size: tuple[int, int] = (64, 64), chans: int = 3) -> torch.Tensor:
    """Return random images float32 [batch, chans, *size], the same at every call."""
    return torch.randn(batch, chans, *size, generator=torch.Generator().manual_seed(0))


def set_running_stats(model: torch.nn.Module) -> torch.nn.Module:
    """Update a new model's BatchNorm running statistics, so that eval mode does not use their initial values."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(images(4, (96, 96)))
    return model.eval()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach().double() - expected.double()).norm() / expected.double().norm())
