"""BatchNorm over several ranks: synchronised, in groups, or frozen."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from launch.recipe import RecipeError
from launch.world import World


def synchronise_norms(model: nn.Module, wanted: str, world: World) -> nn.Module:
    """BatchNorm -> SyncBatchNorm over all ranks, or over groups of N neighbours (`group:N`), where that is possible.

    Each layer then costs a collective forward and backward; groups inside a node keep those off the network.

    Args:
        wanted: auto, on, off or group:N (`RunRecipe.sync_bn`).

    Raises:
        RecipeError: asked for what cannot be.
    """
    possible = world.device.type == "cuda" and world.size > 1
    if wanted == "off" or (wanted == "auto" and not possible):
        return model
    if not possible:
        raise RecipeError(
            f"--sync-bn {wanted}: needs several ranks on GPUs, here are {world.size} on {world.device.type}; use auto"
        )
    group = None
    if wanted.startswith("group:"):
        size = int(wanted.removeprefix("group:"))
        if world.size % size:
            raise RecipeError(f"--sync-bn {wanted}: {size} does not divide the world size {world.size}")
        # Every rank takes part in making every group.
        groups = [dist.new_group(list(range(start, start + size))) for start in range(0, world.size, size)]
        group = groups[world.rank // size]
    return nn.SyncBatchNorm.convert_sync_batchnorm(model, group)


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """All BatchNorm layers, synchronised or not."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
