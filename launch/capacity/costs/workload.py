"""What a training step of a model does: gradients to reduce, and collectives of BatchNorm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from launch.engine.cuda_graphs import modules_by_part
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
    def of(cls, spec: ModelSpec, *, size: int, classes: int, graphs: bool) -> Workload:
        """Count the model's parameters and operations on the meta device.

        Args:
            graphs: whether the passes are CUDA graphs (`gradient_buckets`).

        Raises:
            UserError: the model cannot be created, or does not support images of this size.
        """
        with torch.device("meta") if spec.is_fat else torch.device("cpu"):
            model = create_model(spec, num_classes=classes)
        return cls(
            model=str(spec),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            buckets=tuple(gradient_buckets(model, size, graphs=graphs)),
            norm_channels=tuple(norm.num_features for norm in batch_norms(model)),
        )


def gradient_buckets(model: nn.Module, size: int, *, graphs: bool) -> list[Bucket]:
    """Return DDP's buckets, and when their gradients are ready.

    The backward pass is assumed to visit the modules in the reverse order of their registration, and to take a time in
    proportion to their multiply-accumulates.

    Args:
        graphs: whether the passes are CUDA graphs: DDP gets the gradients of a part of the model when its graph ends.
    """
    modules = list(reversed(_costs(model, size)))
    total = sum(module.macs for module in modules) or 1
    done, ended = 0, dict[int, float]()
    for number, module in enumerate(modules):
        done += module.macs
        ended[module.part if graphs else number] = done / total
    buckets, filled = list[Bucket](), 0
    for number, module in enumerate(modules):
        ready = ended[module.part if graphs else number]
        for parameter in module.gradients:
            filled += parameter
            if filled >= (BUCKET if buckets else FIRST_BUCKET):
                buckets.append(Bucket(filled, ready))
                filled = 0
    return [*buckets, Bucket(filled, 1.0)] if filled else buckets


@dataclass(frozen=True)
class _Module:
    """A module that has parameters."""

    gradients: list[int]
    """Bytes of the gradient of each parameter, in the order of the backward pass."""
    macs: int
    """Multiply-accumulates of a forward pass."""
    part: int
    """Number of its part of the CUDA graphs."""


def _costs(model: nn.Module, size: int) -> list[_Module]:
    """Return the modules that have parameters, in the order of their registration."""
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
    parts = {
        module: number
        for number, owners in enumerate(modules_by_part(twin))
        for owner in owners
        for module in owner.modules()
    }
    found = []
    for module in twin.modules():
        own = [GRADIENT_BYTES * p.numel() for p in module.parameters(recurse=False) if p.requires_grad]
        if own:
            found.append(_Module(own[::-1], macs.get(module, 0), parts[module]))
    return found
