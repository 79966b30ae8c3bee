"""What a training step of a model does: gradients to reduce, and collectives of BatchNorm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from launch.engine.sync_batchnorm import batch_norms
from launch.models.create import create_model, trial
from launch.models.specification import ModelSpec

GRADIENT_BYTES = 4  # gradients are reduced in float32, also with bf16 autocast
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20
"""Bytes of DDP's first bucket, and of the others: PyTorch's defaults."""
STATISTICS_BYTES = (16, 8)
"""Bytes per channel of BatchNorm's all-reduces: two float64 forward, two float32 backward."""


@dataclass(frozen=True)
class Bucket:
    """Gradients that DDP reduces in one all-reduce."""

    size: int
    """Bytes."""
    ready: float
    """Fraction of the backward pass after which all of its gradients are computed."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Communication of a training step."""

    model: str
    parameters: int
    buckets: tuple[Bucket, ...]
    """In the order in which they are reduced."""
    norm_channels: tuple[int, ...]
    """Channels of each BatchNorm layer."""

    @property
    def gradient_bytes(self) -> int:
        return GRADIENT_BYTES * self.parameters

    @classmethod
    def of(cls, spec: ModelSpec, *, size: int, classes: int) -> Workload:
        """Count the model's parameters and operations on the meta device.

        Raises:
            UserError: the model cannot be created, or does not support images of this size.
        """
        with torch.device("meta") if spec.is_fat else torch.device("cpu"):
            model = create_model(spec, num_classes=classes)
        return cls(
            model=str(spec),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            buckets=tuple(gradient_buckets(model, size)),
            norm_channels=tuple(norm.num_features for norm in batch_norms(model)),
        )


def gradient_buckets(model: nn.Module, size: int) -> list[Bucket]:
    """Return DDP's buckets, and when their gradients are ready.

    The backward pass is assumed to visit the modules in the reverse order of their registration, and to take a time in
    proportion to their multiply-accumulates.
    """
    modules = list(reversed(_costs(model, size)))
    total = sum(macs for _, macs in modules) or 1
    buckets, filled, done = list[Bucket](), 0, 0
    for sizes, macs in modules:
        done += macs
        for parameter in sizes:
            filled += parameter
            if filled >= (BUCKET if buckets else FIRST_BUCKET):
                buckets.append(Bucket(filled, done / total))
                filled = 0
    return [*buckets, Bucket(filled, 1.0)] if filled else buckets


def _costs(model: nn.Module, size: int) -> list[tuple[list[int], int]]:
    """Return (bytes of the gradient of each parameter, multiply-accumulates) of each module that has parameters."""
    macs: dict[nn.Module, int] = {}

    def add(module: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            macs[module] = macs.get(module, 0) + output.numel() * module.weight[0].numel()

    twin, images, output = trial(model, size)
    del output
    for module in twin.modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            module.register_forward_hook(add)
    with torch.random.fork_rng(devices=[]):
        twin(images)
    found = []
    for module in twin.modules():
        own = [GRADIENT_BYTES * p.numel() for p in module.parameters(recurse=False) if p.requires_grad]
        if own:
            found.append((own[::-1], macs.get(module, 0)))
    return found
