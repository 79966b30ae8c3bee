"""One of several ranks with BatchNorm over groups of ranks: `norm_run.py OUT.pt`.

Every rank normalizes its rows of the same seeded batch. Rank 0 writes the results of all ranks for each case: outputs,
gradients and running statistics.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from fat import kernels
from fat.batchnorm import fold_into_conv, with_statistics
from fat.fused_layers import convolve_relu
from fat.layers import ConvNorm
from launch.engine.sync_batchnorm import GlobalBatchNorm, convert_sync_batchnorm
from launch.machine.world import World, connect, disconnect

RANKS = 4
ROWS, CHANNELS, SIDE = 3, 7, 5  # rows of each rank
# (ranks in a group, whether the layers are compiled, whether the norm is folded into the convolution after it)
CASES = ((4, False, False), (2, False, False), (4, True, False), (2, False, True), (4, True, True))


def global_batch(world: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images and output gradients of all ranks. The means are far from 0, where variances lose digits."""
    generator = torch.Generator().manual_seed(5)
    shape = (world * ROWS, CHANNELS, SIDE, SIDE)
    images = torch.randn(shape, generator=generator) * 3 + torch.arange(CHANNELS).view(-1, 1, 1) * 20
    return images, torch.randn(shape, generator=generator)


def layer() -> nn.Sequential:
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(CHANNELS)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return nn.Sequential(norm, nn.Conv2d(CHANNELS, CHANNELS, 1))


def fold(model: nn.Sequential, images: torch.Tensor) -> torch.Tensor:
    norm, after = model
    images, mean, var = with_statistics(images)
    mean, var = norm.sync_stats(mean, var)
    norm.update_running_stats(mean - norm.running_mean, var, images.numel() // CHANNELS)
    return F.conv2d(images, *fold_into_conv(after, norm, mean, var, images.dtype))


def stem() -> ConvNorm:
    torch.manual_seed(2)
    return ConvNorm(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1))


def rectify(group: int, world: World, images: torch.Tensor, cotangent: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run norm and ReLU in the parts into which `fat.kernels` divides them, but in plain PyTorch."""
    unit = convert_sync_batchnorm(stem(), f"group:{group}", world)
    images = images.detach().requires_grad_()
    with kernels.assume_available(), kernels.disabled(*kernels.FAMILIES):
        output = convolve_relu(unit, images)
        output.backward(cotangent)
    assert "BatchNormReLU" in str(output.grad_fn)
    return {
        "rectified": output.detach(),
        "rectified images": images.grad,
        "gain": unit.bn.weight.grad,
        "shift": unit.bn.bias.grad,
        "rectified var": unit.bn.running_var,
        "rectified mean": unit.bn.running_mean,
    }


def run(group: int, compiled: bool, folds: bool, world: World) -> list[dict[str, torch.Tensor]]:
    """Run one case, and return the results of every rank."""
    model = convert_sync_batchnorm(layer(), f"group:{group}", world)
    assert isinstance(model[0], GlobalBatchNorm)
    call = partial(fold, model) if folds else model
    if compiled:
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    mine = slice(world.rank * ROWS, (world.rank + 1) * ROWS)
    images, cotangent = (t[mine].contiguous(memory_format=torch.channels_last) for t in global_batch(world.size))
    images.requires_grad_()
    output = call(images)
    output.backward(cotangent)
    norm = model[0]
    found = {
        "output": output.detach(),
        "images": images.grad,
        "weight": norm.weight.grad,
        "bias": norm.bias.grad,
        "behind": model[1].weight.grad,
        "mean": norm.running_mean,
        "var": norm.running_var,
        "batches": norm.num_batches_tracked,
        **rectify(group, world, images, cotangent),
    }
    everyone = [{}] * world.size
    dist.all_gather_object(everyone, found)
    return everyone


def main() -> None:
    world = connect()
    found = [run(*case, world) for case in CASES]
    if world.is_main:
        torch.save(found, sys.argv[1])
    disconnect()


if __name__ == "__main__":
    main()
