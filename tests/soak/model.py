"""The model of the soak: a FAT network so small that a step of a rank takes some ten milliseconds on one core."""

from __future__ import annotations

from torch import nn

import fat


def tiny(num_classes: int, drop_path_rate: float = 0.1) -> nn.Module:
    """Return a FAT network of 70,000 parameters, with BatchNorm, attention and drop path."""
    config = fat.FATConfig(
        widths=(8, 16, 24, 32), depths=(1, 1, 1, 1), heads=(1, 2, 2, 4), num_classes=num_classes,
        drop_path=drop_path_rate,
    )  # fmt: skip
    return fat.create_model(config, num_classes=num_classes)
